"""Download, tokenizer and token cache: whatever goes wrong, the same command again ends well.

The oracle of most tests is `good`: every byte of the cache that an undisturbed run leaves.
"""

import contextlib
import dataclasses
import errno
import getpass
import inspect
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import hub as acts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustbpe
import tiktoken.load
import torch
import tqdm
from conftest import ROOT, TINY, documents_of, exam_rows, some_texts, state_of
from hub import Hub, status
from hypothesis import given
from hypothesis import strategies as st

import prepare

SMALL = dataclasses.replace(TINY, name="climbmix")  # takes climbmix's place in the real command
LIMITED = dataclasses.replace(SMALL, tokenizer_chars=40_000, tokenizer_doc_chars=500)  # two shards
BIG = dataclasses.replace(SMALL, train_files=1, tokenizer_chars=20_000)
SHARDS = [f"shard_{number:05d}.parquet" for number in range(5)]
TOKENIZER = prepare.Tokenizer({bytes([i]): i for i in range(256)} | {b"th": 256, b" th": 257})


def parquet(texts: list, ballast: int = 0) -> bytes:
    """A shard; `ballast`: bytes per document that are no text."""
    draw = random.Random(0)
    table = pa.table({"text": texts, "ballast": [draw.randbytes(ballast) for _ in texts]})
    pq.write_table(table, sink := io.BytesIO(), row_group_size=50, compression="none")
    return sink.getvalue()


@pytest.fixture(scope="module")
def shards() -> dict[str, bytes]:
    """The files of SMALL as the hub serves them; the first and the last are a few megabytes."""
    return {name: parquet(some_texts(i), 12_000 * (i in (0, 4))) for i, name in enumerate(SHARDS)}


@pytest.fixture(scope="module")
def good(shards, tmp_path_factory) -> dict[str, object]:
    """State of the cache after an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch, Hub(shards) as hub:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("good")))
        patch.setenv("HF_ENDPOINT", hub.url)
        prepare.prepare(SMALL)
        return state_of(prepare.cache_dir() / "climbmix")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Folder of SMALL, the active contract; without the fixture `hub` there is no network."""
    monkeypatch.setitem(prepare.CONTRACTS, "climbmix", SMALL)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "climbmix")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # of files that were read before
    return tmp_path / "cache" / "climbmix"


@pytest.fixture
def hub(shards, cache, monkeypatch):
    with Hub(shards) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def ends_well(command, cache, good):
    """`prepare.py` leaves the cache of an undisturbed run; returns what it says."""
    def ends_well() -> str:
        output = command()
        assert state_of(cache) == good, output
        return output
    return ends_well


def put(cache: Path, files: dict[str, bytes]) -> None:
    """Put shards into the cache by hand."""
    (cache / "parquet").mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (cache / "parquet" / name).write_bytes(body)


@pytest.fixture
def start():
    """Run Python code with a contract in climbmix's place, in a session that ends with the test."""
    started = []

    def start(code: str, contract: prepare.Contract = SMALL) -> subprocess.Popen:
        code = f"""import os, prepare, sys; from prepare import Contract, main, run_main
prepare.CONTRACTS["climbmix"] = {contract!r}\n{code}"""
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


SILENT = dict(ranges=False, hashes=False, head=status(405))  # no server has to declare anything


@pytest.mark.parametrize("fault, server", [
    ([status(500), status(520)], {}), ([status(429, Retry_After="1")], {}), ([acts.cut] * 4, {}),
    ([status(408), status(503, Retry_After="86400")], {}),
    ([acts.cut] * 2, SILENT), ([acts.stall], {}), ([acts.sha1] * 9, {}), ([acts.mute], {}), ([acts.web_page], {}),
    ([acts.cut, acts.flip, status(502)], {"ranges": False}),
    ([acts.cut, acts.wrong_range], {"hashes": False}), ([acts.cut, status(416)], {}),
], ids=lambda value: " ".join(getattr(act, "__name__", act) for act in value))
def test_a_passing_fault_is_survived_within_one_run(fault, server, hub, ends_well):
    vars(hub).update(server)
    hub.acts |= {name: list(fault) for name in (SHARDS[0], SHARDS[4])}
    began = time.monotonic()
    ends_well()
    assert fault[0].__name__ != "429" or time.monotonic() - began >= 1  # what Retry-After asks for


