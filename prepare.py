"""
What is fixed: the contract, the data, the tokenizer, the loader, the metric and the evidence.

    uv run prepare.py [--contract NAME] [--num-shards N] [--download-workers N]

Makes everything that `train.py` needs in the cache (~/.cache/autoresearch, moved by AUTORESEARCH_CACHE);
run it again, and it makes what is missing. A file that has its name is whole. Of each contract:

    parquet/FILE.parquet    the text, downloaded or put there by hand
    tokenizer.tiktoken      the tokenizer
    tokens/FILE.parquet.bin the text as uint16 tokens; a document begins where the token is BOS
    val.bin, test.bin       the exams: packed rows of max_seq_len + 1 uint16 tokens
    SHA256SUMS, shards      of the tokenizer and the exams; how many training shards are in use

`evaluate_bpb` appends a line to runs.jsonl, beside the script that runs. Nobody edits this file during
research: that makes runs incomparable, and the fingerprint or the hash in runs.jsonl shows it.
"""

import sys

if __name__ == "__main__":  # a profile.py beside this file, say, is not Python's own
    sys.path.append(sys.path.pop(0))

import argparse
import base64
import bisect
import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from urllib.parse import urlsplit

import filelock  # torch brings it, and kernels tqdm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
import tqdm
from urllib3.util import Retry

# --------------------------------------------------------------------------------------------------
# Contract: what makes two runs comparable

Part = tuple[str, int, int | None]  # of a parquet file: its name, first row, past the last row


@dataclasses.dataclass(frozen=True)
class Contract:
    """Everything that would make two val_bpb incomparable."""

    name: str
    dataset: str  # Hugging Face dataset, or DOCSTRINGS
    train_file: str  # parquet with a string column `text`; the shard number goes into the braces
    train_files: int  # how many of them exist
    train_rows: tuple[int, int | None]  # of each train file
    val: Part
    test: Part
    vocab_size: int  # tokens, the reserved ones included
    max_seq_len: int  # tokens of context
    time_budget: float  # seconds of training
    eval_tokens: int  # targets scored
    tokenizer_chars: int = 10**9  # characters the tokenizer is trained on, in shard order...
    tokenizer_doc_chars: int = 10_000  # ...of which at most so many of each document

    def train(self, shards: int) -> list[Part]:
        return [(self.train_file.format(i), *self.train_rows) for i in range(min(shards, self.train_files))]

    @property
    def folder(self) -> Path:
        return cache_dir() / self.name


DOCSTRINGS = "docstrings of the installed packages"
CONTRACTS = {
    "climbmix": Contract(
        name="climbmix", dataset="karpathy/climbmix-400b-shuffle",
        train_file="shard_{:05d}.parquet", train_files=6541, train_rows=(0, None),
        val=("shard_06542.parquet", 0, None), test=("shard_06541.parquet", 0, None),
        vocab_size=8192, max_seq_len=2048, time_budget=300, eval_tokens=40 * 2**19,
    ),
    "tinystories": Contract(
        name="tinystories", dataset="karpathy/tinystories-gpt4-clean",
        train_file="tinystories_gpt4_clean.parquet", train_files=1, train_rows=(20_000, None),
        val=("tinystories_gpt4_clean.parquet", 10_000, 20_000),
        test=("tinystories_gpt4_clean.parquet", 0, 10_000),
        vocab_size=4096, max_seq_len=512, time_budget=300, eval_tokens=4 * 2**19,
    ),
    "demo": Contract(
        name="demo", dataset=DOCSTRINGS,
        train_file="train.parquet", train_files=1, train_rows=(0, None),
        val=("val.parquet", 0, None), test=("test.parquet", 0, None),
        vocab_size=1024, max_seq_len=256, time_budget=60, eval_tokens=2**17,
    ),
}
DEFAULT_SHARDS = 10  # training shards; five minutes on one H100 read about half of them


class Failure(Exception):
    """An expected failure: its message is the whole story, one that a person can act on."""


class ExamError(Failure):
    """The metric refuses to score: the message names what was seen."""


def cache_dir() -> Path:
    try:
        return Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
    except RuntimeError:
        raise Failure("this user has no home directory; set AUTORESEARCH_CACHE to a folder") from None


@functools.cache
def active_contract(named: str | None = None) -> tuple[Contract, str]:
    """The contract in force and why: the first of these that says one."""
    remembered = cache_dir() / "active"
    choices = [
        (named, "--contract"),
        (os.environ.get("AUTORESEARCH_CONTRACT"), "AUTORESEARCH_CONTRACT is set"),
        (remembered.read_text().strip() if remembered.is_file() else None, "last prepared by name"),
        ("climbmix" if torch.cuda.is_available() else None, "torch sees a CUDA/ROCm device"),
        ("demo", "no CUDA/ROCm device, and nothing else prepared by name"),
    ]
    name, why = next((name, why) for name, why in choices if name)
    if name not in CONTRACTS:
        raise Failure(f"no contract is named {name!r} ({why}); use one of: {', '.join(CONTRACTS)}")
    contract = CONTRACTS[name]
    if seconds := os.environ.get("AUTORESEARCH_TIME_BUDGET"):
        if not re.fullmatch(r"\d*\.?\d+", seconds) or float(seconds) == 0:
            raise Failure(f"AUTORESEARCH_TIME_BUDGET is {seconds!r}; give seconds, a number above 0, or unset it")
        contract = dataclasses.replace(contract, time_budget=float(seconds))
        why += f", with AUTORESEARCH_TIME_BUDGET {seconds} s instead of {CONTRACTS[name].time_budget}"
    return contract, why


def active_split() -> str:
    """The exam's split: "val", or "test" for the human's final check (AUTORESEARCH_SPLIT=test)."""
    split = os.environ.get("AUTORESEARCH_SPLIT") or "val"
    if split not in ("val", "test"):
        raise Failure(f"AUTORESEARCH_SPLIT is {split!r}; use val or test, or unset it")
    return split


