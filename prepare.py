"""
What is fixed: the contract, the data, the tokenizer, the loader, the metric and the evidence.

    uv run prepare.py [--contract NAME] [--num-shards N] [--download-workers W]

Makes everything that `train.py` needs in the cache (~/.cache/autoresearch, moved by AUTORESEARCH_CACHE); running it
again repairs what is broken and repeats nothing. `evaluate_bpb` appends one line per scored run to runs.jsonl in the
working directory. Nobody edits this file during research: that makes runs incomparable, and the contract's fingerprint
or the file's hash in runs.jsonl shows it.
"""

import argparse
import ast
import atexit
import base64
import bisect
import contextlib
import dataclasses
import datetime
import errno
import faulthandler
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import urlsplit

import filelock  # torch brings it
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from urllib3.util import Retry

# ----------------------------------------------------------------------------------------------------------------------
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
        val=("tinystories_gpt4_clean.parquet", 10_000, 20_000), test=("tinystories_gpt4_clean.parquet", 0, 10_000),
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
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").expanduser()


def _contract_named(name: str, source: str) -> Contract:
    if name not in CONTRACTS:
        raise Failure(f"{source} names no contract: {name!r}. Use one of: {', '.join(CONTRACTS)}.")
    contract = CONTRACTS[name]
    if seconds := os.environ.get("AUTORESEARCH_TIME_BUDGET"):
        try:
            budget = float(seconds)
        except ValueError:
            budget = 0.0
        if not 0 < budget < math.inf:
            raise Failure(f"AUTORESEARCH_TIME_BUDGET is {seconds!r}; give seconds, a number above 0, or unset it.")
        contract = dataclasses.replace(contract, time_budget=budget)
    return contract


@functools.cache
def active_contract() -> tuple[Contract, str]:
    """The contract in force and why: AUTORESEARCH_CONTRACT, else the one last prepared by name, else by the device."""
    remembered = cache_dir() / "active"
    if name := os.environ.get("AUTORESEARCH_CONTRACT"):
        return _contract_named(name, "AUTORESEARCH_CONTRACT"), "AUTORESEARCH_CONTRACT is set"
    if remembered.is_file():
        return _contract_named(remembered.read_text().strip(), str(remembered)), "last prepared by name"
    if torch.cuda.is_available():
        return _contract_named("climbmix", "default"), "torch sees a CUDA/ROCm device"
    return _contract_named("demo", "default"), "no CUDA/ROCm device, and nothing else prepared by name"


def active_split() -> str:
    """The exam's split: "val", or "test" for the human's final check (AUTORESEARCH_SPLIT=test)."""
    split = os.environ.get("AUTORESEARCH_SPLIT") or "val"
    if split not in ("val", "test"):
        raise Failure(f"AUTORESEARCH_SPLIT is {split!r}; use val or test, or unset it.")
    return split


def __getattr__(name: str):
    """Bind MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS and VOCAB_SIZE to the active contract, when first asked for."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE"):
        return getattr(active_contract()[0], name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Manifest:
    """What the cache folder of a contract holds: manifest.json, replaced as a whole on every change.

    files: {name: {size, sha256}} as first seen; tokenizer: digest; tokenizer_chars: how many it was trained on;
    val, test: SHA-256 of the packed rows; shards: training shards in use.
    """

    def __init__(self, contract: Contract):
        self.folder = cache_dir() / contract.name
        try:
            self.data = json.loads((self.folder / "manifest.json").read_text())
        except (FileNotFoundError, ValueError):
            self.data = {"files": {}}

    def update(self, **fields) -> None:
        self.data.update(fields)
        _write(self.folder / "manifest.json", json.dumps(self.data, indent=1).encode())

    def parquet(self, name: str) -> Path:
        return self.folder / "parquet" / name

    def derived(self, name: str) -> Path:
        """What the current tokenizer made: FILE.tokens, FILE.offsets, and the exam rows val.npy and test.npy."""
        return self.folder / f"tokens-{self.data['tokenizer'][:8]}" / name


def fingerprint(contract: Contract | None = None) -> str:
    """Contract's name and 8 hex digits of SHA-256 over its fields, the tokenizer and the packed validation rows."""
    contract = contract or active_contract()[0]
    data = Manifest(contract).data
    if "val" not in data:
        raise Failure(f"contract {contract.name} is not prepared; run: uv run prepare.py --contract {contract.name}")
    terms = [dataclasses.asdict(contract), data["tokenizer"], data["val"]]
    return f"{contract.name}-{hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()[:8]}"


# ----------------------------------------------------------------------------------------------------------------------
# Files and progress


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to; at the end of the block the file gets its real one, or is removed after an error."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _parquet_problem(path: Path, record: dict | None) -> str | None:
    """Why a cached parquet file cannot be used, or None. Reads the footer only."""
    try:
        if not path.is_file():
            return "missing"
        if record and path.stat().st_size != record["size"]:
            return f"{path.stat().st_size:,} bytes on disk, {record['size']:,} when it was first seen"
        schema = pq.read_schema(path)
        if "text" not in schema.names:
            return f"no column `text` (columns: {', '.join(schema.names) or 'none'})"
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return f"column `text` holds {kind}, not strings"
    except (pa.ArrowException, OSError) as error:
        return f"not a readable parquet file ({str(error).splitlines()[0][:120]})"
    return None