@pytest.mark.parametrize("faults", [
    {0: (status(404), "404"), 1: (status(401), "401.*HF_TOKEN"), 3: (status(500), "500"), 4: (acts.flip, "SHA-256")},
    {0: (acts.cut, "br[oe]|Incom"), 1: (acts.stall, "br[oe]|time"), 2: (acts.mute, "timed out"),
     4: (acts.web_page, "html|parquet")},
], ids=["refused", "broken"])
def test_a_lasting_fault_names_every_file_and_why_and_the_next_run_gets_only_what_is_missing(
        faults, hub, command, cache, ends_well):
    hub.always |= {SHARDS[number]: act for number, (act, _) in faults.items()}
    output = command(code=1)
    assert "FAIL: " in output and "ready" not in output
    for number, (_, said) in faults.items():
        assert re.search(rf"{SHARDS[number]}: .*({said})", output), output
    complete = [path.name for path in (cache / "parquet").glob("*.parquet")]
    assert not {SHARDS[number] for number in faults} & set(complete)
    hub.always.clear()
    ends_well()
    assert all(len(hub.gets(name)) == 1 for name in complete)


@pytest.mark.parametrize("where, address, words", [
    *(("HF_ENDPOINT", address, "\nFAIL: HF_ENDPOINT is no address like") for address in (
        "hub.example", "http://", "http://hub example", "http://hub..example", "http://me:hush@[bad",
        "ftp://me:hush@hub.example", "http://me:hush@127.0.0.1:99999", "http://me:12/hush@hub.example",
        f"http://{'a' * 64}.example")),
    ("HF_ENDPOINT", "http://me:hush@127.0.0.1:9", "(?s)127.0.0.1.*refused.*prepare.py --contract demo"),
    ("http_proxy", "http://me:hush@127.0.0.1:9", r"cannot reach hub.example \(the proxy: .*refused"),
    ("http_proxy", "http://me:h/hush@127.0.0.1:9", "http_proxy is no address"),
    ("http_proxy", "http://me:h#hush@127.0.0.1:9", "http_proxy is no address"),
    ("HF_TOKEN", "hush hush", "FAIL: HF_TOKEN holds characters"),
    ("REQUESTS_CA_BUNDLE", "/nonexistent", "\nFAIL: cannot ask hub.example .*TLS CA"),
    ("redirect", "http://127.0.0.1:9/x?sig=hush", f"{SHARDS[0]}: .*127.0.0.1:9: .*refused"),
    ("redirect", "http://cdn[/hush", f"{SHARDS[0]}: .*Invalid"),
    ("redirect", "ftp://me:hush@cdn/x?sig=hush", f"{SHARDS[0]}: .*No connection adapters"),
    ("redirect", "http://.cdn/hush", f"{SHARDS[0]}: .*(label|host|parse)"),
    ("redirect", f"http://{'a' * 64}/hush", f"{SHARDS[0]}: .*(label|host)")])
def test_an_address_that_leads_nowhere_ends_in_words_without_its_secret(
        where, address, words, hub, command, monkeypatch):
    if where == "redirect":
        hub.always[SHARDS[0]] = status(302, hashes=False, Location=address)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "https://hub.example" if "CA" in where else "http://hub.example")
        monkeypatch.setenv(where, address)
    output = command(code=1)
    assert re.search(words, output) and not re.search("hush|me:", output), output


@pytest.mark.parametrize("after", [
    lambda left, body: left, lambda left, body: b"junk" * 700, lambda left, body: body + b"more",
], ids=["half", "junk", "too much"])
def test_what_a_run_left_half_done_is_gone_on_with_or_thrown_away(after, hub, command, cache, ends_well, shards):
    hub.always[SHARDS[0]], naps, sleep = acts.cut, set(), time.sleep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: (naps.add(seconds), sleep(seconds)))
        command(code=1)
    assert naps >= {prepare.PATIENCE / 60 * 2**attempt for attempt in range(1, prepare.ATTEMPTS)}
    left, = (cache / "parquet").glob(f"{SHARDS[0]}*")
    left.write_bytes(after(left.read_bytes(), shards[SHARDS[0]]))
    hub.always.clear()
    hub.seen.clear()
    ends_well()
    assert "Range" in hub.gets(SHARDS[0])[0]