def __getattr__(name: str):
    """MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS and VOCAB_SIZE are the active contract's, when first asked for."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE"):
        return getattr(active_contract()[0], name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fingerprint(contract: Contract | None = None) -> str:
    """Contract's name and 8 hex digits of SHA-256 over its fields, the tokenizer and the packed validation rows."""
    contract = contract or active_contract()[0]
    sums = _noted_sums(contract)
    if "val.bin" not in sums:
        raise Failure(f"contract {contract.name} is not prepared; run: uv run prepare.py --contract {contract.name}")
    terms = [dataclasses.asdict(contract), sums["tokenizer.tiktoken"], sums["val.bin"]]
    return f"{contract.name}-{hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()[:8]}"


# --------------------------------------------------------------------------------------------------
# Files and progress


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """Give a file its name when it is whole. Writers hold the cache's lock, so the temporary name is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _noted_sums(contract: Contract) -> dict[str, str]:
    """{name: SHA-256} of the tokenizer and the exams as they were made, from SHA256SUMS."""
    try:
        lines = (contract.folder / "SHA256SUMS").read_text().splitlines()
        return {name: digest for digest, name in map(str.split, lines)}
    except (FileNotFoundError, ValueError):
        return {}


def _progress(label: str, total: float | None, unit: str) -> tqdm.tqdm:
    """A bar on a terminal; a log gets the line that announces the job."""
    if not sys.stdout.isatty():
        print(label, flush=True)
    return tqdm.tqdm(desc=label, total=total, unit=unit, unit_scale=True, file=sys.stdout, delay=0.5, disable=None)


# --------------------------------------------------------------------------------------------------
# Data: download from the hub, or the docstrings that are here already

# Seconds without a byte after which a connection counts as broken; pauses between attempts grow from a 60th of it
PATIENCE = 60
ATTEMPTS = 5  # at each file
PACKAGES = ("torch", "numpy", "sympy", "networkx")  # read for DOCSTRINGS
MIN_DOCSTRING = 200  # characters
# Text in three double quotes; what else could hold such quotes, other strings and comments, is skipped
DOCSTRING = r"""\"{3}((?:\\.|[^\\])*?)"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[^\n]*"""


def _download_all(contract: Contract, names: list[str], workers: int) -> None:
    """Download parquet files in parallel; raises Failure that names each one that is missing, and why."""
    folder = contract.folder / "parquet"
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url, host = f"{base}/datasets/{contract.dataset}/resolve/main/", _host(base)
    retry = Retry(total=ATTEMPTS, connect=3, read=1, backoff_factor=PATIENCE / 60,
                  status_forcelist=(429, 500, 502, 503, 504))
    os.environ["NETRC"] = os.devnull  # else requests sends what is in ~/.netrc, HF_TOKEN or not
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    if token := os.environ.get("HF_TOKEN", "").strip():  # redirects to other hosts do not get it
        if not re.fullmatch(r"[!-~]+", token):
            raise Failure("HF_TOKEN holds characters that no token has; set it again, or unset it")
        session.headers["Authorization"] = f"Bearer {token}"
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry, pool_maxsize=workers))
    print(f"{len(names)} files to get from {host}", flush=True)
    try:
        head = session.head(url + names[0], timeout=(min(10, PATIENCE), PATIENCE))
        size = int(head.headers.get("X-Linked-Size") or (head.ok and head.headers.get("Content-Length")) or 0)
    except requests.ConnectionError as error:
        raise Failure(f"cannot reach {host} ({_cause(error)}); nothing was downloaded.\n"
                      "No network? `uv run prepare.py --contract demo` needs none.") from error
    except (requests.RequestException, ValueError):
        size = 0  # it does not say
    need, free = size * len(names) * 5 / 2, shutil.disk_usage(folder).free  # tokens: 2 bytes for about 4.5 of text
    if need > free:
        raise Failure(f"not enough disk: about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free in {folder}. "
                      "Free some, ask for a smaller --num-shards, or move the cache with AUTORESEARCH_CACHE.")
    problems, stop = {}, threading.Event()
    label = f"download {size * len(names) / 1e6:,.0f} MB"
    with session, ThreadPoolExecutor(workers) as pool, _progress(label, size * len(names), "B") as bar:
        jobs = {pool.submit(_download, session, url + name, folder / name, bar, stop): name for name in names}
        try:
            for count, job in enumerate(as_completed(jobs), 1):
                bar.set_postfix_str(f"{count}/{len(names)} files")
                if error := job.exception():
                    problems[jobs[job]] = str(error)
                    if not isinstance(error, Failure):  # the disk, say: the other files would meet it too
                        stop.set()
        finally:
            stop.set()  # Ctrl-C: let the threads end
    if problems:
        raise Failure("\n".join([f"{len(problems)} of {len(names)} files are missing:",
                                 *(f"  {name}: {problems[name]}" for name in names if name in problems),
                                 "Run the same command again: what is complete is kept, what broke off goes on.",
                                 "No network? `uv run prepare.py --contract demo` needs none."]))


def _download(session: requests.Session, url: str, path: Path, bar: tqdm.tqdm, stop: threading.Event) -> None:
    """Fetch a parquet file: to FILE.part, on by Range after a break, checked, then renamed. Failure says why not."""
    part, why = path.with_name(f"{path.name}.part"), "stopped, because another file could not be written"
    for attempt in range(ATTEMPTS):
        if stop.wait(attempt and PATIENCE / 60 * 2**attempt):
            break
        start = part.stat().st_size if part.exists() else 0
        try:
            with session.get(url, headers={"Range": f"bytes={start}-"} if start else {}, stream=True,
                             timeout=(min(10, PATIENCE), PATIENCE)) as response:
                resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
                if response.status_code == 416 or (response.status_code == 206 and not resumed):
                    why = "the server refused to go on from what was there"
                    part.unlink()
                    continue
                if response.status_code >= 400:
                    hint = "; is HF_TOKEN right?" if response.status_code in (401, 403) else ""
                    raise Failure(f"HTTP {response.status_code} from {_host(response.url)}{hint}")
                tags = [r.headers.get("X-Linked-ETag", "").strip('"').lower() for r in (*response.history, response)]
                with open(part, "ab" if resumed else "wb") as file:
                    bar.update(start if resumed else 0)
                    for chunk in response.iter_content(2**16):
                        file.write(chunk)
                        bar.update(len(chunk))
                        if stop.is_set():
                            raise Failure("stopped, because another file could not be written")
        except requests.RequestException as error:
            why = f"{_host(url)}: {_cause(error)}"
            continue
        declared, digest = next((tag for tag in tags if len(tag) == 64), None), _sha256(part)
        try:
            if declared not in (None, digest):
                raise ValueError(f"SHA-256 is {digest[:12]}…, the server declares {declared[:12]}…")
            _check_text_column(pq.read_schema(part))
            return os.replace(part, path)
        except (pa.ArrowException, ValueError, OSError) as error:
            why = f"{response.headers.get('Content-Type', 'something')} came: {str(error).splitlines()[0][:120]}"
            part.unlink(missing_ok=True)
            if declared == digest:  # the source is like that
                break
    raise Failure(f"{why}; gave up after attempt {attempt + 1}")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]  # without a password


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests error, which wraps several."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return str(reason or error).split(": ", 1)[-1].split(" with url")[0][:200]  # a URL may hold a signature


def _check_text_column(schema: pa.Schema) -> None:
    """Raise ValueError unless a parquet file has texts."""
    if "text" not in schema.names:
        raise ValueError(f"no column `text` (columns: {', '.join(schema.names) or 'none'})")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"column `text` holds {kind}, not strings")


def _write_docstrings(folder: Path) -> None:
    """Write train, val and test.parquet from the docstrings of PACKAGES, shuffled and split by stable hashes."""
    print(f"reading the docstrings of {', '.join(PACKAGES)}", flush=True)
    split_of = {}
    for root in (Path(importlib.util.find_spec(package).origin).parent for package in PACKAGES):
        for path in sorted(root.rglob("*.py")):
            module = path.relative_to(root.parent).as_posix()
            if {"tests", "testing"} & set(module.split("/")):
                continue
            split = {0: "val", 1: "test"}.get(hashlib.sha256(module.encode()).digest()[0] % 10, "train")
            source = path.read_text(encoding="utf-8", errors="replace")
            for text in map(inspect.cleandoc, re.findall(DOCSTRING, source, re.DOTALL)):
                if len(text) >= MIN_DOCSTRING:
                    split_of.setdefault(text, split)
    for split in ("train", "val", "test"):
        texts = sorted((text for text in split_of if split_of[text] == split),
                       key=lambda text: hashlib.sha256(text.encode()).digest())
        pq.write_table(pa.table({"text": texts}), buffer := pa.BufferOutputStream())
        _write(folder / f"{split}.parquet", [buffer.getvalue()])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file of texts; a Failure names it if that is not so, or if reading it fails."""
    try:
        with pq.ParquetFile(path) as file:
            _check_text_column(file.schema_arrow)
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:  # no UTF-8 is a ValueError
        raise Failure(f"cannot read {path} ({str(error).splitlines()[0][:200]}). Replace it, or delete it and run "
                      "the same command again to get it anew") from error