class Progress:
    """Say how far a job is: a live line on a terminal, else one after 2 seconds and every 10; and one at the end."""

    def __init__(self, label: str, total: float, unit: str):
        self.label, self.total, self.unit, self.done, self.note = label, total, unit, 0.0, ""
        self.live, self.lock = sys.stdout.isatty(), threading.Lock()
        self.start = time.monotonic()
        self.due = self.start + (0.2 if self.live else 2)

    def add(self, amount: float) -> None:
        with self.lock:
            self.done += amount
            now = time.monotonic()
            if now >= self.due:
                self.due = now + (0.2 if self.live else 10)
                rate = self.done / max(now - self.start, 1e-9)
                total = f"/{self.total:,.0f}" if self.total else ""
                left = f", {max(self.total - self.done, 0) / rate:.0f} s left" if 0 < self.done < self.total else ""
                self._print(f"{self.done:,.0f}{total} {self.unit}, {rate:,.1f} {self.unit}/s{left}", not self.live)

    def close(self) -> None:
        self._print(f"{self.done:,.0f} {self.unit} in {time.monotonic() - self.start:.1f} s", True)

    def _print(self, text: str, newline: bool) -> None:
        line = f"{self.label}: {self.note}{text}"
        print(f"\r{line}\x1b[K" if self.live else line, end="\n" if newline else "", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Data: download from the hub, or the docstrings that are here already

# Seconds without a byte after which a connection counts as broken; pauses between attempts grow from a 60th of it
PATIENCE = 60
ATTEMPTS = 5  # at a body that breaks off or fails its check; urllib3 repeats requests that get no good answer
CHUNK = 2**16  # bytes; a break costs at most so many of those that came
PACKAGES = ("torch", "numpy", "sympy", "networkx")  # read for DOCSTRINGS
MIN_DOCSTRING = 200  # characters


def _get_files(contract: Contract, names: list[str], manifest: Manifest, workers: int) -> None:
    """Have every named parquet file in the cache, checked; raises Failure that names each missing file and why."""
    folder, missing = manifest.folder / "parquet", []
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        record = manifest.data["files"].get(name)
        problem = _parquet_problem(folder / name, record)
        if not problem and not _is_tokenized(manifest, name):  # it will be read, so every byte of it matters
            digest = _sha256(folder / name)
            if not record:  # put there by hand, or by a run that was killed before it could note it
                _record(manifest, name, digest)
            elif digest != record["sha256"]:
                problem = "its SHA-256 is not what it was when first seen"
        if problem:
            missing.append(name)
            if problem != "missing":
                print(f"{folder / name}: {problem}; getting it again")
    if missing and contract.dataset == DOCSTRINGS:
        _write_docstrings(folder)
        for name in names:
            _record(manifest, name, _sha256(folder / name))
    elif missing and (problems := _download_all(contract, missing, manifest, workers)):
        raise Failure("\n".join([f"{len(problems)} of {len(names)} files are missing:",
                                 *(f"  {name}: {why}" for name, why in problems.items()),
                                 "Run the same command again: what is complete is kept, what broke off goes on.",
                                 "No network? `uv run prepare.py --contract demo` needs none."]))


def _record(manifest: Manifest, name: str, digest: str) -> None:
    """Note what a new parquet file is; one that is not what it was when first seen is refused."""
    path, first = manifest.parquet(name), manifest.data["files"].get(name, {}).get("sha256", digest)
    if first != digest:
        path.unlink()
        raise Failure(f"changed at the source: SHA-256 was {first[:12]}…, now it is {digest[:12]}…; "
                      f"to start over with the new data, delete {manifest.folder}")
    manifest.update(files=manifest.data["files"] | {name: {"size": path.stat().st_size, "sha256": digest}})


def _download_all(contract: Contract, names: list[str], manifest: Manifest, workers: int) -> dict[str, str]:
    """Download in parallel; returns {name: why} of the files that could not be had."""
    folder = manifest.folder / "parquet"
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{base}/datasets/{contract.dataset}/resolve/main/"
    retry = Retry(total=ATTEMPTS, connect=3, read=1, backoff_factor=PATIENCE / 60,
                  status_forcelist=(429, 500, 502, 503, 504))
    stop, problems = threading.Event(), {}
    print(f"{len(names)} files to get from {urlsplit(url).netloc}", flush=True)
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"
        if token := os.environ.get("HF_TOKEN"):  # requests drops it when it follows a redirect to another host or port
            session.headers["Authorization"] = f"Bearer {token}"
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry, pool_maxsize=workers))
        size = _remote_bytes(session, url + names[0])
        need, free = size * len(names) * 5 / 2, shutil.disk_usage(folder).free  # tokens: 2 bytes for about 4.5 of text
        if need > free:
            raise Failure(f"not enough disk: about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free in {folder}. "
                          "Free some, ask for a smaller --num-shards, or move the cache with AUTORESEARCH_CACHE.")
        progress = Progress("download", size * len(names) / 1e6, "MB")
        with ThreadPoolExecutor(workers) as pool:
            jobs = {n: pool.submit(_download, session, url + n, folder / n, progress, stop) for n in names}
            try:
                for count, (name, job) in enumerate(jobs.items(), 1):
                    while wait([job], 1).not_done:
                        progress.add(0)  # also while the server makes us wait
                    try:
                        _record(manifest, name, job.result())
                        progress.note = f"{count}/{len(jobs)} files, "
                    except Failure as error:
                        problems[name] = str(error)
                    except OSError as error:  # the host or the disk: the other files would meet it too
                        full = error.errno == errno.ENOSPC
                        problems[name] = f"disk full while writing to {folder}" if full else str(error)
                        stop.set()
            finally:
                stop.set()  # Ctrl-C: let the threads end
        progress.close()
    return problems


