"""Download, tokenizer and token cache: whatever goes wrong, the same command again ends with the one good cache.

The oracle of most tests is `good`: every byte of the cache that an undisturbed run leaves.
"""

import base64
import collections
import dataclasses
import errno
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
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
from conftest import ROOT, TINY, run, some_texts, write_shard
from hub import Hub, status
from hypothesis import given
from hypothesis import strategies as st

import prepare

SMALL = dataclasses.replace(TINY, name="climbmix")  # takes climbmix's place in the real command
SHARDS = [f"shard_{number:05d}.parquet" for number in range(5)]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # where the scripts below find what they import
CLI = """
import prepare, test_data
prepare.CONTRACTS["climbmix"] = test_data.SMALL
prepare.PATIENCE, prepare.WORKER_BYTES = 0.6, 1
prepare.run_main(prepare.main)
"""


def cache_state(folder: Path) -> dict[str, object]:
    """Every file of a contract's cache folder with its hash, the manifest as values; the lock and *.bad left out."""
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
              for path in folder.rglob("*") if path.is_file() and path.name != "lock" and path.suffix != ".bad"}
    return hashes | {"manifest.json": json.loads((folder / "manifest.json").read_text())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, bytes]:
    """The files of SMALL as the hub serves them."""
    folder = tmp_path_factory.mktemp("shards")
    for number, name in enumerate(SHARDS):
        write_shard(folder / name, some_texts(number))
    return {name: (folder / name).read_bytes() for name in SHARDS}