def _texts(file: pq.ParquetFile, group: int) -> list[str]:
    """The documents of a row group."""
    column = file.read_row_group(group, columns=["text"], use_threads=False).column(0)
    return [text or "" for text in column.to_pylist()]


# --------------------------------------------------------------------------------------------------
# Tokenizer

# GPT-4's split pattern with numbers in groups of at most two digits: small vocabularies have no room for three
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = 4  # reserved tokens, numbered after the merges; the first is BOS


class Tokenizer:
    """BPE over bytes; `<|reserved_0|>` is BOS and begins every document. Text never encodes to a reserved token."""

    def __init__(self, ranks: dict[bytes, int]):
        specials = {f"<|reserved_{i}|>": len(ranks) + i for i in range(SPECIALS)}
        self.encoding = tiktoken.Encoding("autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                                          special_tokens=specials)
        self.tokens = sorted(ranks, key=ranks.get)  # raw bytes, in order of their numbers

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> "Tokenizer":
        """Read tokenizer.tiktoken of a folder, the active contract's by default."""
        path = Path(directory or active_contract()[0].folder) / "tokenizer.tiktoken"
        try:
            pairs = (line.split() for line in path.read_bytes().splitlines())
            return cls({base64.b64decode(token, validate=True): int(rank) for token, rank in pairs})
        except FileNotFoundError:
            raise Failure(f"no tokenizer at {path}; run: uv run prepare.py") from None
        except Exception as error:
            raise Failure(f"{path} is damaged ({error}); delete it and run: uv run prepare.py") from error

    def to_bytes(self) -> bytes:
        """tokenizer.tiktoken: per line a token's bytes in base64, and its rank."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.tokens))

    def digest(self) -> str:
        """SHA-256 of tokenizer.tiktoken, as SHA256SUMS notes it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list[int] | list[list[int]]:
        """Tokens of a text, or of each of a list; before them `prepend`, a token or a reserved one's name."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        first = self.encoding.encode_single_token(prepend) if isinstance(prepend, str) else prepend
        return [*([] if first is None else [first]), *self._encode(text).tolist()]

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a million blanks in a row are too many for the pattern
            pieces = [text[i : i + 10**5] for i in range(0, len(text), 10**5)]
            return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode(list(tokens))

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return len(self.tokens)

    def get_token_bytes(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Bytes that each token stands for, int32 (V,), from its raw bytes; 0 for the reserved ones."""
        return torch.tensor([*map(len, self.tokens), *[0] * SPECIALS], dtype=torch.int32, device=device)


def _train_tokenizer(contract: Contract, parts: list[Part]) -> Tokenizer:
    """Train on the first `tokenizer_chars` characters of the training text."""
    chars = 0

    def documents(name: str) -> Iterator[str]:
        with _opened(contract.folder / "parquet" / name) as file:
            for group in range(file.num_row_groups):
                yield from _texts(file, group)

    def texts() -> Iterator[str]:
        nonlocal chars
        for name, start, stop in parts:
            for text in itertools.islice(documents(name), start, stop):
                text = text[: contract.tokenizer_doc_chars]
                chars += len(text)
                bar.update(len(text))
                yield text
                if chars >= contract.tokenizer_chars:
                    return

    trainer = rustbpe.Tokenizer()
    with _progress("train the tokenizer", None, " characters") as bar:
        trainer.train_from_iterator(texts(), contract.vocab_size - SPECIALS, pattern=SPLIT_PATTERN)
    if chars < contract.tokenizer_chars and contract.train_files > len(parts):
        print(f"note: the tokenizer was trained on {chars:,} of {contract.tokenizer_chars:,} characters, because too "
              "few shards are there, so the fingerprint is not the usual one. The tokenizer stays as it is; to train "
              f"it anew, delete {contract.folder / 'tokenizer.tiktoken'}")
    return Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})