def _remote_bytes(session: requests.Session, url: str) -> int:
    """Size of a file as the server declares it; 0 where it does not say."""
    try:
        response = session.head(url, timeout=(min(10, PATIENCE), PATIENCE), allow_redirects=False)
    except requests.ConnectionError as error:
        raise Failure(f"cannot reach {urlsplit(url).netloc} ({_cause(error)}); nothing was downloaded.\n"
                      "No network? `uv run prepare.py --contract demo` needs none.") from error
    except requests.RequestException:
        return 0
    linked, length = (response.headers.get(key, "0") for key in ("X-Linked-Size", "Content-Length"))
    return int(linked) or (int(length) if response.status_code == 200 else 0)


def _download(session: requests.Session, url: str, path: Path, progress: Progress, stop: threading.Event) -> str:
    """Fetch a parquet file and return its SHA-256. Raises Failure, or OSError for a host or a disk that fails.

    The body goes to a temporary name beside `path`, goes on by Range after a break, and is renamed only once it has its
    declared length, its declared SHA-256 (X-Linked-ETag) and a readable footer.
    """
    left = sorted(path.parent.glob(f"{path.name}.*.part"), key=lambda p: p.stat().st_size)  # by killed processes
    *stale, part = left or [path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")]
    for shorter in stale:
        shorter.unlink()
    host, why = urlsplit(url).netloc, ""
    for attempt in range(ATTEMPTS):
        if stop.wait(PATIENCE / 60 * 2**attempt if attempt else 0):
            raise Failure("not tried to the end, because the host or the disk failed for another file")
        got = part.stat().st_size if part.exists() else 0
        try:
            response = session.get(url, headers={"Range": f"bytes={got}-"} if got else {}, stream=True,
                                   timeout=(min(10, PATIENCE), PATIENCE))
        except requests.ConnectionError as error:
            raise OSError(f"cannot reach {host} ({_cause(error)})") from error
        except requests.RequestException as error:
            raise Failure(f"{host}: {_cause(error)}") from error
        with response:
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {got}-")
            if response.status_code == 416 or (response.status_code == 206 and not resumed):
                why = "the server refused to go on from what was there"
                part.unlink()
                continue
            if response.status_code >= 400:
                hint = "; is HF_TOKEN right?" if response.status_code in (401, 403) else ""
                raise Failure(f"HTTP {response.status_code} from {urlsplit(response.url).netloc}{hint}")
            got = got if response.status_code == 206 else 0
            declared = got + int(response.headers.get("Content-Length", -1 - got))
            tags = [r.headers.get("X-Linked-ETag", "").strip('"').lower() for r in (*response.history, response)]
            tag = next((tag for tag in tags if len(tag) == 64), None)  # else no SHA-256
            progress.add(got / 1e6)
            try:
                with open(part, "ab" if got else "wb") as file:
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                        got += len(chunk)
                        progress.add(len(chunk) / 1e6)
                        if stop.is_set():
                            raise Failure("stopped, because the host or the disk failed for another file")
            except requests.RequestException as error:
                why = f"broke off after {got:,} bytes ({_cause(error)})"
                progress.add(-got / 1e6)
                continue
            except OSError:
                part.unlink()  # leave no half file on a full disk
                raise
        digest = _sha256(part)
        if declared not in (-1, got):
            why = f"{got:,} bytes came, {declared:,} were declared"
        elif tag not in (None, digest):
            why = f"SHA-256 is {digest[:12]}…, the server declares {tag[:12]}…"
        elif problem := _parquet_problem(part, None):
            why = f"{response.headers.get('Content-Type', 'something')} came, {problem}"
        else:
            os.replace(part, path)
            return digest
        part.unlink()
        progress.add(-got / 1e6)
        if tag == digest:  # the source is like that
            break
    raise Failure(f"{why}; gave up after attempt {attempt + 1}")


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests error, which wraps several."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return str(reason or error).split(": ", 1)[-1][:200]


def _write_docstrings(folder: Path) -> None:
    """Write train, val and test.parquet from the docstrings of PACKAGES, shuffled and split by stable hashes."""
    roots = [Path(importlib.util.find_spec(package).origin).parent for package in PACKAGES]
    paths = [(root, path) for root in roots for path in sorted(root.rglob("*.py"))
             if not {"tests", "testing"} & set(path.relative_to(root).parts)]
    progress, split_of = Progress("docstrings", len(paths), "modules"), {}
    gc.disable()  # halves the time: the parser's nodes make no cycles
    for root, path in paths:
        progress.add(1)
        digest = hashlib.sha256(path.relative_to(root.parent).as_posix().encode()).digest()
        split = {0: "val", 1: "test"}.get(digest[0] % 10, "train")
        for text in _docstrings(path):
            split_of.setdefault(text, split)
    gc.enable()
    progress.close()
    for split in ("train", "val", "test"):
        texts = [text for text in split_of if split_of[text] == split]
        texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        with _replacing(folder / f"{split}.parquet") as temporary:
            pq.write_table(pa.table({"text": texts}), temporary)


def _docstrings(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8", errors="replace")
    if source.count('"' * 3) < 2:  # parsing is what takes the time
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return
    while nodes:
        node = nodes.pop()
        nodes.extend(child for child in getattr(node, "body", ()) if hasattr(child, "body"))  # no walk into expressions
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING:
                yield text.encode("utf-8", "replace").decode()


# ----------------------------------------------------------------------------------------------------------------------
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
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """Read the active contract's tokenizer.tiktoken: per line the token's bytes in base64 and its rank."""
        path = Path(directory or cache_dir() / active_contract()[0].name) / "tokenizer.tiktoken"
        try:
            pairs = (line.split() for line in path.read_bytes().splitlines())
            return cls({base64.b64decode(token, validate=True): int(rank) for token, rank in pairs})
        except FileNotFoundError:
            raise Failure(f"no tokenizer at {path}; run: uv run prepare.py") from None
        except Exception as error:
            raise Failure(f"{path} is damaged ({error}); delete it and run: uv run prepare.py") from error

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list[int] | list[list[int]]:
        """Tokens of a text, or of each of a list of them; before each `prepend`, a token or a reserved one's name."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        first = self.encoding.encode_single_token(prepend) if isinstance(prepend, str) else prepend
        return [*([] if first is None else [first]), *self.encoding.encode_ordinary(text)]

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode(list(tokens))

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return len(self.tokens)

    def documents(self, texts: Iterable[str | None]) -> list[np.ndarray]:
        """Encode documents, each with BOS before it, to uint16 arrays."""
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        bos = np.array([self.get_bos_token_id()], dtype=np.uint16)
        return [np.concatenate([bos, encode(text or "")], dtype=np.uint16, casting="unsafe") for text in texts]

    def get_token_bytes(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Bytes that each token stands for, int32 (V,), from its raw bytes; 0 for the reserved ones."""
        return torch.tensor([*map(len, self.tokens), *[0] * SPECIALS], dtype=torch.int32, device=device)

    def digest(self) -> str:
        """SHA-256 over the pattern and every token's bytes, in order."""
        return hashlib.sha256("\n".join([SPLIT_PATTERN, *map(bytes.hex, self.tokens)]).encode()).hexdigest()


def _read_texts(manifest: Manifest, name: str) -> Iterator[pa.Array]:
    """Batches of the documents of a parquet file; one that cannot be read to its end is set aside and forgotten."""
    path = manifest.parquet(name)
    try:
        with pq.ParquetFile(path) as file:
            # Batches four times as large are allocated anew each time: 171 thousand page faults in 100 MB, not 22
            for batch in file.iter_batches(batch_size=128, columns=["text"], use_threads=False):
                batch.validate(full=True)  # is it UTF-8?
                yield batch.column(0)
    except (pa.ArrowException, OSError, ValueError) as error:
        aside = path.replace(path.with_suffix(".bad"))
        manifest.update(files={other: record for other, record in manifest.data["files"].items() if other != name})
        raise Failure(f"{path} breaks off while being read ({error}); set aside as {aside.name}. "
                      "Run the same command again to get it anew.") from error


def _train_tokenizer(contract: Contract, parts: list[Part], manifest: Manifest) -> Tokenizer:
    """Train on the first `tokenizer_chars` characters of the training text; writes tokenizer.tiktoken."""
    progress = Progress("tokenizer", contract.tokenizer_chars / 1e6, "MB of text")
    chars = 0

    def texts() -> Iterator[str]:
        nonlocal chars
        for name, start, stop in parts:
            documents = (text for texts in _read_texts(manifest, name) for text in texts.to_pylist())
            for text in itertools.islice(documents, start, stop):
                text = (text or "")[: contract.tokenizer_doc_chars]
                chars += len(text)
                progress.add(len(text) / 1e6)
                yield text
                if chars >= contract.tokenizer_chars:
                    return

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts(), contract.vocab_size - SPECIALS, pattern=SPLIT_PATTERN)
    progress.close()
    tokenizer = Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokenizer.tokens))
    _write(manifest.folder / "tokenizer.tiktoken", b"".join(lines))
    manifest.update(tokenizer=tokenizer.digest(), tokenizer_chars=chars)
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Tokens on disk, and packing

