"""Fixtures: every test gets a cache of its own; `tiny` is a contract prepared in no time, `demo` the real one."""

import copy
import dataclasses
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is there: waiting threads sleep

import numpy as np  # noqa: I001
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import prepare
import train

torch.set_num_threads(1)  # tensors as small as the tests' only wait for one another
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so its children
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY = dataclasses.replace(
    prepare.CONTRACTS["climbmix"], name="tiny", train_files=3,
    val=("shard_00004.parquet", 0, None), test=("shard_00003.parquet", 0, None),
    vocab_size=400, max_seq_len=32, time_budget=1.0, eval_tokens=64 * 32,
)


def pytest_collection_modifyitems(items: list) -> None:
    """Of two workers none waits at the end for one long test: the longest go first."""
    items.sort(key=lambda item: item.path.stem not in ("test_docs", "test_scale", "test_windows"))


@pytest.fixture
def parts(monkeypatch):
    """Whatever train.compile_parts replaces is as it was after the test."""
    for owner in (train.Block, train.GPT):
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function):
                monkeypatch.setattr(owner, name, function)


@pytest.fixture
def compilations(monkeypatch, parts):
    """A counter of what torch.compile compiles; nothing is there at the beginning, and nothing stays."""
    from torch._dynamo.testing import CompileCounter  # takes a second

    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile(*args, **options, backend=counter))
    yield counter
    torch._dynamo.reset()


def write_shards(folder: Path, texts) -> None:
    """The five shards of TINY, in the layout of climbmix; texts(number) are those of a shard."""
    (folder / "parquet").mkdir(parents=True)
    for number in range(5):
        path = folder / "parquet" / f"shard_{number:05d}.parquet"
        pq.write_table(pa.table({"text": texts(number)}), path, row_group_size=50)


def some_texts(seed: int, count: int = 200) -> list[str]:
    """English-like documents of very different lengths, the same for the same seed."""
    words = "the of and to in a model token loss step data with for is on byte learns quickly, naïve 中文 42".split()
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.choice((1, 5, 20, 60, 200)))) for _ in range(count)]


def run(*command: str, cwd: Path = ROOT, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run a Python command of the repo (`run("train.py", SEED="1")`) in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SEED"))}
    return subprocess.run([sys.executable, *command], cwd=cwd, timeout=timeout, capture_output=True, text=True,
                          env=environment | env)


def commit(folder: Path, *files: tuple[str, str]) -> None:
    """A git repository with these files, (name, text), in one commit."""
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all", "--no-gpg-sign"]):
        subprocess.run([*git, *command], cwd=folder, check=True)


def smaller(train_py: str) -> str:
    """The text of train.py with a model that costs little on a CPU."""
    return re.sub(r"(?m)^(DEPTH|BIGRAM_ROWS) = .*", r"\1 = 1", train_py)


def state_of(folder: Path) -> dict[str, str]:
    """Every file of a contract's cache folder with its hash; without the lock."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def folder() -> Path:
    """Where the active contract's files are."""
    return prepare.active_contract()[0].folder


def exam_rows(split: str = "val") -> torch.Tensor:
    """The exam of the active contract, int64 (rows, T + 1)."""
    tokens = np.fromfile(folder() / f"{split}.bin", dtype=np.uint16).astype(np.int64)
    return torch.from_numpy(tokens.reshape(-1, prepare.MAX_SEQ_LEN + 1))


def documents_of(name: str) -> list[list[int]]:
    """The tokens of every document of a parquet file of the active contract, in order."""
    tokens = np.fromfile(folder() / "token_ids" / f"{name}.bin", dtype=np.uint16)
    bos = prepare.Tokenizer.from_directory().get_bos_token_id()
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == bos))[1:]]


def evidence(folder: Path = Path()) -> list[dict]:
    """The lines of runs.jsonl."""
    file = folder / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


forget = prepare.active_contract.cache_clear  # the contract is chosen anew, as in a new process


@pytest.fixture
def command(monkeypatch, capsys):
    """`prepare.py ARGUMENTS` in this process, which has to end with this exit code; returns all it said.

    Another exception than SystemExit is what a user sees as a traceback, and fails the test.
    """
    def command(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
        forget()
        capsys.readouterr()
        seen, message = 0, ""
        try:
            prepare.run_main(prepare.main)
        except SystemExit as exit:  # a text is printed, and the code is 1
            seen, message = (1, f"{exit.code}\n") if isinstance(exit.code, str) else (exit.code, "")
        said = "".join(capsys.readouterr()) + message
        assert seen == code, said
        return said
    return command


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """No test sees the user's cache, environment or folder, a network, or what another test left."""
    torch.manual_seed(0)
    for name in list(os.environ):
        if name.startswith(("AUTORESEARCH_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(prepare, "PATIENCE", 0.6)
    monkeypatch.setattr(prepare, "_RUN", copy.deepcopy(prepare._RUN))
    monkeypatch.setattr(train, "attention", train.attention_sdpa)
    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory) -> Path:
    """A cache with the contract TINY, prepared once per session."""
    cache = tmp_path_factory.mktemp("tiny-cache")
    write_shards(cache / "tiny", some_texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        prepare.prepare(TINY, 3)
    return cache


@pytest.fixture
def tiny(tiny_cache, tmp_path, monkeypatch):
    """A small contract with the shard layout of climbmix, active and prepared; returns its tokenizer."""
    monkeypatch.setitem(prepare.CONTRACTS, "tiny", TINY)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "tiny")
    forget()
    shutil.copytree(tiny_cache, tmp_path / "cache")
    return prepare.Tokenizer.from_directory()


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory) -> Path:
    """A cache with the demo contract, prepared by the real command; for all workers of a session."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo-cache"
    done = run("prepare.py", "--contract", "demo", AUTORESEARCH_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    return cache


@pytest.fixture
def demo(demo_cache, monkeypatch) -> Path:
    """The prepared demo contract is the active one; returns its cache."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(demo_cache))
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "demo")
    return demo_cache
