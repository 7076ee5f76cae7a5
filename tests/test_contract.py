"""The contract: which one is active, what the fingerprint covers, and the fence around importing."""

import re

import pytest
import torch
from conftest import TINY, forget, run, some_texts, state_of, write_shards

import prepare


def test_importing_both_modules_prints_nothing_and_opens_no_file_of_ours(tmp_path):
    code = """
import sys
def hook(event, arguments):
    if event == "open" and "AUTORESEARCH" in str(arguments[0]): raise SystemExit(f"opened {arguments[0]}")
    if event in ("socket.connect", "subprocess.Popen"): raise SystemExit(event)
import torch, pyarrow.parquet, requests, tiktoken, rustbpe, filelock, tqdm
sys.addaudithook(hook)
import prepare, train
assert not torch.cuda.is_initialized()
"""
    done = run("-c", code, PATH="", HOME=str(tmp_path), AUTORESEARCH_CACHE=str(tmp_path / "AUTORESEARCH"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_every_contract_has_an_exam_of_whole_rows():
    for contract in prepare.CONTRACTS.values():
        assert contract.eval_tokens % contract.max_seq_len == 0


def active() -> prepare.Contract:
    """The contract that a new process would choose."""
    forget()
    return prepare.active_contract()[0]


def test_the_environment_goes_before_what_is_remembered_and_that_before_the_device(tiny, command, monkeypatch):
    by_device = prepare.CONTRACTS["climbmix" if torch.cuda.is_available() else "demo"]
    command("--contract", "climbmix", code=1)
    monkeypatch.delenv("AUTORESEARCH_CONTRACT")
    assert active() == by_device  # what could not be prepared is not remembered
    command("--contract", "tiny")
    assert active() == TINY and (prepare.MAX_SEQ_LEN, prepare.VOCAB_SIZE) == (32, 400)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "climbmix")
    plain = active()
    assert plain == prepare.CONTRACTS["climbmix"]
    assert (prepare.MAX_SEQ_LEN, prepare.TIME_BUDGET, prepare.EVAL_TOKENS) == (2048, 300, 40 * 524_288)
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "300.0")  # the default, so the fingerprint's too
    assert repr(active()) == repr(plain)
    monkeypatch.delenv("AUTORESEARCH_CONTRACT")
    (prepare.cache_dir() / "active").write_text("\ufefftiny\n")  # by a hand
    assert active().name == "tiny"
    (prepare.cache_dir() / "active").write_bytes(b"\xff\xfe")
    assert active().name == by_device.name


def test_the_fingerprint_changes_with_budget_tokenizer_and_exam(tiny, monkeypatch, tmp_path):
    first = prepare.fingerprint(TINY)
    assert first == prepare.fingerprint() and re.fullmatch("tiny-[0-9a-f]{8}", first)
    seen = {first}
    for changed, shard in ("exam", 4), ("tokenizer", 0):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / changed))
        write_shards(TINY.folder, lambda number: some_texts(number + 10 * (number == shard)))  # noqa: B023
        prepare.prepare(TINY, 3)
        seen.add(prepare.fingerprint(TINY))
    before, sums = state_of(TINY.folder), TINY.folder / "SHA256SUMS"
    digest, noted = before["tokenizer.tiktoken"], sums.read_text()
    sums.write_text(noted.replace(digest, "0" * 64))
    assert prepare.fingerprint(TINY) not in seen
    sums.write_text(noted)
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "7")
    prepare.prepare(active(), 3)  # makes nothing anew
    assert state_of(TINY.folder) == before and len(seen | {prepare.fingerprint(active())}) == 4


@pytest.mark.parametrize("name, value", [
    ("AUTORESEARCH_CONTRACT", "nonsense"), ("AUTORESEARCH_TIME_BUDGET", "-3"), ("AUTORESEARCH_TIME_BUDGET", "soon"),
    ("AUTORESEARCH_TIME_BUDGET", "0.0"), ("AUTORESEARCH_TIME_BUDGET", "9" * 400)])
def test_a_bad_variable_is_named_in_one_line_with_its_value(name, value, command, monkeypatch):
    monkeypatch.setenv(name, value)
    output = command(code=1)
    assert name in output and value in output and output.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    ["--num-shards", "0"], ["--num-shards", "-2"], ["--num-shards", "many"], ["--contract", "nope"],
    ["--download-workers", "0"], ["--num-shards", "9999", "--contract", "climbmix"], ["--frobnicate"],
])
def test_a_bad_argument_gets_one_line_and_exit_code_2(arguments, command):
    (said,) = (line for line in command(*arguments, code=2).splitlines() if not line.startswith("contract: "))
    assert "error" in said