@pytest.mark.parametrize("token, netrc", [
    ("hf_secret", False), ("hf_secret", True), ("", True), (" hf_secret\r\n", False)], ids=repr)
def test_the_mirror_gets_the_token_and_nothing_else_and_the_host_it_redirects_to_gets_nothing(
        token, netrc, hub, ends_well, shards, monkeypatch, tmp_path):
    """What comes from there is checked by the mirror's hash. No blank or line end is sent."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n" * netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    with Hub(shards, hashes=False) as hub.cdn:
        hub.cdn.acts |= {SHARDS[0]: [acts.cut], SHARDS[4]: [acts.lie]}
        assert "hf_secret" not in ends_well()
    assert {headers.get("Accept-Encoding") for _, _, headers in hub.seen} == {"identity"}
    assert hub.tokens() == {f"Bearer {token.strip()}" if token else None}
    assert hub.cdn.tokens() == {None} and "Range" in hub.cdn.gets(SHARDS[0])[1]


def test_a_complete_cache_is_left_alone_and_what_is_gone_or_spoilt_is_made_again(
        hub, command, cache, good, ends_well, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    command()
    assert len(synced) == len(good) - len(SHARDS) and all(synced)  # before they get their names
    before = {name: (cache / name).stat().st_mtime_ns for name in good}
    hub.seen.clear()
    ends_well()
    assert not hub.seen and {name: (cache / name).stat().st_mtime_ns for name in good} == before
    for name in good:
        (cache / name).unlink()
        ends_well()
    sums, made = (cache / "SHA256SUMS").read_text(), (cache / "tokenizer.tiktoken").stat().st_mtime_ns
    (cache / "SHA256SUMS").write_text(sums.replace(sums.splitlines()[-1] + "\n", ""))  # an older commit's
    ends_well()
    assert (cache / "tokenizer.tiktoken").stat().st_mtime_ns == made
    (cache / "shards").write_text("0")  # the default, here all that exist
    with open(cache / "SHA256SUMS", "a") as sums:
        sums.write(f"{'0' * 64}  parquet/{SHARDS[0]}\n")
    command()
    assert (cache / "parquet" / SHARDS[0]).exists()
    tokens, text = cache / "token_ids" / f"{SHARDS[0]}.bin", cache / "parquet" / SHARDS[0]
    for left in (b"odd", tokens.read_bytes()[: tokens.stat().st_size // 4 * 2], b""):
        tokens.write_bytes(left)
        os.utime(tokens, ns=(text.stat().st_mtime_ns,) * 2)  # as of a copy that filled the disk
        with pytest.raises(prepare.Failure, match=f"cannot read .*{SHARDS[0]}.bin .*delete it"):
            next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 1, 32, "train"))
    tokens.unlink()
    ends_well()
    for path in (cache / name for name in ("val.bin", "test.bin", "tokenizer.tiktoken")):
        path.write_bytes(acts.flipped(path.read_bytes()))
        assert str(path) in ends_well()


def test_an_exam_that_lost_text_in_an_older_commit_is_packed_anew_though_sum_and_time_are_right(
        hub, command, cache, ends_well):
    command()
    exam, sums = cache / "val.bin", cache / "SHA256SUMS"
    made, before = exam.stat(), prepare._sha256(exam)
    exam.write_bytes(acts.flipped(exam.read_bytes()))
    os.utime(exam, ns=(made.st_atime_ns, made.st_mtime_ns))
    sums.write_text(sums.read_text().replace(before, prepare._sha256(exam)))
    (cache / "token_ids").rename(cache.parent / "tokens")
    with pytest.raises(prepare.Failure, match="cannot read .*parquet.bin .*prepare.py"):
        next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 1, 32, "train"))
    assert "scores do not compare" in ends_well()


@pytest.mark.parametrize("edit", [{"max_seq_len": 16}, {"vocab_size": 350}, {"eval_tokens": 32 * 8},
                                  {"tokenizer_doc_chars": 50}], ids=lambda edit: next(iter(edit)))
def test_after_an_edit_of_the_contracts_fields_the_cache_is_what_a_fresh_one_would_be(
        edit, command, cache, shards, monkeypatch, tmp_path):
    put(cache, shards)
    command()
    monkeypatch.setitem(prepare.CONTRACTS, "climbmix", dataclasses.replace(SMALL, **edit))
    assert "scores do not compare" in command()
    state, fingerprint = state_of(cache), prepare.fingerprint()
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "other"))
    put(tmp_path / "other" / "climbmix", shards)
    command()
    assert (state_of(tmp_path / "other" / "climbmix"), prepare.fingerprint()) == (state, fingerprint)


def test_without_a_text_to_train_on_no_tokenizer_is_left_behind(command, cache, shards, ends_well):
    put(cache, shards | dict.fromkeys(SHARDS[:3], parquet(["", ""])))
    assert re.search(f"FAIL: no text to train on .*{SHARDS[0]}", command(code=1))
    put(cache, shards)
    ends_well()


def test_text_in_the_place_of_other_text_is_packed_anew_however_old_its_file_is(command, cache, shards, good):
    put(cache, shards)
    command()
    before = exam_rows("val").tolist()
    for body, same in ((shards[SHARDS[0]], False), (shards[SHARDS[4]], True)):
        put(cache, {SHARDS[4]: body})
        os.utime(cache / "parquet" / SHARDS[4], (same, same))  # as `mv` and `cp -p` leave it
        command()
        assert (exam_rows("val").tolist() == before) == same
    assert state_of(cache) == good


@pytest.mark.parametrize("kind", [
    pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_shards_put_there_by_hand_are_read_without_a_network_whatever_strings_they_hold(kind, command, cache, shards):
    body = parquet(pa.array(some_texts(1)).cast(kind))
    put(cache, shards | {SHARDS[1]: body})
    command()
    assert (cache / "parquet" / SHARDS[1]).read_bytes() == body
    decode = prepare.Tokenizer.from_directory().decode
    assert [decode(tokens[1:]) for tokens in documents_of(SHARDS[1])] == some_texts(1)


@pytest.mark.parametrize("damage", [
    lambda body: body[:-100],
    lambda body: body.replace(b"text", b"tale"),
    lambda body: parquet([1, 2]),
    lambda body: body[:4] + b"\xff" * 40 + body[44:],  # the footer is fine: only reading finds it
    lambda body: body.replace(b" the ", b" \xff\xfee "),
], ids=["truncated", "no column `text`", "numbers", "a broken page", "no UTF-8"])
def test_a_bad_shard_put_there_by_hand_is_named_and_never_overwritten(damage, hub, command, cache, ends_well, shards):
    path, body = cache / "parquet" / SHARDS[1], damage(shards[SHARDS[1]])
    put(cache, {SHARDS[1]: body})
    assert path.name in command(code=1) and path.read_bytes() == body
    path.unlink()
    path.symlink_to(cache / "on a disk that is away")
    assert path.name in command(code=1) and path.is_symlink()
    path.unlink()
    ends_well()


def test_too_little_disk_is_said_with_both_numbers_before_any_download(hub, command, cache, monkeypatch):
    hub.head = status(200, hashes=False, Content_Length=str(10**9), X_Linked_Size=str(10**9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3 * 10**9))
    output = command(code=1)
    assert {"3.0", "12.5"} <= set(re.findall(r"([\d.]+) GB", output))
    assert "--num-shards" in output and "GET" not in [method for method, _, _ in hub.seen]
    with open(cache / "parquet" / f"{SHARDS[0]}.part", "wb") as part:
        part.truncate(10**10)  # what is there already needs no more
    command()


@pytest.mark.parametrize("limit, there", [(10**6, False), (20_000, True), (2_000, True)],
                         ids=["download", "tokens", "tokenizer"])
def test_a_file_that_cannot_be_written_is_said_in_one_message_and_the_next_run_ends_good(
        limit, there, hub, command, cache, ends_well, shards):
    """A full disk as the system itself can make one: no file may grow beyond the limit."""
    put(cache, shards if there else {})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        assert "FAIL: " in command(code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    ends_well()


def test_a_cache_that_cannot_be_written_is_one_line_that_names_it(command, cache, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert re.search("FAIL: .*/cache.*AUTORESEARCH_CACHE", command(code=1))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_complete_cache_that_nobody_may_write_serves(number, command, cache, shards, monkeypatch):
    """As in a container that mounts it read-only. The test may be root, who may write anywhere."""
    put(cache, shards)
    command()
    before, opened = state_of(cache), os.open

    def refuse(path, flags, *rest, **options):
        if str(path).startswith(str(cache.parent)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert "ready: climbmix-" in command() and state_of(cache) == before
    (cache / "val.bin").unlink()
    monkeypatch.setattr(prepare, "open", lambda path, mode: os.fdopen(refuse(path, os.O_WRONLY)), raising=False)
    assert "FAIL: cannot read or write the cache" in command(code=1)


def test_a_user_without_a_home_or_a_name_is_told_to_name_a_cache_and_gets_a_name(cache, command, monkeypatch):
    """A number without an entry, in a container say; torch asks for a name."""
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "AUTORESEARCH_CACHE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert command(code=1) == "FAIL: no home folder for the cache; set AUTORESEARCH_CACHE to a whole path\n"
    assert getpass.getuser() == f"user-{os.getuid()}"


def test_two_that_prepare_at_once_end_with_one_good_cache_and_short_logs(hub, cache, start, good):
    processes = [start("run_main(main)") for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert "\r" not in output and len(output.splitlines()) < 20
    assert state_of(cache) == good and all(len(hub.gets(name)) == 1 for name in SHARDS)


# Forks, because an import takes longer than the work
RENAMES = """
def hook(event, _):
    if event == "os.rename" and next(renames) == 1 + len(codes) % 3: os.kill(os.getpid(), 9)