@pytest.fixture(scope="module")
def good(shards, tmp_path_factory) -> dict[str, object]:
    """State of the cache after an undisturbed run."""
    with pytest.MonkeyPatch.context() as patch, Hub(shards) as hub:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("good")))
        patch.setenv("HF_ENDPOINT", hub.url)
        prepare.prepare(SMALL)
        return cache_state(prepare.cache_dir() / "climbmix")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Folder of SMALL, which takes the place of climbmix; the downloader does not wait long."""
    monkeypatch.setitem(prepare.CONTRACTS, "climbmix", SMALL)
    monkeypatch.setattr(prepare, "PATIENCE", 0.6)
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    return tmp_path / "cache" / "climbmix"


@pytest.fixture
def workers(monkeypatch):
    """Processes tokenize also shards as small as these, which threads did for `good`."""
    monkeypatch.setattr(prepare, "WORKER_BYTES", 1)
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)


@pytest.fixture
def hub(shards, cache, monkeypatch):
    with Hub(shards) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def command(cache, monkeypatch, capsys):
    """The real command in this process: returns exit code and all it said. Another exception than SystemExit is what
    a user sees as a traceback, and fails the test."""
    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--contract", "climbmix", *arguments])
        code = 0
        try:
            prepare.run_main(prepare.main)
        except SystemExit as exit:
            code = exit.code
        said = "".join(capsys.readouterr())
        return (1, f"{said}{code}") if isinstance(code, str) else (code, said)
    return command


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------------------
# Faults of the network and of the server


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", [
    [status(500), status(503)], [status(429, Retry_After="0")], [acts.cut], [acts.cut] * 4, [acts.flip], [acts.stall],
    [acts.mute], [acts.web_page], [acts.cut, acts.flip, status(502)], [acts.cut, acts.wrong_range],
    [acts.cut, status(416)],
], ids=lambda fault: " ".join(act.__name__ for act in fault))
def test_a_passing_fault_is_survived_within_one_run(fault, ranges, hub, command, cache, good):
    hub.ranges = ranges
    hub.acts = {name: list(fault) if name in (SHARDS[0], SHARDS[4]) else [] for name in SHARDS}
    assert command()[0] == 0
    assert cache_state(cache) == good


def no_such_name(*arguments, **keywords):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("fault, said", [
    (status(404), "HTTP 404"), (status(401), "HF_TOKEN"), (status(500), "too many 500 error responses"),
    (acts.flip, "SHA-256 is"), (acts.cut, "broke off after"), (acts.mute, "Read timed out"), (acts.stall, "broke off"),
    (acts.web_page, "text/html"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_lasting_fault_names_the_file_and_why_and_the_next_run_ends_good(fault, said, hub, command, cache, good):
    hub.always[SHARDS[1]] = fault
    code, output = command()
    assert code == 1 and "FAIL: " in output and "same command again" in output and "ready" not in output
    reason = next(line for line in output.splitlines() if line.startswith(f"  {SHARDS[1]}: "))
    assert said in reason
    assert not (cache / "parquet" / SHARDS[1]).exists() and not (cache.parent / "active").exists()
    hub.always.clear()
    assert command()[0] == 0
    assert cache_state(cache) == good


def test_every_missing_file_is_named_with_its_own_reason(hub, command, cache):
    hub.always |= {SHARDS[0]: status(404), SHARDS[3]: acts.flip, SHARDS[4]: status(403)}
    output = command()[1]
    for name, said in ((SHARDS[0], "HTTP 404"), (SHARDS[3], "SHA-256"), (SHARDS[4], "HTTP 403")):
        assert any(name in line and said in line for line in output.splitlines())
    assert sorted(path.name for path in (cache / "parquet").glob("*.parquet")) == SHARDS[1:3]


@pytest.mark.parametrize("fault", ["refused", "no such name"])
def test_without_a_network_the_host_and_the_way_out_are_named(fault, command, cache, monkeypatch):
    host = f"127.0.0.1:{closed_port()}" if fault == "refused" else "hub.invalid"
    monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
    if fault == "no such name":
        monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    code, output = command()
    assert code == 1
    assert host in output and "prepare.py --contract demo" in output
    assert {"refused": "refused", "no such name": "not known"}[fault] in output


def test_a_network_that_goes_away_half_way_keeps_what_is_complete(hub, command, cache, good):
    down = [name for name in SHARDS if name != SHARDS[0]]
    hub.always = {name: acts.mute for name in down}
    code, output = command("--download-workers", "1")
    assert code == 1 and (cache / "parquet" / SHARDS[0]).exists()
    assert all(any(line.startswith(f"  {name}: ") for line in output.splitlines()) for name in down)
    hub.always.clear()
    assert command()[0] == 0
    assert len(hub.gets(SHARDS[0])) == 1
    assert cache_state(cache) == good


def test_retry_after_is_waited_for(hub, command, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.acts[SHARDS[2]] = [status(429, Retry_After="7")]
    assert command()[0] == 0
    assert slept.count(7) == 1


def test_a_break_is_resumed_by_range_from_the_last_whole_chunk(hub, command, shards):
    hub.acts[SHARDS[0]] = [acts.cut]
    command()
    first, second = hub.gets(SHARDS[0])
    came = len(shards[SHARDS[0]]) // 2 // prepare.CHUNK * prepare.CHUNK
    assert came > 5 * prepare.CHUNK and "Range" not in first and second["Range"] == f"bytes={came}-"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("left", [
    lambda body: body[:3000], lambda body: b"junk" * 700, lambda body: body, lambda body: body + b"more",
    lambda body: b"",
], ids=["half", "junk", "all", "too much", "nothing"])
def test_what_a_killed_process_left_is_gone_on_with_or_thrown_away(left, ranges, hub, command, cache, good, shards):
    hub.ranges = ranges
    (cache / "parquet").mkdir(parents=True)
    for number in (1, 2):
        (cache / "parquet" / f"{SHARDS[0]}.{number}-00.part").write_bytes(left(shards[SHARDS[0]]))
    assert command()[0] == 0
    asked = hub.gets(SHARDS[0])[0].get("Range")
    assert asked == (f"bytes={len(left(shards[SHARDS[0]]))}-" if left(b"x") else None)
    assert cache_state(cache) == good


@pytest.mark.parametrize("table, said", [
    ({"body": ["a", "b"]}, "no column `text` (columns: body)"), ({"text": [1, 2]}, "holds int64, not strings"),
])
def test_a_parquet_file_without_texts_is_refused_and_not_asked_for_again_and_again(table, said, hub, command, cache):
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink)
    hub.files[SHARDS[4]] = sink.getvalue()
    code, output = command()
    assert code == 1 and said in output
    assert len(hub.gets(SHARDS[4])) == 1 and not (cache / "parquet" / SHARDS[4]).exists()


def test_a_server_that_declares_neither_size_nor_hash_will_do(hub, command, cache, good):
    hub.head, hub.hashes = status(405), False
    hub.acts[SHARDS[0]] = [acts.cut]
    assert command()[0] == 0
    assert cache_state(cache) == good


def test_a_file_that_changed_at_the_source_is_reported_and_not_taken(hub, command, cache, good, shards):
    assert command()[0] == 0
    (cache / "parquet" / SHARDS[4]).unlink()
    hub.files[SHARDS[4]] = shards[SHARDS[3]]
    code, output = command()
    assert code == 1 and f"{SHARDS[4]}: changed at the source" in output and str(cache) in output
    assert not (cache / "parquet" / SHARDS[4]).exists()
    hub.files[SHARDS[4]] = shards[SHARDS[4]]
    assert command()[0] == 0
    assert cache_state(cache) == good


# ----------------------------------------------------------------------------------------------------------------------
# Mirror and token


def test_the_mirror_serves_everything_and_gets_the_token(hub, command, cache, good, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    code, output = command()
    assert code == 0 and "hf_secret" not in output
    assert cache_state(cache) == good
    assert {headers["Authorization"] for _, _, headers in hub.seen} == {"Bearer hf_secret"}


def test_a_redirect_to_another_host_is_followed_without_the_token_and_checked_by_the_hubs_hash(
        hub, command, cache, good, shards, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Hub(shards, hashes=False) as cdn:
        hub.cdn = cdn
        cdn.acts = collections.defaultdict(list, {SHARDS[0]: [acts.cut], SHARDS[1]: [acts.flip]})
        code, output = command()
    assert code == 0
    assert cache_state(cache) == good
    assert {headers["Authorization"] for _, _, headers in hub.seen} == {"Bearer hf_secret"}
    assert len(cdn.seen) == len(SHARDS) + 2 and not any("Authorization" in headers for _, _, headers in cdn.seen)
    assert "Range" in cdn.gets(SHARDS[0])[1]


def test_without_a_token_none_is_sent(hub, command):
    command()
    assert not any("Authorization" in headers for _, _, headers in hub.seen)


# ----------------------------------------------------------------------------------------------------------------------
# What is in the cache already


def test_a_complete_cache_is_left_alone_and_needs_no_server(hub, command, cache, monkeypatch):
    command()
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "lock"}
    requests = len(hub.seen)
    code, output = command()
    assert code == 0 and len(hub.seen) == requests
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.name != "lock"} == before


def damage(path: Path, how: str) -> None:
    body = path.read_bytes()
    middle = len(body) // 2
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": body[:middle], "longer": body + b"more",
                          "flipped": body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1 :]}[how])


@pytest.mark.parametrize("how", ["gone", "empty", "truncated", "longer"])
def test_a_damaged_file_of_any_kind_is_made_again(how, hub, command, cache, good):
    assert command()[0] == 0
    for name in good:
        if how == "longer" and name.endswith(".offsets"):
            continue  # the format has its own length: what follows is never read
        damage(cache / name, how)
        code, output = command()
        assert code == 0, (name, output)
        assert cache_state(cache) == good, name


@pytest.mark.parametrize("name", [SHARDS[0], SHARDS[4]])
def test_a_flipped_byte_of_a_parquet_file_is_seen_before_the_file_is_read(name, hub, command, cache, good):
    command()
    damage(cache / "parquet" / name, "flipped")
    next(cache.glob(f"tokens-*/{name}.tokens")).unlink()
    code, output = command()
    assert code == 0 and f"{name}: its SHA-256" in output
    assert cache_state(cache) == good


def test_a_flipped_byte_of_the_exam_or_the_tokenizer_is_repaired(hub, command, cache, good):
    command()
    for name in good:
        if name.endswith(("val.npy", "test.npy", ".tiktoken", "manifest.json")):
            damage(cache / name, "flipped")
            assert command()[0] == 0
            assert cache_state(cache) == good, name


def test_shards_put_there_by_hand_are_taken_without_a_network(command, cache, good, shards, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    (cache / "parquet").mkdir(parents=True)
    for name, body in shards.items():
        (cache / "parquet" / name).write_bytes(body)
    assert command()[0] == 0
    assert cache_state(cache) == good


@pytest.mark.parametrize("how", ["truncated", "without texts", "a broken page"])
def test_a_bad_shard_put_there_by_hand_is_named_and_replaced(how, hub, command, cache, good, shards, workers):
    path = cache / "parquet" / SHARDS[1]
    path.parent.mkdir(parents=True)
    body = shards[SHARDS[1]]
    if how == "truncated":
        path.write_bytes(body[:-100])
    elif how == "without texts":
        pq.write_table(pa.table({"story": ["a"]}), path)
    else:  # the footer is fine: only reading finds it
        path.write_bytes(body[:4] + b"\xff" * 40 + body[44:])
        code, output = command()
        assert code == 1 and str(path) in output and "same command again" in output
    code, output = command()
    assert code == 0
    assert how == "a broken page" or f"{path}: " in output
    assert cache_state(cache) == good


def test_text_that_is_no_utf8_is_a_broken_file_not_a_traceback(hub, command, cache, workers):
    sink = io.BytesIO()
    bad = pa.array([b"fine", b"\xff\xfe broken"] * 50, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), sink)
    hub.files[SHARDS[0]] = sink.getvalue()
    code, output = command()
    assert code == 1 and SHARDS[0] in output and "breaks off" in output


# ----------------------------------------------------------------------------------------------------------------------
# Disk


def test_too_little_disk_is_said_with_both_numbers_before_anything_is_downloaded(hub, command, monkeypatch):
    monkeypatch.setattr(prepare, "_remote_bytes", lambda session, url: 10**9)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3 * 10**9))
    code, output = command()
    assert code == 1 and "12.5 GB needed" in output and "3.0 GB free" in output and "--num-shards" in output
    assert not [request for request in hub.seen if request[0] == "GET"]


@pytest.mark.parametrize("quota", [0, 3_000, 60_000, 70_000, 75_000, 90_000, 120_000, 200_000])
def test_a_disk_that_fills_up_is_said_in_one_message_and_the_next_run_ends_good(
        quota, hub, command, cache, good, monkeypatch, workers):
    left = [quota]

    class Full(io.FileIO):
        def write(self, data) -> int:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def write_bytes(path: Path, data: bytes) -> None:
        with Full(path, "wb") as file:
            file.write(data)

    def open_(path, mode="r", *arguments, **keywords):
        return open(path, mode, *arguments, **keywords) if mode == "rb" else Full(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open", open_, raising=False)
        patch.setattr(Path, "write_bytes", write_bytes)
        code, output = command()
    assert left[0] < 0, "raise no quota above what a run writes"
    assert code == 1 and ("disk full" in output or "No space left" in output) and str(cache) in output
    assert not list(cache.rglob("*.tmp"))
    assert command()[0] == 0
    assert cache_state(cache) == good


def test_a_cache_that_cannot_be_written_is_one_line_that_names_it(command, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    code, output = command()
    assert code == 1 and str(tmp_path / "cache") in output and "AUTORESEARCH_CACHE" in output


# ----------------------------------------------------------------------------------------------------------------------
# Kills and company

# Forks from a process that has imported prepare, because the import takes longer than the work
KILLS = """
import os, random, signal, sys, time
import prepare, test_data