REFILL = 128  # documents read at once
WORKER_BYTES = 2**22  # of text that make a process worth its fork: a quarter of a second of work
MAX_WORKERS = 16  # one process cannot feed more: reading and sending takes 1/14 of the time that encoding does


def _is_tokenized(manifest: Manifest, name: str) -> bool:
    try:
        last = np.load(manifest.derived(f"{name}.offsets"), mmap_mode="r")[-1]
        return last * 2 == manifest.derived(f"{name}.tokens").stat().st_size
    except (LookupError, OSError, ValueError, EOFError):  # no tokenizer yet, no such file, or no whole one
        return False


@contextlib.contextmanager
def _forked(function: Callable, count: int) -> Iterator[Callable]:
    """Yield `function` as `count` threads may call it: forked processes compute it, and end with this one or before."""
    idle, processes = queue.SimpleQueue(), []
    context = multiprocessing.get_context("fork")  # a spawned one would import torch first, and run __main__ again

    def serve(ours, theirs) -> None:
        ours.close()  # else the pipe would stay open after the parent's death
        with contextlib.suppress(EOFError, OSError):
            while True:
                theirs.send(function(theirs.recv()))

    def call(argument):
        pipe = idle.get()
        try:
            pipe.send(argument)
            return pipe.recv()
        except Exception as error:
            pipe.close()  # half a message may be left in it
            raise Failure("a worker process died, perhaps of too little memory; run the same command again") from error
        finally:
            idle.put(pipe)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: Ctrl-C is the parent's alone
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(ours, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            idle.put(ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield call
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in processes:
            process.kill()
            process.join()


def _tokenize(tokenizer: Tokenizer, name: str, manifest: Manifest) -> None:
    """Encode a parquet file to NAME.tokens (uint16) and NAME.offsets (int64, documents + 1), on MAX_WORKERS cores."""
    if _is_tokenized(manifest, name):
        return
    tokens, lengths, pending = manifest.derived(f"{name}.tokens"), [0], []
    tokens.parent.mkdir(exist_ok=True)
    metadata = pq.read_metadata(manifest.parquet(name))
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    progress = Progress(f"tokenize {name}", size / 1e6, "MB")

    def encode(texts: pa.Array) -> tuple[bytes, list[int]]:
        documents = tokenizer.documents(texts.to_pylist())
        return np.concatenate(documents).tobytes(), [*map(len, documents)]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(cores, MAX_WORKERS)  # tiktoken lets go of the GIL, but is a quarter slower in threads
    workers = min(threads, size // WORKER_BYTES) if sys.platform == "linux" else 0  # macOS has no safe fork
    with (_forked(encode, workers) if workers > 1 else contextlib.nullcontext(encode) as encode,
          _replacing(tokens) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(threads) as pool):

        def write() -> None:
            documents, counts = pending.pop(0).result()
            file.write(documents)
            lengths.extend(counts)

        for texts in _read_texts(manifest, name):
            pending.append(pool.submit(encode, texts))
            progress.add(texts.nbytes / 1e6)
            if len(pending) > 3 * threads:
                write()
        while pending:
            write()
    with _replacing(manifest.derived(f"{name}.offsets")) as temporary, open(temporary, "wb") as file:
        np.save(file, np.cumsum(lengths, dtype=np.int64))
    progress.close()


class Documents:
    """The tokenized documents of a split in dataset order, memory-mapped: once, or pass after pass `forever`."""

    def __init__(self, manifest: Manifest, parts: list[Part], forever: bool = False):
        self.forever, self.epoch = forever, 0  # the epoch counts passes begun
        self.parts = []
        for name, start, stop in parts:
            offsets = np.load(manifest.derived(f"{name}.offsets"), mmap_mode="r")
            rows = range(*slice(start, stop).indices(len(offsets) - 1))
            if len(rows):
                tokens = np.asarray(np.memmap(manifest.derived(f"{name}.tokens"), dtype=np.uint16, mode="r"))
                self.parts.append((tokens, offsets[rows.start : rows.stop + 1]))
        if not self.parts:
            raise Failure(f"no documents in {', '.join(name for name, _, _ in parts)} of {manifest.folder}")

    def __iter__(self) -> Iterator[np.ndarray]:
        while self.forever or not self.epoch:
            self.epoch += 1
            for tokens, offsets in self.parts:
                for start, stop in itertools.pairwise(offsets):
                    yield tokens[start:stop]


def pack_rows(documents: Iterable[np.ndarray], length: int, buffer_size: int = 1000) -> Iterator[np.ndarray]:
    """Best-fit packing: yield rows of exactly `length` tokens, uint16, each of which begins with a document.

    Whenever the buffer holds fewer than `buffer_size` documents, it is refilled with the next REFILL in order. A row
    takes the longest document that fits in what is left of it (the first that arrived among equals), again and again;
    when none fits, the shortest (first among equals) is cropped to fill it, and the rest of that one is thrown away.
    Ends when a finite stream cannot fill a row.

    Cost: cropping throws away 21 % of the tokens of climbmix text (rows of 2049, 10,000 of them, n=1). A document
    longer than a row never fits and waits until it is the shortest: after those rows 1,033 of the 1,072 that wait.
    """
    stream, waiting, arrivals = iter(documents), {}, itertools.count()
    keys: list[int] = []  # sorted, length << 40 | arrival: a bisection finds the best fit where a scan read them all
    while True:
        row, filled = np.empty(length, dtype=np.uint16), 0
        while filled < length:
            while len(keys) < buffer_size and (batch := list(itertools.islice(stream, REFILL))):
                for arrival, document in zip(arrivals, batch):
                    bisect.insort(keys, key := len(document) << 40 | arrival)
                    waiting[key] = document
            if not keys:
                return
            at = bisect.bisect_left(keys, (length - filled + 1) << 40)  # documents before it fit
            if at:
                at = bisect.bisect_left(keys, keys[at - 1] >> 40 << 40)  # first to arrive of that length
            document = waiting.pop(keys.pop(at))[: length - filled]
            row[filled : filled + len(document)] = document
            filled += len(document)
        yield row


def _pack_exam(contract: Contract, split: str, manifest: Manifest) -> None:
    """Store the exam: the first eval_tokens / max_seq_len rows of a split, uint16 (rows, T + 1)."""
    path, count = manifest.derived(f"{split}.npy"), contract.eval_tokens // contract.max_seq_len
    if path.exists() and _sha256(path) == manifest.data.get(split):
        return
    progress = Progress(f"pack {split}", count, "rows")
    length, rows = contract.max_seq_len + 1, []
    for row in itertools.islice(pack_rows(Documents(manifest, [getattr(contract, split)]), length), count):
        rows.append(row)
        progress.add(1)
    if not rows:
        raise Failure(f"the {split} text of {contract.name} is too short to fill one row of {length} tokens")
    if len(rows) < count:
        print(f"note: the {split} text fills {len(rows):,} of {count:,} rows; they repeat")
        progress.add(count - len(rows))
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.resize(np.stack(rows), (count, length)))
    progress.close()
    digest = _sha256(path)
    if manifest.data.get(split, digest) != digest:
        print(f"note: the {split} rows are not those of before; the fingerprint says so")
    manifest.update(**{split: digest})


def prepare(contract: Contract, shards: int | None = None, workers: int = 8) -> Tokenizer:
    """Bring the contract's cache folder to completion and return its tokenizer; what is there and good is kept.

    `shards`: training shards; None keeps what was last prepared. One process at a time does this, others wait.
    """
    with _locked(cache_dir() / contract.name):
        manifest = Manifest(contract)
        for stale in manifest.folder.rglob("*.tmp"):  # of a process that was killed
            stale.unlink()
        parts = contract.train(shards or manifest.data.get("shards", DEFAULT_SHARDS))
        names = list(dict.fromkeys(name for name, _, _ in [*parts, contract.val, contract.test]))
        _get_files(contract, names, manifest, workers)
        try:
            tokenizer = Tokenizer.from_directory(manifest.folder)
        except Failure:
            tokenizer = None
        if tokenizer is None or tokenizer.digest() != manifest.data.get("tokenizer"):
            tokenizer = _train_tokenizer(contract, parts, manifest)
        if manifest.data["tokenizer_chars"] < contract.tokenizer_chars and contract.train_files > 1:
            print(f"note: the tokenizer was trained on {manifest.data['tokenizer_chars']:,} of "
                  f"{contract.tokenizer_chars:,} characters, because too few shards were there, so the fingerprint is "
                  f"not the usual one. The tokenizer stays as it is; to train it anew, delete {manifest.folder}")
        for name in names:
            _tokenize(tokenizer, name, manifest)
        for split in ("val", "test"):
            _pack_exam(contract, split, manifest)
        if manifest.data.get("shards") != len(parts):
            manifest.update(shards=len(parts))
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
    except BrokenPipeError:  # stdout's, see run_main
        raise
    except OSError as error:
        raise Failure(f"cannot read or write the cache {folder} ({error}). Free some disk, or move the cache with "
                      "AUTORESEARCH_CACHE; what is complete is kept.") from error
    finally:
        lock.release()


# ----------------------------------------------------------------------------------------------------------------------
# Loader


class Loader(Iterator):
    """What make_dataloader returns: an iterator with `close()`. A daemon thread packs PREFETCH batches ahead."""

    PREFETCH = 4

    def __init__(self, documents: Documents, B: int, T: int, buffer_size: int, device: torch.device, counted: bool):
        self.documents, self.device, self.counted, self.closed = documents, device, counted, False
        self.free, self.ready, cuda = queue.Queue(), queue.Queue(), device.type == "cuda"
        for _ in range(self.PREFETCH):  # a host buffer, and the event after the last copy from it
            host = torch.empty(B, T + 1, dtype=torch.int32, pin_memory=cuda)
            self.free.put((host, torch.cuda.Event() if cuda else None))
        rows = pack_rows(documents, T + 1, buffer_size)
        self.thread = threading.Thread(target=self._fill, args=(rows,), daemon=True, name="loader")
        self.thread.start()
        atexit.register(self.close)  # a thread that still packs while the interpreter goes down can abort the process

    def _fill(self, rows: Iterator[np.ndarray]) -> None:
        try:
            while True:
                host, copied = self.free.get()
                if self.closed:
                    return
                if copied:
                    copied.synchronize()
                batch = list(itertools.islice(rows, len(host)))
                if len(batch) < len(host):
                    raise StopIteration
                np.stack(batch, out=host.numpy(), casting="unsafe")
                self.ready.put((host, copied, self.documents.epoch))
        except BaseException as error:  # also StopIteration: the consumer's thread raises it
            self.ready.put(error)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        if self.counted:
            _RUN.start()
        item = StopIteration() if self.closed else self.ready.get()
        if isinstance(item, BaseException):
            self.ready.put(item)
            raise item
        host, copied, epoch = item
        rows = host.to(self.device, non_blocking=copied is not None)
        if copied:
            copied.record()
        x, y = rows[:, :-1].long(), rows[:, 1:].long()
        self.free.put((host, copied))
        if self.counted:
            _RUN.tokens += x.numel()
        return x, y, epoch

    def close(self) -> None:
        """End the thread, and the watchdog of the run."""
        self.closed = True
        self.free.put((None, None))
        self.thread.join()
        atexit.unregister(self.close)
        if self.counted:
            faulthandler.cancel_dump_traceback_later()


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, buffer_size: int = 1000,
                    device: str | torch.device | None = None) -> Loader:
    """Yield (x, y, epoch): int64 (B, T) on the device, y is x one token on; epoch is the pass being read, from 1.

    Rows are those of `pack_rows` over the split's documents, in an order that does not depend on B: for ever for
    "train", one pass for "val" and "test" (what is left under a whole batch is dropped). Same cache, same rows. The
    tensors are the caller's to keep. The first batch of "train" begins the run: its evidence and its watchdog.
    """
    contract = active_contract()[0]
    manifest = Manifest(contract)
    if tokenizer.digest() != manifest.data.get("tokenizer"):
        raise Failure(f"this is not the tokenizer that {manifest.folder} was made with; run: uv run prepare.py")
    train = split == "train"
    parts = contract.train(manifest.data["shards"]) if train else [getattr(contract, split)]
    device = torch.device(device or default_device())
    return Loader(Documents(manifest, parts, forever=train), B, T, buffer_size, device, counted=train)


def default_device() -> torch.device:
    """CUDA or ROCm, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# Metric: the locked exam

# What everything a model must not know may be worth to it, in bits per byte, and how far it may move
# one target's log-probability, in nats. Rounding moves honest models, at most by what the table in
# tests/test_exam.py says; what leaks of which strength are worth stands there too.
LEAK_BPB = 0.001
LEAK_NATS = 0.05


@torch.no_grad()
def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Return bits per byte: how many bits the model needs for a byte of the exam's text.

    That is the sum of -ln p over the exam's targets / (ln 2 * the bytes those targets stand for), so
    it compares across vocabularies. `model(x)` maps int64 (B, T) to logits (B, T, V); whatever loss
    it defines is not used. Reserved tokens are in neither sum. All eval_tokens targets are scored
    whatever the batch size. Log-softmax in float32, sums in float64 on the host.

    Rows are then scored again: unchanged; beside other rows, so that every two places of a batch are
    told apart; and with other tokens after a position, every position once. Raises ExamError where
    that moves a score, and for an exam or a tokenizer that is not the contract's. Appends a line to
    runs.jsonl.
    """
    contract, split = active_contract()[0], active_split()
    rows = load_exam(contract, split, tokenizer).to(_device_of(model))
    token_bytes = tokenizer.get_token_bytes(rows.device)
    slots = torch.arange(batch_size, device=rows.device)
    # All batches have one size, so that they compile once: the last goes on with the first rows
    batches = [rows[(start + slots) % len(rows)] for start in range(0, len(rows), batch_size)]
    with _evaluating(model):
        nll = [_nll(model, batch[:, :-1], batch[:, 1:], len(token_bytes)) for batch in batches]
        _refuse_leaks(_probes(model, batches, nll, token_bytes, cuts=contract.max_seq_len - 1,
                              halvings=(batch_size - 1).bit_length()))
    scores, weights = torch.cat(nll)[: len(rows)].cpu().double(), token_bytes[rows[:, 1:]].cpu()
    if not scores.isfinite().all():
        raise ExamError("model(x) returned non-finite logits in one of its batches")
    bpb = scores[weights > 0].sum().item() / (math.log(2) * weights.sum().item())
    _RUN.write_evidence(contract, split, bpb, rows.device)
    return bpb


@torch.no_grad()
def check_model(model: Callable, batch_size: int) -> None:
    """Try a sample of the exam's probes on rows drawn at random, cheap enough for warm-up. Raises ExamError.

    All calls have the exam's shape, so what does not fit into memory or does not compile fails here.
    """
    contract = active_contract()[0]
    tokenizer = Tokenizer.from_directory()
    rows = load_exam(contract, "val", tokenizer)
    batch = rows[torch.randint(len(rows), (batch_size,), generator=_dice())].to(_device_of(model))
    token_bytes = tokenizer.get_token_bytes(batch.device)
    with _evaluating(model):
        nll = _nll(model, batch[:, :-1], batch[:, 1:], len(token_bytes))
        _refuse_leaks(_probes(model, [batch], [nll], token_bytes, cuts=2 * batch_size,
                              halvings=min(1, batch_size - 1)))


def load_exam(contract: Contract, split: str, tokenizer: Tokenizer) -> torch.Tensor:
    """The exam of a split, int32 (rows, T + 1); raises ExamError if it or the tokenizer is not the contract's."""
    manifest = Manifest(contract)
    if tokenizer.digest() != manifest.data.get("tokenizer"):
        raise ExamError("the tokenizer is not the one the exam was packed with; use Tokenizer.from_directory()")
    path = manifest.derived(f"{split}.npy")
    if not path.is_file() or _sha256(path) != manifest.data.get(split):
        raise ExamError(f"{path} is not the exam that was packed (its SHA-256 differs); run: uv run prepare.py")
    return torch.from_numpy(np.load(path).astype(np.int32))


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


def _probes(model: Callable, batches: list, nll: list, token_bytes: torch.Tensor, cuts: int, halvings: int):
    """Change what a model must not know; yield (what moves it, nats, weights), the last two (n, T), of each probe.

    batches: int (B, T + 1) each; nll: -ln p of their targets, (B, T) each. `cuts`: how many positions are tried, each
    in a row of its own; `halvings`: how often a batch is split in two, so that two places are told apart.
    Nats: how much less probable the targets got. Weights: their bytes, 0 for those that do not count.
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
    positions, order = torch.arange(T), torch.randperm(T - 1, generator=dice)
    moved, weights = [], []
    for number, start in enumerate(range(0, cuts, B)):
        number, cut = number % len(batches), order[(start + torch.arange(B)) % (T - 1)][:, None]
        until, at = (mask.to(batches[0].device) for mask in (positions <= cut, positions == cut))
        moved.append(moves(number, ~until).where(until, 0))
        weights.append(token_bytes[batches[number][:, 1:]].where(at, 0))
    yield "sees the future", torch.cat(moved), torch.cat(weights)


def _nll(model: Callable, x: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """-ln p of each target, float32 (B, T), of int x and targets (B, T); NaN if any logit is not finite."""
    logits = model(x.to(torch.int64, copy=True))  # x alone: no storage that holds the targets
    if not isinstance(logits, torch.Tensor) or logits.shape != (*x.shape, vocab_size):
        seen = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ExamError(f"model(x) returned {seen}; the exam needs logits of shape {(*x.shape, vocab_size)}")
    # Row by row, because float32 logits of all rows would be a second tensor of that size
    nll = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, targets.long())]
    # -inf for a token that is not the target does not show in the loss
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


def _dice() -> torch.Generator:
    """Random numbers that nobody can foresee and that leave torch's own as they are."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def _device_of(model: Callable) -> torch.device:
    parameters = model.parameters() if hasattr(model, "parameters") else ()
    return next((parameter.device for parameter in parameters), default_device())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; a kernel built on torch's stable ABI says only which allocating call failed."""
    signs = ("out of memory", '"aten::new_empty"', '"aten::empty')
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in signs)