# --------------------------------------------------------------------------------------------------
# Tokens on disk, and packing


def _start_worker(folder: Path) -> None:
    """Load the tokenizer once; in a process of its own, leave Ctrl-C to the parent and end with it, however it ends."""
    global _tokenizer
    _tokenizer = Tokenizer.from_directory(folder)
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_group(path: Path, group: int) -> bytes:
    """The documents of a row group as uint16 tokens, each after its BOS."""
    bos = np.array([_tokenizer.get_bos_token_id()], dtype=np.uint16)
    with _opened(path) as file:
        pieces = [piece for text in _texts(file, group) for piece in (bos, _tokenizer._encode(text))]
    return np.concatenate([bos[:0], *pieces], dtype=np.uint16, casting="unsafe").tobytes()


def _tokenize(contract: Contract, name: str) -> None:
    """Encode a parquet file to its .bin, a row group at a time, on all cores that this process may use."""
    path = contract.folder / "parquet" / name
    with _opened(path) as file:
        groups = range(file.num_row_groups)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    target = contract.folder / "tokens" / f"{name}.bin"
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_progress(f"tokenize {name}", len(groups), " groups"))
        if min(cores, len(groups)) == 1:
            _start_worker(contract.folder)
            encoded = map(functools.partial(_encode_group, path), groups)
        else:  # a forked worker need not import torch first
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            pool = ProcessPoolExecutor(min(cores, len(groups)), context, _start_worker, (contract.folder,))
            encoded = stack.enter_context(pool).map(functools.partial(_encode_group, path), groups)
        _write(target, (tokens for tokens in encoded if not bar.update()))


def read_documents(contract: Contract, parts: list[Part], bos: int) -> Iterator[np.ndarray]:
    """The tokenized documents of some parts in dataset order, uint16, memory-mapped."""
    for name, start, stop in parts:
        path = contract.folder / "tokens" / f"{name}.bin"
        # Slices of the memmap class itself are several times slower
        tokens = np.asarray(np.memmap(path, np.uint16, "r")) if path.stat().st_size else np.empty(0, np.uint16)
        starts = np.flatnonzero(tokens == bos)
        stops = np.append(starts[1:], len(tokens))
        for begin, end in zip(starts[start:stop].tolist(), stops[start:stop].tolist()):
            yield tokens[begin:end]


def pack_rows(documents: Iterable[np.ndarray], length: int, buffer_size: int = 1000) -> Iterator[np.ndarray]:
    """Best-fit packing: yield rows of exactly `length` tokens, uint16, each of which begins with a document.

    Whenever the buffer holds fewer than `buffer_size` documents, the next 128 are read. A row takes the longest
    document that fits in what is left of it (the first that arrived among equals), again and again; when none
    fits, the shortest (first among equals) is cropped to fill it, and the rest of that one is thrown away. Ends
    when a finite stream cannot fill a row.

    Cropping throws away 21 % of the tokens of climbmix text (rows of 2049, 10,000 of them, n=1).
    """
    stream, arrivals = iter(documents), itertools.count()
    buffer: list[tuple[int, int, np.ndarray]] = []  # (length, arrival, document), sorted
    while True:
        row, filled = np.empty(length, dtype=np.uint16), 0
        while filled < length:
            while len(buffer) < buffer_size and (batch := list(itertools.islice(stream, 128))):
                for document in batch:
                    bisect.insort(buffer, (len(document), next(arrivals), document))
            if not buffer:
                return
            best = bisect.bisect_left(buffer, (length - filled + 1,))  # documents before it fit
            if best:
                best = bisect.bisect_left(buffer, buffer[best - 1][:1])  # the first of that length
            document = buffer.pop(best)[2][: length - filled]
            row[filled : filled + len(document)] = document
            filled += len(document)
        yield row


def _pack_exam(contract: Contract, split: str, bos: int) -> np.ndarray:
    """The exam of a split, uint16 (rows, T + 1): its first rows."""
    count, length = contract.eval_tokens // contract.max_seq_len, contract.max_seq_len + 1
    documents = read_documents(contract, [getattr(contract, split)], bos)
    rows = list(itertools.islice(pack_rows(documents, length), count))
    if not rows:
        raise Failure(f"the {split} text of {contract.name} is too short to fill one row of {length} tokens")
    if len(rows) < count:
        print(f"note: the {split} text fills {len(rows):,} of {count:,} rows; they repeat")
    return np.resize(np.stack(rows), (count, length))