def start(hook=None):
    if pid := os.fork():
        return pid
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if hook:
            sys.addaudithook(hook)
        prepare.prepare(test_data.SMALL)
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)

def before_rename(number):
    renames = iter(range(99))
    def hook(event, arguments):
        if event == "os.rename" and next(renames) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    return hook

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

prepare.PATIENCE, prepare.WORKER_BYTES = 0.6, 1
mode, count = sys.argv[1], int(sys.argv[2])
if mode == "company":
    codes = [ended(pid) for pid in [start() for _ in range(count)]]
elif mode == "renames":
    codes = []
    while len(codes) < 100 and codes[-1:] != [0]:
        codes.append(ended(start(before_rename(1 + len(codes) % 3))))
else:
    draw, codes = random.Random(int(sys.argv[3])), []
    while codes.count(-signal.SIGKILL) < count:
        pid = start()
        time.sleep(draw.uniform(0, float(sys.argv[4])))
        os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid))
        if codes[-1] == 0:  # done before the kill: from the start
            import shutil; shutil.rmtree(prepare.cache_dir())
print(*codes)
"""


def in_processes(hub: Hub, *arguments: object) -> list[int]:
    """Run KILLS; returns the exit codes of its children, a negative one for a signal."""
    done = run("-c", KILLS, *map(str, arguments), HF_ENDPOINT=hub.url, PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_prepare_at_once_end_with_one_good_cache(count, hub, cache, good):
    assert in_processes(hub, "company", count) == [0] * count
    assert cache_state(cache) == good
    assert all(len(hub.gets(name)) == 1 for name in SHARDS)


def test_a_kill_just_before_a_file_gets_its_name_is_made_good_by_the_next_run(hub, cache, good):
    codes = in_processes(hub, "renames", 0)
    assert 10 < len(codes) < 100 and set(codes[:-1]) == {-9} and codes[-1] == 0
    assert cache_state(cache) == good


def test_kills_at_random_moments_leave_nothing_that_is_taken_for_data(hub, command, cache, good):
    hub.pace = 0.01
    codes = in_processes(hub, "random", 22, 1, 0.7)
    assert codes.count(-9) == 22 and set(codes) <= {-9, 0}
    hub.pace = 0.0
    assert command()[0] == 0
    assert cache_state(cache) == good
    assert not [path for path in cache.rglob("*") if path.suffix in (".tmp", ".part")]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads tokenize")
# Workers say when they begin, and are slow
SLOW = CLI.replace("prepare.run_main", """
documents = prepare.Tokenizer.documents

