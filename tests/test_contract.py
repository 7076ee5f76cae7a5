"""The contract: which one is active, what the fingerprint covers, and the fence around importing."""

import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run

import prepare


@pytest.mark.parametrize("module", ["prepare", "train"])
def test_importing_a_module_prints_nothing_and_opens_no_file_of_ours(module, tmp_path):
    code = f"""
import sys
def hook(event, arguments):
    if event == "open" and "AUTORESEARCH" in str(arguments[0]): raise SystemExit(f"opened {{arguments[0]}}")
    if event in ("socket.connect", "subprocess.Popen"): raise SystemExit(event)
import torch, pyarrow.parquet, requests, tiktoken, rustbpe, filelock
sys.addaudithook(hook)
import {module}, torch
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={"PATH": "", "HOME": str(tmp_path), "AUTORESEARCH_CACHE": str(tmp_path / "AUTORESEARCH")})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_every_contract_has_an_exam_of_whole_rows():
    for contract in prepare.CONTRACTS.values():
        assert contract.eval_tokens % contract.max_seq_len == 0


def test_the_environment_goes_before_the_remembered_contract_and_that_before_the_device(monkeypatch, tmp_path):
    assert prepare.active_contract()[0].name in ("demo", "climbmix")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "active").write_text("tinystories")
    prepare.active_contract.cache_clear()
    assert prepare.active_contract()[0].name == "tinystories"
    assert (prepare.MAX_SEQ_LEN, prepare.VOCAB_SIZE) == (512, 4096)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "climbmix")
    prepare.active_contract.cache_clear()
    assert prepare.active_contract()[0].name == "climbmix"
    assert (prepare.MAX_SEQ_LEN, prepare.TIME_BUDGET, prepare.EVAL_TOKENS) == (2048, 300, 40 * 524_288)


def test_the_fingerprint_changes_with_the_budget_the_tokenizer_and_the_exam_and_nothing_else(tiny, monkeypatch):
    first = prepare.fingerprint(TINY)
    assert first == prepare.fingerprint() and first.startswith("tiny-") and len(first) == len("tiny-") + 8
    prepare.prepare(TINY, 2)  # fewer training shards
    assert prepare.fingerprint(TINY) == first
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "7")
    prepare.active_contract.cache_clear()
    seen = {first, prepare.fingerprint()}
    for field in ("val", "tokenizer"):
        data = prepare.Manifest(TINY).data
        prepare.Manifest(TINY).update(**{field: "0" * 64})
        seen.add(prepare.fingerprint(TINY))
        prepare.Manifest(TINY).update(**{field: data[field]})
    assert len(seen) == 4


@pytest.mark.parametrize("name, value", [
    ("AUTORESEARCH_CONTRACT", "nonsense"),
    ("AUTORESEARCH_TIME_BUDGET", "-3"),
    ("AUTORESEARCH_TIME_BUDGET", "soon"),
])
def test_a_bad_variable_is_named_in_one_line_with_its_value(name, value):
    done = run("prepare.py", **{name: value})
    assert done.returncode == 1
    assert name in done.stderr and value in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    ["--num-shards", "0"], ["--num-shards", "-2"], ["--num-shards", "many"], ["--contract", "nope"],
    ["--download-workers", "0"], ["--num-shards", "9999", "--contract", "climbmix"], ["--frobnicate"],
])
def test_a_bad_argument_gets_one_line_and_exit_code_2(arguments):
    done = run("prepare.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "error" in done.stderr