# ----------------------------------------------------------------------------------------------------------------------
# Evidence and watchdog


class _Run:
    """This process's run: begins with the first training batch, leaves one line in runs.jsonl when it is scored."""

    def __init__(self):
        self.began, self.tokens, self.evaluations, self.facts = None, 0, 0, {}

    def start(self) -> None:
        if self.began is None:
            self.began = time.monotonic()
            # A run that hangs must not stop the night: every thread's traceback, then exit code 1
            limit = max(120, 2 * active_contract()[0].time_budget)
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
            self.facts = _facts()

    def write_evidence(self, contract: Contract, split: str, bpb: float, device: torch.device) -> None:
        self.evaluations += 1
        line = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **(self.facts or _facts()),
            "contract": fingerprint(contract), "split": split, "bpb": bpb,
            "evaluation": self.evaluations,
            "seconds": None if self.began is None else round(time.monotonic() - self.began, 1),
            "tokens": self.tokens,
            "peak_memory_mb": round(peak_memory_mb(device), 1),
            "device": device_name(device), "torch": torch.__version__,
        }
        with open("runs.jsonl", "ab", buffering=0) as file:  # one write: lines of two runs do not mix
            file.write((json.dumps(line) + "\n").encode())


_RUN = _Run()


def _facts() -> dict:
    """What runs, as it is when the run begins: train.py may be edited meanwhile."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return {
        "commit": git("rev-parse", "--verify", "-q", "HEAD").strip() or None,
        "dirty": bool(git("status", "--porcelain", "--", "train.py").strip()),
        **{f"{path.stem}_sha256": _sha256(path) for path in (here / "train.py", here / "prepare.py") if path.is_file()},
        "seed": torch.initial_seed(),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Peak allocation on a CUDA/ROCm device, elsewhere the process's peak resident set; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {device.type}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main; expected failures, Ctrl-C and a closed pipe end in one line or none, and an exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # stdout and stderr go to one log: keep their order
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
    """The first line that prepare.py and train.py print."""
    return f"contract: {contract.name} ({why}); cache: {cache_dir() / contract.name}"


def main() -> None:
    def count(text: str) -> int:
        if not text.lstrip("-").isdigit() or (number := int(text)) == 0 or number < -1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1, or -1 for all")
        return number

    def workers(text: str) -> int:
        if not text.isdigit() or not 1 <= int(text) <= 64:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
        return int(text)

    parser = argparse.ArgumentParser(description="Prepare data, tokenizer and exam of a contract in the cache.")
    parser.add_argument("--contract", choices=list(CONTRACTS), help="prepare this one and remember it")
    parser.add_argument("--num-shards", type=count, metavar="N",
                        help=f"training shards, -1: all (default {DEFAULT_SHARDS}, or as many as last time)")
    parser.add_argument("--download-workers", type=workers, default=8, metavar="W", help="files at a time (default 8)")
    parser.print_usage = lambda file=None: None  # a bad value gets one line
    arguments = parser.parse_args()
    named = arguments.contract
    contract, why = (_contract_named(named, "--contract"), "--contract") if named else active_contract()
    print(describe(contract, why))
    shards = contract.train_files if arguments.num_shards == -1 else arguments.num_shards
    if shards and shards > contract.train_files:
        parser.error(f"argument --num-shards: {shards}, but {contract.name} has {contract.train_files}")
    start = time.monotonic()
    prepare(contract, shards, arguments.download_workers)
    if named:
        _write(cache_dir() / "active", contract.name.encode())
        if os.environ.get("AUTORESEARCH_CONTRACT", contract.name) != contract.name:
            print(f"note: AUTORESEARCH_CONTRACT={os.environ['AUTORESEARCH_CONTRACT']} still goes first")
    print(f"ready: {fingerprint(contract)} in {time.monotonic() - start:.1f} s; now: uv run train.py")


if __name__ == "__main__":
    run_main(main)