def slowly(tokenizer, texts):
    print("working", flush=True)
    time.sleep(0.5)
    return documents(tokenizer, texts)

prepare.Tokenizer.documents = slowly
prepare.run_main""").replace("import ", "import time, ")


@on_linux
@pytest.mark.parametrize("kill, code, said", [(signal.SIGKILL, -9, ""), (signal.SIGINT, 1, "FAIL: interrupted\n")])
def test_no_worker_outlives_its_parent_or_says_a_word_of_its_own(kill, code, said, hub, command, cache, good):
    environment = os.environ | dict(PYTHONPATH=PYTHONPATH, AUTORESEARCH_CONTRACT="climbmix", HF_ENDPOINT=hub.url)
    with subprocess.Popen([sys.executable, "-c", SLOW], env=environment, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.stdout.readline() != "working\n":
            pass
        if kill == signal.SIGKILL:
            process.kill()
        else:  # as the terminal does, to all of them
            os.killpg(process.pid, kill)
        _, errors = process.communicate(timeout=10)  # ends when nobody holds the other end of its pipes
    assert (process.returncode, errors) == (code, said)
    assert command()[0] == 0
    assert cache_state(cache) == good


@on_linux
def test_a_worker_that_is_killed_is_one_line_and_the_next_run_ends_good(
        hub, command, cache, good, workers, monkeypatch):
    here = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Tokenizer, "documents",
                      lambda tokenizer, texts: os.getpid() == here or os.kill(os.getpid(), signal.SIGKILL))
        code, output = command()
    assert code == 1 and output.splitlines()[-1].startswith("FAIL: a worker process died")
    assert not multiprocessing.active_children() and not list(cache.rglob("*.tmp"))
    assert command()[0] == 0
    assert cache_state(cache) == good


@on_linux
def test_a_fork_that_fails_is_one_line(command, cache, good, hub, workers, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", lambda: exec("raise BlockingIOError(11, 'Resource temporarily unavailable')"))
        code, output = command()
    assert code == 1 and "Resource temporarily unavailable" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("FAIL: ") and not list(cache.rglob("*.tmp"))
    assert command()[0] == 0
    assert cache_state(cache) == good


def test_the_real_command_says_what_failed_without_a_traceback_and_does_not_flood_a_log(shards, tmp_path):
    environment = dict(PYTHONPATH=PYTHONPATH, AUTORESEARCH_CONTRACT="climbmix")
    done = run("-c", CLI, HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}", **environment)
    assert done.returncode == 1 and done.stderr.startswith("FAIL: cannot reach 127.0.0.1:")
    assert "Traceback" not in done.stderr + done.stdout
    with Hub(shards) as hub:
        done = run("-c", CLI, HF_ENDPOINT=hub.url, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout and len(done.stdout.splitlines()) < 15
    assert "5 files to get from 127.0.0.1:" in done.stdout and "download: 5/5 files" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Progress


def shown(monkeypatch, capsys, seconds: float, live: bool) -> str:
    clock = itertools.count(0, 0.01)
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: live, raising=False)
    progress = prepare.Progress("reading", 1000, "MB")
    while next(clock) < seconds:
        progress.add(0.1)
    progress.close()
    return capsys.readouterr().out


def test_a_log_file_gets_a_progress_line_after_two_seconds_and_then_every_ten(monkeypatch, capsys):
    assert len(shown(monkeypatch, capsys, 1.5, live=False).splitlines()) == 1
    assert len(shown(monkeypatch, capsys, 2.5, live=False).splitlines()) == 2
    output = shown(monkeypatch, capsys, 61, live=False)
    assert "\r" not in output and len(output.splitlines()) == 7
    assert "MB/s" in output and "s left" in output


def test_a_terminal_gets_one_live_line(monkeypatch, capsys):
    output = shown(monkeypatch, capsys, 61, live=True)
    assert output.count("\n") == 1 and 100 < output.count("\r") < 400


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def tokenizer(shards, tmp_path_factory) -> prepare.Tokenizer:
    with pytest.MonkeyPatch.context() as patch, Hub(shards) as hub:
        patch.setenv("AUTORESEARCH_CACHE", str(tmp_path_factory.mktemp("tokenizer")))
        patch.setenv("HF_ENDPOINT", hub.url)
        prepare.prepare(SMALL)
        tokenizer = prepare.Tokenizer.from_directory(prepare.cache_dir() / SMALL.name)
    tokenizer.lengths = tokenizer.get_token_bytes()
    return tokenizer


@given(text=st.text() | st.text(alphabet="naïve 中文 42 the <|reserved_0|>\r\n\t😀"))
def test_the_byte_lengths_of_a_texts_tokens_add_up_to_its_bytes(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.lengths[tokens].sum() == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert all(token < tokenizer.get_bos_token_id() for token in tokens)
    document, = tokenizer.documents([text])
    assert document.dtype == np.uint16 and document.tolist() == [tokenizer.get_bos_token_id(), *tokens]


def test_a_token_that_is_part_of_a_character_counts_its_own_bytes_and_a_reserved_one_none(tokenizer):
    tokens = tokenizer.encode("😀")
    assert len(tokens) > 1  # no merge for it: several tokens, none of which decodes alone
    assert tokenizer.lengths[tokens].tolist() == [len(tokenizer.encoding.decode_bytes([token])) for token in tokens]
    assert tokenizer.lengths[tokenizer.get_bos_token_id() :].tolist() == [0] * 4
    assert tokenizer.get_vocab_size() == len(tokenizer.lengths) == tokenizer.get_bos_token_id() + 4


def test_the_tokenizer_file_is_tiktokens_own_format(hub, command, cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    command()
    ranks = tiktoken.load.load_tiktoken_bpe(str(cache / "tokenizer.tiktoken"))
    oracle = tiktoken.Encoding("oracle", pat_str=prepare.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer, text = prepare.Tokenizer.from_directory(prepare.cache_dir() / SMALL.name), " ".join(some_texts(7))
    assert tokenizer.encode(text) == oracle.encode(text)
    bos = tokenizer.get_bos_token_id()
    assert list(ranks.values()) == list(range(bos)) and 256 < bos <= SMALL.vocab_size - 4
    assert prepare.Tokenizer(ranks).digest() == tokenizer.digest()


@pytest.mark.parametrize("body", [b"not base64 at all\n", b"YQ== 0\nYQ==", b"\x80\x81", b"YQ== one\n"])
def test_a_damaged_tokenizer_file_is_named_with_the_remedy(body, cache):
    cache.mkdir(parents=True)
    (cache / "tokenizer.tiktoken").write_bytes(body)
    with pytest.raises(prepare.Failure, match="tokenizer.tiktoken is damaged.*prepare.py"):
        prepare.Tokenizer.from_directory(prepare.cache_dir() / SMALL.name)


LIMITED = dataclasses.replace(SMALL, tokenizer_chars=40_000, tokenizer_doc_chars=500)  # two shards hold them


def test_the_tokenizer_is_trained_on_the_first_characters_in_shard_order_each_document_capped(hub, cache):
    prepare.prepare(LIMITED, 3)
    texts, chars = [], 0
    for text in [text for number in range(3) for text in some_texts(number)]:
        if chars < LIMITED.tokenizer_chars:
            texts.append(text[: LIMITED.tokenizer_doc_chars])
            chars += len(texts[-1])
    assert 200 < len(texts) < 400
    oracle = rustbpe.Tokenizer()
    oracle.train_from_iterator(iter(texts), LIMITED.vocab_size - 4, pattern=prepare.SPLIT_PATTERN)
    lines = (cache / "tokenizer.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    assert ranks == {bytes(token): rank for token, rank in oracle.get_mergeable_ranks()}


def test_the_exam_does_not_depend_on_how_many_shards_there_are(hub, cache, monkeypatch, tmp_path, capsys):
    prints = set()
    for count in (2, 3):
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / str(count)))
        prepare.prepare(LIMITED, count)
        prints.add(prepare.fingerprint(LIMITED))
    assert len(prints) == 1 and "note: the tokenizer" not in capsys.readouterr().out


def test_too_few_shards_for_the_tokenizer_are_said_and_more_shards_later_leave_the_exam_alone(
        hub, cache, monkeypatch, tmp_path, capsys):
    prepare.prepare(LIMITED, 3)
    usual = prepare.fingerprint(LIMITED)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "other"))
    prepare.prepare(LIMITED, 1)
    output, unusual = capsys.readouterr().out, prepare.fingerprint(LIMITED)
    assert unusual != usual and "the fingerprint is not the usual one" in " ".join(output.split())
    for count in (3, 2, None, 1):
        prepare.prepare(LIMITED, count)
        assert prepare.fingerprint(LIMITED) == unusual
        assert "not the usual one" in capsys.readouterr().out
    assert prepare.Manifest(LIMITED).data["shards"] == 1


def test_num_shards_is_remembered_and_minus_one_means_all(hub, command, cache):
    assert command("--num-shards", "1")[0] == 0
    assert sorted(path.name for path in (cache / "parquet").iterdir()) == [SHARDS[0], *SHARDS[3:]]
    assert command()[0] == 0 and prepare.Manifest(SMALL).data["shards"] == 1
    assert command("--num-shards", "-1")[0] == 0 and prepare.Manifest(SMALL).data["shards"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Token cache


def texts_of(contract: prepare.Contract, parts: list) -> list[str]:
    tokenizer = prepare.Tokenizer.from_directory(prepare.cache_dir() / contract.name)
    documents = list(prepare.Documents(prepare.Manifest(contract), parts))
    assert all(document[0] == tokenizer.get_bos_token_id() for document in documents)
    return [tokenizer.decode(document[1:].tolist()) for document in documents]


def test_every_document_of_every_shard_is_in_the_token_cache_once_and_in_order(hub, command, cache):
    command()
    assert texts_of(SMALL, SMALL.train(3)) == [text for number in range(3) for text in some_texts(number)]
    assert texts_of(SMALL, [SMALL.val]) == some_texts(4) and texts_of(SMALL, [SMALL.test]) == some_texts(3)


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_any_number_of_processes_writes_the_tokens_that_tiktoken_gives_one_by_one(cores, cache, workers, monkeypatch):
    here, documents = os.getpid(), prepare.Tokenizer.documents

    def elsewhere(tokenizer, texts):
        assert (os.getpid() == here) == (cores == 1 or sys.platform != "linux")
        time.sleep(random.random() / 50)  # they overtake each other
        return documents(tokenizer, texts)

    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(prepare.Tokenizer, "documents", elsewhere)
    texts = [*some_texts(0, 3000), None, "", "<|reserved_0|> é" * 3000, *some_texts(1, 500)]
    write_shard(cache / "parquet" / "shard.parquet", texts)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b" th": 257, b" the": 258}
    manifest = prepare.Manifest(SMALL)
    manifest.update(tokenizer="0" * 8)
    prepare._tokenize(prepare.Tokenizer(ranks), "shard.parquet", manifest)
    oracle = tiktoken.Encoding("oracle", pat_str=prepare.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    expected = [[259, *oracle.encode_ordinary(text or "")] for text in texts]
    tokens = np.fromfile(manifest.derived("shard.parquet.tokens"), dtype=np.uint16)
    assert tokens.tolist() == list(itertools.chain.from_iterable(expected))
    offsets = np.load(manifest.derived("shard.parquet.offsets"))
    assert offsets.dtype == np.int64 and offsets.tolist() == [0, *itertools.accumulate(map(len, expected))]


def test_empty_and_missing_texts_are_documents_of_one_token(hub, command, cache, shards):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "", None, "two"], "other": [1, 2, 3, 4]}), sink)
    hub.files[SHARDS[1]] = sink.getvalue()
    assert command()[0] == 0
    assert texts_of(SMALL, [(SHARDS[1], 0, None)]) == ["one", "", "", "two"]


def test_tinystories_rows_are_split_by_their_number(cache, hub, monkeypatch):
    contract = dataclasses.replace(prepare.CONTRACTS["tinystories"], vocab_size=300, max_seq_len=32, eval_tokens=32 * 8)
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"story {row}" for row in range(20_300)]}), sink)
    hub.files["tinystories_gpt4_clean.parquet"] = sink.getvalue()
    prepare.prepare(contract)
    assert [name for _, name, _ in hub.seen] == ["tinystories_gpt4_clean.parquet"] * 2
    for parts, rows in (([contract.test], range(10_000)), ([contract.val], range(10_000, 20_000)),
                        (contract.train(1), range(20_000, 20_300))):
        assert texts_of(contract, parts) == [f"story {row}" for row in rows]


def test_a_split_too_short_for_the_exam_repeats_and_says_so_and_one_without_a_row_fails(hub, command, cache):
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": some_texts(4)[:20]}), sink)
    hub.files[SHARDS[4]] = sink.getvalue()
    code, output = command()
    assert code == 0 and "they repeat" in output
    assert len(np.load(next(cache.glob("tokens-*/val.npy")))) == SMALL.eval_tokens // SMALL.max_seq_len
    pq.write_table(pa.table({"text": ["short"]}), sink := io.BytesIO())
    hub.files[SHARDS[3]] = sink.getvalue()
    for path in (cache / "parquet" / SHARDS[3], cache / "manifest.json", *cache.glob("tokens-*/*")):
        path.unlink()
    code, output = command()
    assert code == 1 and "the test text of climbmix is too short" in output


# ----------------------------------------------------------------------------------------------------------------------
# Demo corpus


def test_the_demo_corpus_is_long_docstrings_once_each_split_by_module(demo):
    texts = {split: pq.read_table(demo / "demo" / "parquet" / f"{split}.parquet")["text"].to_pylist()
             for split in ("train", "val", "test")}
    everything = [text for split in texts.values() for text in split]
    assert len(set(everything)) == len(everything) and min(map(len, everything)) >= 200
    size = sum(len(text.encode()) for text in everything)
    assert 10e6 < size < 16e6
    for split in ("val", "test"):
        assert 0.05 < sum(len(text.encode()) for text in texts[split]) / size < 0.2
    for known in (torch.nn.Linear, torch.utils.data.DataLoader, np.linalg.svd, np.ma):  # what Python itself shows
        assert inspect.getdoc(known).strip() in map(str.strip, everything)


def test_the_demo_exam_holds_no_row_twice(demo):
    rows = np.load(next((demo / "demo").glob("tokens-*/val.npy")))
    assert rows.shape == (prepare.CONTRACTS["demo"].eval_tokens // 256, 257)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_the_docstring_corpus_is_the_same_when_written_again_and_a_changed_one_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PACKAGES", ("networkx",))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        prepare._write_docstrings(tmp_path / folder)
    written = [{path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert written[0] == written[1] and sorted(written[0]) == ["test.parquet", "train.parquet", "val.parquet"]
    contract = prepare.CONTRACTS["demo"]
    manifest = prepare.Manifest(contract)
    prepare._get_files(contract, sorted(written[0]), manifest, 1)
    assert {name: manifest.parquet(name).read_bytes() for name in written[0]} == written[0]
    manifest.parquet("val.parquet").unlink()
    monkeypatch.setattr(prepare, "PACKAGES", ("networkx", "filelock"))
    monkeypatch.setattr(prepare, "MIN_DOCSTRING", 100)
    with pytest.raises(prepare.Failure, match="changed"):
        prepare._get_files(contract, sorted(written[0]), manifest, 1)