codes, renames = [], iter(range(99))
while codes[-1:] != [0] and len(codes) < 99:
    if not os.fork():
        try: sys.addaudithook(hook); prepare.prepare(prepare.CONTRACTS["climbmix"]); os._exit(0)
        finally: os._exit(1)
    codes.append(os.wait()[1])
print(codes)
"""


def test_a_kill_just_before_any_file_gets_its_name_is_made_good_by_the_next_run(hub, cache, start, good):
    output, errors = start(RENAMES).communicate(timeout=120)
    assert re.fullmatch(r"\[(9, ){5,}0\]", output.splitlines()[-1]), errors
    assert state_of(cache) == good


@pytest.mark.parametrize("contract, line", [(SMALL, "download"), (BIG, "tokenize shard_00000")])
def test_ctrl_c_ends_a_stalled_download_and_long_work_in_one_line(contract, line, hub, cache, start):
    if contract == SMALL:  # with a minute's patience
        hub.always[SHARDS[0]] = acts.stall
    else:
        letters, draw = bytes(97 + i % 26 for i in range(256)), random.Random(0)
        texts = [draw.randbytes(12_000).translate(letters).decode() for _ in range(2000)]
        hub.files[SHARDS[0]] = parquet(texts)
    process = start("run_main(main)", contract)
    while not process.stdout.readline().startswith(line):
        assert process.poll() is None
    while not hub.gets(SHARDS[0]):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=20)[1]
    assert (process.returncode, errors) == (1, "FAIL: interrupted\n")
    assert not list(cache.glob("token_ids/*"))


@given(text=st.text() | st.text(alphabet="naïve 中文 42 the <|reserved_0|>\r\n\t😀"))
def test_the_byte_lengths_of_a_texts_tokens_add_up_to_its_bytes_and_a_reserved_one_has_none(text):
    tokens, bos, lengths = TOKENIZER.encode(text), TOKENIZER.get_bos_token_id(), TOKENIZER.get_token_bytes("cpu")
    assert lengths[tokens].sum() == len(text.encode())
    assert lengths[bos:].tolist() == [0] * 4 and lengths.dtype == torch.int32
    assert TOKENIZER.decode(tokens) == text and all(token < bos for token in tokens)
    for prepend in (bos, "<|reserved_0|>"):
        assert TOKENIZER.encode([text, ""], prepend=prepend) == [[bos, *tokens], [bos]]


def test_a_million_blanks_in_a_row_are_encoded(hub, command):
    text = "before" + " \u3000" * 600_000 + "after"  # of one byte and of three
    hub.files[SHARDS[1]] = parquet([text])
    command()
    tokenizer, (tokens,) = prepare.Tokenizer.from_directory(), documents_of(SHARDS[1])
    assert tokenizer.encoding.decode_bytes(tokens[1:]) == text.encode()
    assert tokens == tokenizer.encode(text, prepend=tokenizer.get_bos_token_id())


def test_the_tokenizer_is_trained_on_the_first_characters_in_shard_order_each_document_capped(
        hub, command, cache, monkeypatch):
    monkeypatch.setitem(prepare.CONTRACTS, "climbmix", LIMITED)
    command()
    texts, chars = [], 0
    for text in [text for number in range(3) for text in some_texts(number)]:
        if chars < LIMITED.tokenizer_chars:
            texts.append(text[: LIMITED.tokenizer_doc_chars])
            chars += len(texts[-1])
    assert 200 < len(texts) < 400
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator(iter(texts), LIMITED.vocab_size - 4, pattern=prepare.SPLIT_PATTERN)
    ranks = tiktoken.load.load_tiktoken_bpe(str(cache / "tokenizer.tiktoken"))  # its own format
    assert ranks == {bytes(token): rank for token, rank in oracle.get_mergeable_ranks()}


def test_the_number_of_shards_is_remembered_and_changes_the_fingerprint_only_if_too_few_trained_the_tokenizer(
        hub, command, monkeypatch, tmp_path):
    monkeypatch.setitem(prepare.CONTRACTS, "climbmix", LIMITED)
    prints, notes = [], []
    for folder, number, there in (("one", "2", 2), ("one", None, 2), ("one", "-1", 3),  # all that exist
                                  ("other", "1", 1), ("other", "3", 3), ("other", "2", 3)):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / folder))
        said = command(*(["--num-shards", number] if number else []))
        notes.append(bool(re.search("(?s)note: .*fingerprint", said)))
        prints.append(prepare.fingerprint(LIMITED))
        names = {path.name for path in (LIMITED.folder / "parquet").iterdir()}
        assert names == {*SHARDS[:there], *SHARDS[3:]}
    assert notes[:4] == [False, False, False, True]
    monkeypatch.setitem(prepare.CONTRACTS, "climbmix", SMALL)  # of whose text there is no more
    assert "fingerprint" not in command("--num-shards", "3")
    assert prints[0] == prints[1] == prints[2] != prints[3] == prints[4] == prints[5]


def test_every_document_is_in_the_cache_once_in_order_as_tiktoken_encodes_it(hub, command, cache):
    odd = [*some_texts(5, 1000), None, "", "<|reserved_0|> é" * 3000, *some_texts(1, 500)]
    hub.files[SHARDS[1]] = parquet(odd)
    command()
    ranks = tiktoken.load.load_tiktoken_bpe(str(cache / "tokenizer.tiktoken"))
    assert list(ranks.values()) == list(range(len(ranks))) and 256 < len(ranks) <= 396
    oracle = tiktoken.Encoding("", pat_str=prepare.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for name, texts in zip(SHARDS, (some_texts(0), odd, *map(some_texts, (2, 3, 4)))):
        expected = [[len(ranks), *oracle.encode_ordinary(text or "")] for text in texts]
        assert documents_of(name) == expected


@pytest.mark.parametrize("ranges", [True, False])
def test_a_bar_on_a_terminal_changes_nothing_that_is_written_and_ends_at_the_bytes(
        ranges, hub, ends_well, shards, monkeypatch):
    """A bar says in what `update` returns whether it was drawn: here it is, every time."""
    bar, always, bars = tqdm.tqdm, dict(disable=False, delay=0, mininterval=0, miniters=1), []
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(bar(**options | always)) or bars[-1])
    hub.ranges, hub.acts[SHARDS[0]] = ranges, [acts.cut, acts.cut]
    assert "\rtokenize" in ends_well() and bars[0].n == sum(map(len, shards.values()))


def test_tinystories_rows_are_split_by_their_number(hub, command, cache, monkeypatch):
    contract = prepare.CONTRACTS["tinystories"]
    contract = dataclasses.replace(contract, vocab_size=300, max_seq_len=32, eval_tokens=32 * 8)
    monkeypatch.setitem(prepare.CONTRACTS, "tinystories", contract)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "tinystories")
    hub.files["tinystories_gpt4_clean.parquet"] = parquet([f"story {i} " for i in range(20_300)])
    command()
    tokenizer = prepare.Tokenizer.from_directory()
    x, _, _ = next(prepare.make_dataloader(tokenizer, 8, 32, "train", device="cpu"))
    for rows, start, stop in ((exam_rows("test"), 0, 10_000), (exam_rows("val"), 10_000, 20_000),
                              (x, 20_000, 20_300)):
        text = "".join(tokenizer.decode(row.tolist()) for row in rows)
        numbers = [int(number) for number in re.findall(r"story (\d+) ", text)]
        assert len(numbers) > 8 and start <= min(numbers) <= max(numbers) < stop


def test_a_split_too_short_for_the_exam_repeats_and_says_so_and_one_without_a_row_fails(
        hub, command, cache, tmp_path, monkeypatch):
    hub.files[SHARDS[4]] = parquet(some_texts(4)[:20])
    hub.files[SHARDS[1]] = parquet(pa.array([], pa.string()))
    assert "repeat" in command() and exam_rows("val").shape == (64, 33)
    next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 900, 32, "train", device="cpu"))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "other"))
    for texts in ["short"], [""] * 5000:  # of which the second has rows, of document starts alone
        put(prepare.active_contract()[0].folder, {SHARDS[3]: parquet(texts)})
        assert re.search("FAIL: the test text of climbmix is too short", command(code=1))
    put(prepare.active_contract()[0].folder, {SHARDS[3]: parquet(some_texts(3))})  # what a hand replaces is read
    command()


def test_the_demo_corpus_is_long_docstrings_once_each_split_by_module_and_written_alike_again(
        demo, command, tmp_path, monkeypatch):
    texts = [pq.read_table(demo / "demo" / "parquet" / f"{split}.parquet")["text"].to_pylist()
             for split in ("train", "val", "test")]
    everything = sum(texts, [])
    assert len(set(everything)) == len(everything) and min(map(len, everything)) >= 200
    train, val, test = (sum(len(text.encode()) for text in split) for split in texts)
    assert 10e6 < train + val + test < 16e6
    assert 0.07 < val / train < 0.25 and 0.07 < test / train < 0.25
    known = (torch.nn.Linear, torch.utils.data.DataLoader, np.linalg.qr, np.ma)
    assert {inspect.getdoc(one).strip() for one in known} <= {text.strip() for text in everything}
    assert all(list(map(len, split)) != sorted(map(len, split)) for split in texts)
    rows = exam_rows("val")  # no row comes twice
    assert rows.shape == (2**17 // 256, 257) and len(rows.unique(dim=0)) == len(rows)
    shutil.copytree(demo, tmp_path / "copy")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "copy"))
    train, val = (tmp_path / "copy" / "demo" / "parquet" / f"{name}.parquet" for name in ("train", "val"))
    shutil.copy(val, train)  # text of one's own
    val.unlink()
    command()
    assert pq.read_table(train)["text"].to_pylist() == texts[1]
    before, after = state_of(demo / "demo"), state_of(tmp_path / "copy" / "demo")
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"parquet/train.parquet", "token_ids/train.parquet.bin"}