def prepare(contract: Contract, shards: int | None = None, workers: int = 8) -> Tokenizer:
    """Make what is missing in the contract's cache folder, and return its tokenizer.

    `shards`: training shards; None keeps what was last prepared. One process at a time does this, others wait.
    """
    folder = contract.folder
    with _locked(folder):
        noted = folder / "shards"
        shards = shards or (int(noted.read_text()) if noted.exists() else DEFAULT_SHARDS)
        parts = contract.train(shards)
        names = list(dict.fromkeys(name for name, _, _ in [*parts, contract.val, contract.test]))
        (folder / "parquet").mkdir(exist_ok=True)
        missing = [name for name in names if not (folder / "parquet" / name).exists()]
        if missing and contract.dataset == DOCSTRINGS:
            _write_docstrings(folder / "parquet")
        elif missing:
            _download_all(contract, missing, workers)

        sums = _noted_sums(contract)
        made = ("tokenizer.tiktoken", "val.bin", "test.bin")
        for path in (folder / name for name in made):
            if path.name in sums and path.exists() and _sha256(path) != sums[path.name]:
                print(f"{path} is not what it was when it was made; making it again")
                path.unlink()
        if not (folder / "tokenizer.tiktoken").exists():  # what an older one made goes first
            for path in [*folder.glob("*.bin"), *folder.glob("tokens/*.bin")]:
                path.unlink()
            _write(folder / "tokenizer.tiktoken", [_train_tokenizer(contract, parts).to_bytes()])
        tokenizer = Tokenizer.from_directory(folder)
        for name in names:
            if not (folder / "tokens" / f"{name}.bin").exists():
                _tokenize(contract, name)
        for split in ("val", "test"):
            if not (folder / f"{split}.bin").exists():
                _write(folder / f"{split}.bin", [_pack_exam(contract, split, tokenizer.get_bos_token_id()).tobytes()])
        now = {name: _sha256(folder / name) for name in made}
        if now != sums:
            if sums:
                print("note: the tokenizer or the exam is not that of before; the fingerprint says so")
            _write(folder / "SHA256SUMS", [f"{digest}  {name}\n".encode() for name, digest in now.items()])
        if not noted.exists() or noted.read_text() != str(shards):
            _write(noted, [str(shards).encode()])
    return tokenizer


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`; the lock goes with its process, however that ends. OSError fails in a line."""
    lock = filelock.FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process is preparing {folder}; waiting for it", flush=True)
            lock.acquire()
        yield
    except BrokenProcessPool as error:
        raise Failure("a worker process died, perhaps of too little memory; run the same command again") from error
    except BrokenPipeError:  # stdout's
        raise
    except OSError as error:
        raise Failure(f"cannot read or write the cache {folder} ({error}). Free some disk, or move the cache with "
                      "AUTORESEARCH_CACHE; what is complete is kept.") from error
    finally:
        lock.release()


# --------------------------------------------------------------------------------------------------
# Loader


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, buffer_size: int = 1000,
                    device: str | torch.device | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield (x, y, epoch) for ever: int64 (B, T) on the device, y is x one token on; epoch counts passes, from 1.

    Rows are those of `pack_rows` over the split's documents, in an order that does not depend on B. Same cache,
    same rows. The tensors are the caller's to keep. The first batch of "train" begins the run: its evidence, and
    its watchdog, which `close()` ends.
    """
    contract = active_contract()[0]
    if tokenizer.digest() != _noted_sums(contract).get("tokenizer.tiktoken"):
        raise Failure(f"this is not the tokenizer that {contract.folder} was made with; run: uv run prepare.py")
    shards = int((contract.folder / "shards").read_text())
    parts = contract.train(shards) if split == "train" else [getattr(contract, split)]
    if split == "train":
        _RUN.begin()
    return _batches(contract, parts, tokenizer, B, T, buffer_size, torch.device(device or default_device()),
                    counted=split == "train")


def _batches(contract, parts, tokenizer, B, T, buffer_size, device, counted):
    epoch = 0

    def documents() -> Iterator[np.ndarray]:
        nonlocal epoch
        found = True
        while found:
            epoch, found = epoch + 1, False
            for document in read_documents(contract, parts, tokenizer.get_bos_token_id()):
                found = True
                yield document
        raise Failure(f"no documents in {', '.join(name for name, _, _ in parts)} of {contract.folder}")

    rows = pack_rows(documents(), T + 1, buffer_size)
    try:
        while True:
            if counted:
                _RUN.draw(B * T)
            batch = torch.from_numpy(np.stack(list(itertools.islice(rows, B))).astype(np.int64))
            if device.type == "cuda":  # torch uses a pinned block again only when the copies from it are done
                batch = batch.pin_memory().to(device, non_blocking=True)
            batch = batch.to(device)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), epoch
    finally:
        if counted:
            _RUN.rest()


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """Bytes of each token of the active contract's tokenizer, int32 (V,)."""
    return Tokenizer.from_directory().get_token_bytes(device)


def default_device() -> torch.device:
    """CUDA or ROCm, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# --------------------------------------------------------------------------------------------------
# Metric: the locked exam

# What all that a model must not know may be worth to it, in bits per byte, and how far it may move one target's
# log-probability, in nats. Rounding moves honest models too; tests/test_exam.py says by how much at most.
LEAK_BPB = 0.001
LEAK_NATS = 0.05


@torch.no_grad()
def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Return bits per byte: how many bits the model needs for a byte of the exam's text.

    That is the sum of -ln p over the exam's targets / (ln 2 * the bytes those targets stand for), so it compares
    across vocabularies. `model(x)` maps int64 (B, T) to logits (B, T, V); whatever loss it defines is not used.
    Reserved tokens are in neither sum. All eval_tokens targets are scored whatever the batch size. Log-softmax in
    float32, sums in float64 on the host.

    Rows are then scored again: unchanged; beside other rows, so that every two places of a batch are told apart;
    and with other tokens after a position, every position once. Raises ExamError where that moves a score, and for
    an exam or a tokenizer that is not the contract's. Appends a line to runs.jsonl.
    """
    contract, split = active_contract()[0], active_split()
    rows = load_exam(contract, split, tokenizer).to(_device_of(model))
    token_bytes = tokenizer.get_token_bytes(rows.device)
    places = torch.arange(batch_size, device=rows.device)
    # All batches have one size, so that they compile once: the last goes on with the first rows
    batches = [rows[(start + places) % len(rows)] for start in range(0, len(rows), batch_size)]
    with _evaluating(model):
        nll = [_nll(model, batch[:, :-1], batch[:, 1:], len(token_bytes)) for batch in batches]
        _refuse_leaks(_probes(model, batches, nll, token_bytes, cuts=contract.max_seq_len - 1,
                              halvings=(batch_size - 1).bit_length()))
    nll, weights = torch.cat(nll)[: len(rows)], token_bytes[rows[:, 1:]]
    if not nll.isfinite().all():
        raise ExamError("model(x) returned non-finite logits in one of its batches")
    bpb = nll.where(weights > 0, 0).cpu().double().sum().item() / (math.log(2) * weights.sum().item())
    _RUN.write_evidence(contract, split, bpb, rows.device)
    return bpb


@torch.no_grad()
def check_model(model: Callable, batch_size: int) -> None:
    """Try a sample of the exam's probes on rows drawn at random, cheap enough for warm-up. Raises ExamError.

    All calls have the exam's shape, so what does not fit into memory or does not compile fails here.
    """
    tokenizer = Tokenizer.from_directory()
    rows = load_exam(active_contract()[0], "val", tokenizer)
    batch = rows[torch.randint(len(rows), (batch_size,), generator=_dice())].to(_device_of(model))
    token_bytes = tokenizer.get_token_bytes(batch.device)
    with _evaluating(model):
        nll = _nll(model, batch[:, :-1], batch[:, 1:], len(token_bytes))
        _refuse_leaks(_probes(model, [batch], [nll], token_bytes, cuts=2 * batch_size, halvings=min(1, batch_size - 1)))


def load_exam(contract: Contract, split: str, tokenizer: Tokenizer) -> torch.Tensor:
    """The exam of a split, int32 (rows, T + 1); raises ExamError if it or the tokenizer is not the contract's."""
    path, sums = contract.folder / f"{split}.bin", _noted_sums(contract)
    if tokenizer.digest() != sums.get("tokenizer.tiktoken"):
        raise ExamError("the tokenizer is not the one the exam was packed with; use Tokenizer.from_directory()")
    if not path.is_file() or _sha256(path) != sums[path.name]:
        raise ExamError(f"{path} is not the exam that was packed (its SHA-256 differs); run: uv run prepare.py")
    rows = np.fromfile(path, dtype=np.uint16).reshape(-1, contract.max_seq_len + 1)
    return torch.from_numpy(rows.astype(np.int32))


def _probes(model: Callable, batches: list, nll: list, token_bytes: torch.Tensor, cuts: int, halvings: int):
    """Change what a model must not know; of each probe, yield (what moves it, nats, weights), the last two (n, T).

    batches: int (B, T + 1) each; nll: -ln p of their targets, (B, T) each. `cuts`: how many positions are tried,
    each in a row of its own; `halvings`: how often a batch is split in two, to tell places apart. Nats: how much
    less probable the targets got. Weights: their bytes, 0 for those that do not count.
    """
    (B, T), V, dice = nll[0].shape, len(token_bytes), _dice()

    def moves(number: int, changed: torch.Tensor) -> torch.Tensor:
        """Score a batch with other tokens where `changed`, (B, T)."""
        x, targets = batches[number][:, :-1], batches[number][:, 1:]
        others = (x + torch.randint(1, V, (B, T), generator=dice).to(x)) % V
        return _nll(model, torch.where(changed.to(x.device), others, x), targets, V) - nll[number]

    first = token_bytes[batches[0][:, 1:]]
    yield "has memory or is random", moves(0, torch.zeros(B, T, dtype=torch.bool)), first
    places = torch.randperm(B, generator=dice)
    for bit, side in itertools.product(range(halvings), (0, 1)):
        kept = (places >> bit) % 2 == side
        yield "mixes rows of a batch", moves(0, ~kept[:, None].expand(B, T))[kept], first[kept]
    positions, order, moved, weights = torch.arange(T), torch.randperm(T - 1, generator=dice), [], []
    for number, start in enumerate(range(0, cuts, B)):
        number, cut = number % len(batches), order[(start + torch.arange(B)) % (T - 1)][:, None]
        until, at = (mask.to(batches[0].device) for mask in (positions <= cut, positions == cut))
        moved.append(moves(number, ~until).where(until, 0))
        weights.append(token_bytes[batches[number][:, 1:]].where(at, 0))
    yield "sees the future", torch.cat(moved), torch.cat(weights)


def _refuse_leaks(probes: Iterable[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """Raise ExamError for the first probe that moves a target, or the score, further than it may."""
    for what, moved, weights in probes:
        moved, weights = moved.cpu().double(), weights.cpu()
        if not moved.isfinite().all():
            raise ExamError("model(x) returned non-finite logits")
        row, position = divmod(moved.abs().argmax().item(), moved.size(1))
        nats = moved[row, position].abs().item()
        worth = moved[weights > 0].sum().item() / (math.log(2) * max(weights.sum().item(), 1))
        if nats > LEAK_NATS or abs(worth) > LEAK_BPB:
            raise ExamError(f"the model {what}: the log-probability of a target moves by up to {nats:.3g} nats, at "
                            f"position {position} (limit {LEAK_NATS}), and the score by {worth:.4f} bits per byte "
                            f"(limit {LEAK_BPB})")


def _nll(model: Callable, x: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """-ln p of each target, float32 (B, T), of int x and targets (B, T); NaN if any logit is not finite."""
    logits = model(x.to(torch.int64, copy=True))  # x alone: no storage that holds the targets
    if not isinstance(logits, torch.Tensor) or logits.shape != (*x.shape, vocab_size):
        seen = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ExamError(f"model(x) returned {seen}; the exam needs logits of shape {(*x.shape, vocab_size)}")
    _RUN.alive = time.monotonic()
    # Row by row, because float32 logits of all rows would be a second tensor of that size
    nll = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, targets.long())]
    # A logit of -inf that is not the target's does not show in the loss
    return torch.stack(nll).where(logits.amin().isfinite(), math.nan)


@contextlib.contextmanager
def _evaluating(model: Callable) -> Iterator[None]:
    """Eval mode, and afterwards each module's mode as it was."""
    modes = [(module, module.training) for module in getattr(model, "modules", list)()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        _RUN.rest()


def _dice() -> torch.Generator:
    """Random numbers that nobody can foresee, and that leave torch's own as they are."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def _device_of(model: Callable) -> torch.device:
    parameters = model.parameters() if hasattr(model, "parameters") else ()
    return next((parameter.device for parameter in parameters), default_device())


# --------------------------------------------------------------------------------------------------
# Evidence and watchdog

HANG_SECONDS = 600  # without a batch drawn or scored


class _Run:
    """This process's run: begins with the first training batch, leaves a line in runs.jsonl for each score."""

    def __init__(self):
        self.began, self.alive, self.tokens, self.evaluations, self.facts = None, None, 0, 0, {}

    def begin(self) -> None:
        self.facts = self.facts or _facts()
        try:
            open(_evidence(), "a").close()
        except OSError as error:
            raise Failure(f"cannot write the record of this run, {_evidence()} ({error})") from error

    def draw(self, tokens: int) -> None:
        if self.began is None:
            self.began = time.monotonic()
            threading.Thread(target=self.watch, daemon=True).start()
        self.alive = time.monotonic()
        self.tokens += tokens

    def rest(self) -> None:
        self.alive = None

    def watch(self) -> None:
        """End a run that hangs, so that it does not stop the night: every thread's traceback, then the reason."""
        while time.monotonic() - (self.alive or time.monotonic()) < HANG_SECONDS:
            time.sleep(min(1, HANG_SECONDS / 4))
        faulthandler.dump_traceback(file=sys.__stderr__)
        print(f"FAIL: for {HANG_SECONDS} s no batch was drawn and none was scored: the run hangs where the tracebacks "
              "above say. If a step takes that long, make it smaller", file=sys.__stderr__, flush=True)
        os._exit(1)

    def write_evidence(self, contract: Contract, split: str, bpb: float, device: torch.device) -> None:
        self.evaluations += 1
        peak = peak_memory_mb(device)
        line = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **(self.facts or _facts()), "contract": fingerprint(contract), "split": split,
            "evaluation": self.evaluations, "bpb": bpb,
            "seconds": None if self.began is None else round(time.monotonic() - self.began, 1), "tokens": self.tokens,
            "peak_memory_mb": None if peak is None else round(peak, 1),
            "device": device_name(device), "torch": torch.__version__,
        }
        try:
            with open(_evidence(), "ab", buffering=0) as file:  # one write: lines of two runs do not mix
                file.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            print(f"note: {_evidence()} could not be written ({error}); its line is:\n{json.dumps(line)}")


_RUN = _Run()


HERE = Path(__file__).resolve().parent


def _script() -> Path | None:
    """The script that runs."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return Path(path).resolve() if path and os.path.isfile(path) else None


def _evidence() -> Path:
    """runs.jsonl: beside a script of this repo wherever it was started, else in the working directory."""
    script = _script()
    return (HERE if script and script.parent == HERE else Path.cwd()) / "runs.jsonl"


def _git(*arguments: str) -> str | None:
    """What git says in this repo, or None if it does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", "-C", HERE, *arguments], capture_output=True,
                              text=True, timeout=10, check=True).stdout.strip()


def _facts() -> dict:
    """What runs, as it is when the run begins: train.py may be edited meanwhile."""
    script, commit = _script(), _git("rev-parse", "HEAD")
    ours = commit and script and script.parent == HERE
    return {
        "commit": commit,
        "dirty": _git("rev-parse", f"HEAD:./{script.name}") != _git("hash-object", script.name) if ours else None,
        "script": script and script.name, "train_sha256": script and _sha256(script),
        "prepare_sha256": _sha256(Path(__file__)), "seed": torch.initial_seed(),
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; a kernel built on torch's stable ABI says only which allocating call failed."""
    signs = ("out of memory", '"aten::new_empty"', '"aten::empty')
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in signs)


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak allocation on a CUDA/ROCm device, elsewhere the process's peak resident set; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {device.type}, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------------------------------------
# Verdict


def verdict() -> str:
    """
    The keep rule of program.md for HEAD: its figures, and in the last line what follows from them.

    results.tsv of the working directory says which commit is the baseline and which the best (the last kept one), its
    runs.jsonl has the scores. They compare seed by seed: most of what a seed does, it does to every commit alike.
    """
    def read(name: str) -> list[str]:
        return Path(name).read_text("utf-8", "replace").splitlines() if os.path.isfile(name) else []

    def of(commit: str, seed: int, what: str = "bpb") -> list:
        return [run[what] for run in runs if (run["commit"], run["seed"]) == (commit, seed)]

    head, runs = _git("rev-parse", "--short=7", "HEAD"), []
    rows = [[cell.strip() for cell in line.split("\t")] for line in read("results.tsv") if line.count("\t") > 3]
    for line in read("runs.jsonl"):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # no line of ours, or cut off
            run = json.loads(line)
            if run["commit"] and not run["dirty"] and run["split"] == "val" and run.get("evaluation", 1) == 1:
                runs.append(run | {"commit": run["commit"][:7], "bpb": round(run["bpb"], 6),
                                   "peak_memory_mb": run["peak_memory_mb"] or 0})
    if not of(head, 42):
        return f"verdict: run SEED=42 (runs.jsonl has no such run of {head})"
    runs = [run for run in runs if run["contract"] == of(head, 42, "contract")[-1]]
    base = next((row[0] for row in reversed(rows) if row[4] == "baseline" and of(row[0], 42)), head)
    best = next((row[0] for row in reversed(rows) if row[3] == "keep" and of(row[0], 42)), base)
    missing = [f"SEED={seed}" for seed in (42, 43) for _ in range(2 - len(of(base, seed)))]
    if missing:
        return f"verdict: baseline: {len(missing)} more run{'s' * (len(missing) > 1)} of {base}: {', '.join(missing)}"

    runs = list(itertools.dropwhile(lambda run: run["commit"] != base, runs))  # this session's
    equal = [key for key in {(run["commit"], run["seed"]) for run in runs} if len(of(*key)) > 1]
    noise = 1.5 * max(max(of(*key)) - min(of(*key)) for key in equal)
    jitter = max(1 - min(of(*key, "tokens")) / max(of(*key, "tokens")) for key in equal)
    tokens = np.mean(of(head, 42, "tokens")) / np.mean(of(best, 42, "tokens")) - 1
    memory, free = max(of(head, 42, "peak_memory_mb")), 2 * max(of(base, 42, "peak_memory_mb"))
    change = [np.mean(of(head, seed)) - np.mean(of(best, seed))
              for seed in (42, 43) if of(head, seed) and of(best, seed)]
    mean = np.mean(change)
    added, removed = map(int, (_git("diff", "--numstat", best, head, "--", "train.py") or "0 0").split()[:2])
    # Under one seed: below `sure` keep, below `worth` run the other. Then keep if the mean of both is below `limit`
    sure, worth, limit = -noise, 0.0, -noise / 3
    if added - removed <= -10:  # less code may cost a little
        worth, limit = noise, noise / 3
    elif added - removed >= 20:  # much code has to gain more
        limit = -noise
    if memory > free:  # a bigger table always buys a little
        sure = worth = -10 * noise
    if head == best:
        word = "this is the best commit; go on with the next idea"
    elif change[0] < sure or (change[0] < worth and len(change) == 2 and mean < limit):
        word = "keep"
    elif change[0] >= worth or len(change) == 2:
        word = "discard"
    else:
        word = "run SEED=43" if of(best, 43) else f"run BEST under SEED=43 ({best}; after it, this one)"
    return f"""best {best}: SEED=42 {of(best, 42)}, SEED=43 {of(best, 43)}
HEAD {head}: SEED=42 {of(head, 42)}, SEED=43 {of(head, 43)}
noise: {noise:.6f}, 1.5 x the largest difference between equal runs (n = {len(equal)})
HEAD - best: {", ".join(f"{by:+.6f}" for by in change)}, mean {mean:+.6f}
limits: below {sure:+.6f} keep, below {worth:+.6f} run the other seed, then keep a mean below {limit:+.6f}
lines of code: +{added} -{removed}; memory: {memory:.0f} MB, free up to {free:.0f} MB
tokens trained: {tokens:+.1%}, equal runs differ by {jitter:.1%}{": SLOWER" if tokens < min(-0.05, -jitter) else ""}
verdict: {word}"""


# --------------------------------------------------------------------------------------------------
# Command line


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main; expected failures, Ctrl-C and a closed pipe end in one line or none, and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # in one log they keep their order, and no character stops a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
        sys.stdout.flush()
    except Failure as failure:
        sys.exit(f"FAIL: {failure}")
    except KeyboardInterrupt:
        sys.exit("FAIL: interrupted")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def describe(contract: Contract, why: str) -> str:
    """The first lines that prepare.py and train.py print."""
    lines = [f"contract: {contract.name} ({why}); cache: {contract.folder}", unseen_gpu()]
    return "\n".join(line for line in lines if line)


def unseen_gpu() -> str | None:
    """One line on a GPU that is here and torch does not see, and why; None if there is none such, or it is hidden."""
    hidden = any(os.environ.get(f"{name}_VISIBLE_DEVICES") in ("", "-1") for name in ("CUDA", "HIP", "ROCR"))
    if hidden or torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia"):
        gpu, needs, build = "An NVIDIA", "CUDA", torch.version.cuda
        why = "its driver is too old for that, or not loaded"
    elif os.path.exists("/dev/kfd"):
        gpu, needs, build = "An AMD", "ROCm", torch.version.hip
        why = "this user may not open /dev/kfd (groups render, video), or that supports no such card"
    else:
        return None
    problem = f"is built for {needs} {build}: {why}" if build else f"is built without {needs}"
    return f"{gpu} GPU is here but not used: torch {torch.__version__} {problem}; see README, Other machines"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare data, tokenizer and exam of a contract in the cache.")
    parser.add_argument("--contract", choices=list(CONTRACTS), help="prepare this one and remember it")
    parser.add_argument("--num-shards", type=int, metavar="N",
                        help=f"training shards, -1: all (default {DEFAULT_SHARDS}, or as many as last time)")
    parser.add_argument("--download-workers", type=int, default=8, metavar="N", help="files at a time (default 8)")
    parser.add_argument("--verdict", action="store_true", help="apply program.md's keep rule to HEAD, and nothing else")
    parser.print_usage = lambda file=None: None  # a bad value gets one line
    arguments = parser.parse_args()
    if arguments.verdict:
        return print(verdict())
    contract, why = active_contract(arguments.contract)
    print(describe(contract, why), flush=True)
    shards = contract.train_files if arguments.num_shards == -1 else arguments.num_shards
    if shards is not None and not 1 <= shards <= contract.train_files:
        parser.error(f"argument --num-shards: {shards}; {contract.name} has 1 to {contract.train_files}, or -1 for all")
    if not 1 <= arguments.download_workers <= 64:
        parser.error(f"argument --download-workers: {arguments.download_workers} is not a number from 1 to 64")
    start = time.monotonic()
    prepare(contract, shards, arguments.download_workers)
    if arguments.contract:
        _write(cache_dir() / "active", [contract.name.encode()])
        if os.environ.get("AUTORESEARCH_CONTRACT", contract.name) != contract.name:
            print(f"note: AUTORESEARCH_CONTRACT={os.environ['AUTORESEARCH_CONTRACT']} still goes first")
    print(f"ready: {fingerprint(contract)} in {time.monotonic() - start:.1f} s; now: uv run train.py")


if __name__ == "__main__":
    run_main(main)
