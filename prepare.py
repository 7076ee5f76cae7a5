"""
What is fixed: the contract, the data, the tokenizer, the loader, the metric and the evidence.

    uv run prepare.py [--contract NAME] [--num-shards N] [--download-workers N]
    uv run prepare.py --verdict

Makes what `train.py` needs and is not there yet, in ~/.cache/autoresearch (AUTORESEARCH_CACHE
moves it). A file that has its name is whole. `active` there names the contract that was asked for
last. Of each contract:

    parquet/FILE.parquet        the text, downloaded or put there by hand
    tokenizer.tiktoken          the tokenizer
    token_ids/FILE.parquet.bin  the text as uint16 tokens; a document begins where one is BOS
    val.bin, test.bin           the exams: packed rows of max_seq_len + 1 uint16 tokens
    SHA256SUMS                  of the tokenizer and the exams, as they were made, and the contract
    shards                      how many training shards are in use
    lock                        held by the process that prepares

`evaluate_bpb` appends a line to runs.jsonl, beside this file (a script from elsewhere: in the
current folder). Nobody edits this file during research: runs become incomparable, which the
fingerprint or the hash in runs.jsonl shows.
"""

import importlib.util
import os
import sys

if __name__ == "__main__":  # else a profile.py, say, beside this file would replace Python's own
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if path != here] + [here]
    if not importlib.util.find_spec("rustbpe"):
        sys.exit("FAIL: the packages are not in this Python. Start with `uv run prepare.py`")

import argparse
import base64
import bisect
import contextlib
import dataclasses
import errno
import faulthandler
import functools
import getpass
import hashlib
import inspect
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import filelock  # comes with torch
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
import tqdm  # comes with kernels
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

    def train_parts(self, shards: int) -> list[Part]:
        files = range(min(shards, self.train_files))
        return [(self.train_file.format(i), *self.train_rows) for i in files]

    @property
    def folder(self) -> Path:
        return cache_dir() / self.name


DOCSTRINGS = "docstrings of the installed packages"
TINYSTORIES = "tinystories_gpt4_clean.parquet"
CONTRACTS = {contract.name: contract for contract in (
    Contract(
        name="climbmix", dataset="karpathy/climbmix-400b-shuffle",
        train_file="shard_{:05d}.parquet", train_files=6541, train_rows=(0, None),
        val=("shard_06542.parquet", 0, None), test=("shard_06541.parquet", 0, None),
        vocab_size=8192, max_seq_len=2048, time_budget=300, eval_tokens=40 * 2**19,
    ),
    Contract(
        name="tinystories", dataset="karpathy/tinystories-gpt4-clean",
        train_file=TINYSTORIES, train_files=1, train_rows=(20_000, None),
        val=(TINYSTORIES, 10_000, 20_000), test=(TINYSTORIES, 0, 10_000),
        vocab_size=4096, max_seq_len=512, time_budget=300, eval_tokens=4 * 2**19,
    ),
    Contract(
        name="demo", dataset=DOCSTRINGS,
        train_file="train.parquet", train_files=1, train_rows=(0, None),
        val=("val.parquet", 0, None), test=("test.parquet", 0, None),
        vocab_size=1024, max_seq_len=256, time_budget=60, eval_tokens=2**17,
    ),
)}
DEFAULT_SHARDS = 10  # training shards; five minutes on one H100 read about two thirds of them


class Failure(Exception):
    """An expected failure: its message is the whole story, one that a person can act on."""


class ExamError(Failure):
    """The metric refuses to score: the message names what was seen."""


def cache_dir() -> Path:
    try:
        return Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
    except RuntimeError:
        raise Failure("no home folder for the cache; set AUTORESEARCH_CACHE to a whole path") from None


@functools.cache
def active_contract(named: str | None = None) -> tuple[Contract, str]:
    """The contract in force and why: the first of these that says one."""
    choices = [
        (named, "--contract"),
        (os.environ.get("AUTORESEARCH_CONTRACT"), "AUTORESEARCH_CONTRACT is set"),
        (_read(cache_dir() / "active").strip(), "last prepared by name"),
        (torch.cuda.is_available() and "climbmix", "torch sees a CUDA/ROCm device"),
        ("demo", "no CUDA/ROCm device, and nothing else prepared by name"),
    ]
    name, why = next((name, why) for name, why in choices if name)
    if name not in CONTRACTS:
        raise Failure(f"no contract is named {name!r} ({why}); use one of: {', '.join(CONTRACTS)}")
    contract = CONTRACTS[name]
    if seconds := os.environ.get("AUTORESEARCH_TIME_BUDGET"):
        if not re.fullmatch(r"\d*\.?\d+", seconds) or not 0 < float(seconds) < math.inf:
            raise Failure(f"AUTORESEARCH_TIME_BUDGET is {seconds!r}; give seconds, or unset it")
        if float(seconds) != contract.time_budget:  # else 60.0 would not be 60 in the fingerprint
            why += f", with AUTORESEARCH_TIME_BUDGET {seconds} s instead of {contract.time_budget}"
            contract = dataclasses.replace(contract, time_budget=float(seconds))
    return contract, why


def active_split() -> str:
    """The exam's split: "val", or "test" for the human's final check (AUTORESEARCH_SPLIT=test)."""
    split = os.environ.get("AUTORESEARCH_SPLIT") or "val"
    if split not in ("val", "test"):
        raise Failure(f"AUTORESEARCH_SPLIT is {split!r}; use val or test, or unset it")
    return split


def __getattr__(name: str):
    """MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS and VOCAB_SIZE are the active contract's."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE"):
        return getattr(active_contract()[0], name.lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fingerprint(contract: Contract | None = None) -> str:
    """The contract's name, and 8 hex digits of SHA-256 over its fields, tokenizer and val.bin."""
    contract = contract or active_contract()[0]
    sums = _noted_sums(contract)
    if "val.bin" not in sums:
        raise Failure(f"not prepared; run: uv run prepare.py --contract {contract.name}")
    terms = [dataclasses.asdict(contract), sums["tokenizer.tiktoken"], sums["val.bin"]]
    return f"{contract.name}-{_digest(terms)[:8]}"


def _digest(terms: list | dict) -> str:
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Files and progress


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """Write FILE.tmp, then rename it: what has its name is whole. Callers hold the cache's lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name and not the bytes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _derive(path: Path, source: Path, pieces: Iterator[bytes]) -> None:
    """Write what is made from a source, with its mtime; if it has that already, make no piece."""
    changed = source.stat().st_mtime_ns
    if not path.exists() or path.stat().st_mtime_ns != changed:
        _write(path, pieces)
        os.utime(path, ns=(changed, changed))


def _note(path: Path, text: str) -> None:
    if _read(path) != text:
        _write(path, [text.encode()])


def _read(path: Path, errors: str = "strict") -> str:
    """The text of a note or a table; empty if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return path.read_text("utf-8-sig", errors)
    return ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(2**22), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _noted_sums(contract: Contract) -> dict[str, str]:
    """{name: SHA-256} of tokenizer, exams and contract as they were made; empty if none was."""
    words = _read(contract.folder / "SHA256SUMS").split()
    return dict(zip(words[1::2], words[::2]))


def _noted_shards(contract: Contract) -> int:
    """Training shards that were prepared last; DEFAULT_SHARDS where no number says so."""
    noted = _read(contract.folder / "shards").strip()
    return int(noted) if re.fullmatch("[1-9][0-9]{0,8}", noted) else DEFAULT_SHARDS


def _progress(label: str, total: float | None, unit: str) -> tqdm.tqdm:
    """A bar on a terminal; a log gets the line that announces the job."""
    if not sys.stdout.isatty():
        print(label, flush=True)
    return tqdm.tqdm(desc=label, total=total, unit=unit, unit_scale=True, file=sys.stdout,
                     delay=0.5, disable=None)


# --------------------------------------------------------------------------------------------------
# Data: download from the hub, or the docstrings that are here already

PATIENCE = 60  # seconds without a byte until a connection is given up; a first pause is a 30th
ATTEMPTS = 5  # at a file; also how often each request for it is repeated until it is answered
PACKAGES = ("torch", "numpy", "sympy", "networkx")  # read for DOCSTRINGS
MIN_DOCSTRING = 200  # characters
# Text in three double quotes; other strings and comments, which may hold such quotes, are skipped
DOCSTRING_PATTERN = (
    r"""\"{3}((?:\\.|[^\\])*?)"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|#[^\n]*""")


def _session() -> requests.Session:
    """Connections that are made again after a fault, and that send HF_TOKEN and no other secret."""
    retry = Retry(total=ATTEMPTS, connect=3, read=1, backoff_factor=PATIENCE / 60,
                  status_forcelist=(408, 425, 429, *range(500, 600)), retry_after_max=5 * PATIENCE)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"
    timeout = (min(10, PATIENCE), PATIENCE)  # to connect, and for the next byte
    session.request = functools.partial(session.request, timeout=timeout)  # else it waits for ever
    os.environ["NETRC"] = os.devnull  # else requests sends what is in ~/.netrc
    if token := os.environ.get("HF_TOKEN", "").strip():  # redirects to other hosts do not get it
        if not re.fullmatch("[!-~]+", token):
            raise Failure("HF_TOKEN holds characters that no token has; set it again, or unset it")
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def _download_all(contract: Contract, names: list[str], workers: int) -> None:
    """Download parquet files in parallel; raises Failure that names each missing one, and why."""
    session, folder = _session(), contract.folder / "parquet"
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
    proxies = {f"{kind}_proxy": proxy if "://" in proxy else f"http://{proxy}"
               for kind, proxy in requests.utils.getproxies().items()
               if kind in ("http", "https", "all")}
    for name, address in {"HF_ENDPOINT": base, **proxies}.items():
        if not _is_address(address):  # it may hold a password, and is not shown
            raise Failure(f"{name} is no address like https://huggingface.co; mend or unset it")
    url = f"{base}/datasets/{contract.dataset}/resolve/main/"
    offline = "No network? `uv run prepare.py --contract demo` needs none."
    some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    print(f"{len(names)} files to get from {_host(base)}: {some}", flush=True)
    try:
        headers = session.head(url + names[0]).headers
        size = int(headers.get("X-Linked-Size") or headers.get("Content-Length") or 0) * len(names)
    except requests.ConnectionError as error:
        raise Failure(f"cannot reach {_host(base)} ({cause(error)}).\n{offline}") from error
    except (requests.RequestException, ValueError):
        size = 0  # it does not say
    except OSError as error:  # REQUESTS_CA_BUNDLE names no file, say
        raise Failure(f"cannot ask {_host(base)} ({cause(error)})") from error
    there = sum(part.stat().st_size for part in folder.glob("*.part"))
    need = (2.5 * size - there) / 1e9  # text, and its tokens
    free = shutil.disk_usage(folder).free / 1e9
    if need > free:
        raise Failure(f"about {need:.1f} GB needed, {free:.1f} GB free in {folder}. Free some, ask "
                      "for fewer --num-shards, or move AUTORESEARCH_CACHE")
    problems, bar = [], _progress(f"download {size / 1e6:,.0f} MB", size or None, "B")
    with session, bar, ThreadPoolExecutor(workers) as pool:
        try:
            ends = pool.map(lambda name: _download(session, url + name, folder / name, bar), names)
            for count, (name, problem) in enumerate(zip(names, ends), 1):
                if problem:
                    problems.append(f"  {name}: {problem}\n")
                bar.set_postfix_str(f"{count}/{len(names)} files")
        except KeyboardInterrupt:  # the process would wait for threads, and they for a server
            print("FAIL: interrupted", file=sys.stderr, flush=True)
            os._exit(1)
    if problems:
        raise Failure(f"{len(problems)} of {len(names)} files are missing:\n{''.join(problems)}Run "
                      f"this again: what is complete is kept, what broke off goes on.\n{offline}")


def _download(session: requests.Session, url: str, path: Path, bar: tqdm.tqdm) -> str | None:
    """Fetch into FILE.part, resumed by Range; check it, rename it; return what went wrong."""
    shown, part = 0, path.with_name(f"{path.name}.part")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PATIENCE / 60 * 2**attempt)
        start = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            with session.get(url, headers=headers, stream=True) as response:
                code = response.status_code
                sent = response.headers.get("Content-Range", "")
                resumed = sent.startswith(f"bytes {start}-")
                if code == 416 or (code == 206 and not resumed):
                    why = "the server refused to go on from what was there"
                    part.unlink(missing_ok=True)
                    continue
                if code >= 400:
                    hint = "; is HF_TOKEN right?" if code in (401, 403) else ""
                    return f"HTTP {code} from {_host(response.url)}{hint}"
                with open(part, "ab" if resumed else "wb") as file:
                    for chunk in response.iter_content(2**16):
                        file.write(chunk)
                        bar.update(file.tell() - shown)
                        shown = file.tell()
        except (requests.RequestException, ValueError) as error:  # ValueError: an odd redirect
            asked = getattr(error, "request", None)  # by now perhaps of another host
            why = f"{_host(asked.url if asked else url)}: {cause(error)}"
            continue
        answers = (*response.history, response)
        tags = (answer.headers.get("X-Linked-ETag", "").strip('"').lower() for answer in answers)
        declared = next((tag for tag in tags if len(tag) == 64), None)
        digest = _sha256(part)
        try:
            if declared not in (None, digest):
                raise ValueError(f"SHA-256 is {digest[:12]}…, the server says {declared[:12]}…")
            pq.read_schema(part).field("text")
        except (pa.ArrowException, ValueError, OSError, KeyError) as error:
            why = f"{response.headers.get('Content-Type', 'something')} came: {cause(error)}"
            part.unlink(missing_ok=True)
        else:  # not in the try: should the file system refuse the name, the whole .part stays
            os.replace(part, path)
            return None
    return f"{why}; gave up after {ATTEMPTS} attempts"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # ValueError: a label is empty or too long
        rest = parts.path + parts.query + parts.fragment  # of a password with one of / ? #
        return (parts.scheme in ("http", "https", "socks5", "socks5h", "socks4")
                and host != b"" and parts.port != 0 and "@" not in rest and len(url.split()) == 1)
    except ValueError:
        return False


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]  # without a password


def cause(error: BaseException) -> str:
    """The innermost reason, a line without URLs, which may hold a password."""
    proxy = "the proxy: " * isinstance(error, requests.exceptions.ProxyError)
    while inner := error.__cause__ or error.__context__:
        error = inner
    return proxy + re.sub(r"://\S*", "://…", str(error) or repr(error)).splitlines()[0][:200]


def _unreadable(path: Path, error: BaseException) -> Failure:
    return Failure(f"cannot read {path} ({cause(error)}); if it is there, replace it or delete it, "
                   "and run: uv run prepare.py")


def _write_docstrings(folder: Path, names: list[str]) -> None:
    """Write the docstrings of PACKAGES, split and shuffled by hash, to files of these names."""
    print(f"reading the docstrings of {', '.join(PACKAGES)}", flush=True)
    file_of = {}  # of each text, the first time it is met
    for package in PACKAGES:
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            module = path.relative_to(root.parent).as_posix()
            if {"tests", "testing"} & set(module.split("/")):
                continue
            digit = hashlib.sha256(module.encode()).digest()[0] % 10
            file = {0: "val.parquet", 1: "test.parquet"}.get(digit, "train.parquet")
            source = path.read_text(encoding="utf-8", errors="replace")
            for text in map(inspect.cleandoc, re.findall(DOCSTRING_PATTERN, source, re.DOTALL)):
                if len(text) >= MIN_DOCSTRING:
                    file_of.setdefault(text, file)
    for name in names:
        texts = sorted((text for text in file_of if file_of[text] == name),
                       key=lambda text: hashlib.sha256(text.encode()).digest())
        pq.write_table(pa.table({"text": texts}), buffer := pa.BufferOutputStream())
        _write(folder / name, [buffer.getvalue()])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file of texts; a Failure names it if it is none, or if reading it fails."""
    try:
        with pq.ParquetFile(path) as file:
            kind = str(file.schema_arrow.field("text").type)
            if not re.match("(dictionary<values=)?(large_)?string", kind):
                raise ValueError(f"column `text` holds {kind}, not strings")
            yield file
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # no UTF-8, say
        raise _unreadable(path, error) from error


def _texts(file: pq.ParquetFile, group: int) -> list[str]:
    """The documents of a row group."""
    column = file.read_row_group(group, columns=["text"], use_threads=False).column(0)
    return [text or "" for text in column.to_pylist()]


# --------------------------------------------------------------------------------------------------
# Tokenizer

# GPT-4's split pattern, but numbers in groups of two digits: so few tokens have no room for three
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = 4  # reserved tokens, numbered after the merges; the first is BOS


class Tokenizer:
    """BPE over bytes; BOS, `<|reserved_0|>`, begins every document. Text never encodes to it."""

    def __init__(self, ranks: dict[bytes, int]):
        specials = {f"<|reserved_{i}|>": len(ranks) + i for i in range(SPECIALS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
        self.tokens = sorted(ranks, key=ranks.get)  # raw bytes, in order of their numbers

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> "Tokenizer":
        """Read tokenizer.tiktoken of a folder, the active contract's by default."""
        path = Path(directory or active_contract()[0].folder) / "tokenizer.tiktoken"
        try:
            pairs = (line.split() for line in path.read_bytes().splitlines())
            return cls({base64.b64decode(token, validate=True): int(rank) for token, rank in pairs})
        except Exception as error:  # OSError, ValueError, or what tiktoken raises
            raise _unreadable(path, error) from error

    def to_bytes(self) -> bytes:
        """tokenizer.tiktoken: per line a token's bytes in base64, and its rank."""
        ranked = enumerate(self.tokens)
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranked)

    def belongs_to(self, contract: Contract) -> bool:
        """Whether the contract's cache was made with it."""
        noted = _noted_sums(contract).get("tokenizer.tiktoken")
        return hashlib.sha256(self.to_bytes()).hexdigest() == noted

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Tokens of a text, or of each of a list, after `prepend`, a token or a special's name."""
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        if isinstance(prepend, str):
            prepend = self.encoding.encode_single_token(prepend)
        first = [] if prepend is None else [prepend]
        return first + self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        try:
            return encode(text)
        except ValueError:  # a million blanks in a row are too many for the pattern
            return np.concatenate([encode(text[i : i + 10**5]) for i in range(0, len(text), 10**5)])

    def decode(self, tokens: Iterable[int]) -> str:
        return self.encoding.decode(list(tokens))

    def get_vocab_size(self) -> int:
        return self.encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return len(self.tokens)

    def get_token_bytes(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """Bytes that each token stands for, int32 (V,), from its raw bytes; 0 for reserved ones."""
        lengths = [len(token) for token in self.tokens] + [0] * SPECIALS
        return torch.tensor(lengths, dtype=torch.int32, device=device)


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """Bytes of each token of the active contract's tokenizer, int32 (V,)."""
    return Tokenizer.from_directory().get_token_bytes(device)


def _train_tokenizer(contract: Contract, parts: list[Part]) -> Tokenizer:
    """Train on the first `tokenizer_chars` characters of the training text."""
    chars = 0

    def texts() -> Iterator[str]:
        nonlocal chars
        for name, start, stop in parts:
            with _opened(contract.folder / "parquet" / name) as file:
                groups = (_texts(file, group) for group in range(file.num_row_groups))
                for text in itertools.islice(itertools.chain.from_iterable(groups), start, stop):
                    text = text[: contract.tokenizer_doc_chars]
                    chars += len(text)
                    bar.update(len(text))
                    yield text
                    if chars >= contract.tokenizer_chars:
                        return

    trainer = rustbpe.Tokenizer()
    with _progress("train the tokenizer", None, " characters") as bar:
        trainer.train_from_iterator(texts(), contract.vocab_size - SPECIALS, pattern=SPLIT_PATTERN)
    if not chars:
        names = [name for name, _, _ in parts]
        raise Failure(f"no text to train on in {names} of {contract.folder}")
    if chars < contract.tokenizer_chars and contract.train_files > len(parts):
        print(f"note: with so few shards the tokenizer saw {chars:,} characters instead of "
              f"{contract.tokenizer_chars:,}, so the fingerprint is not the usual one. To train it "
              f"on more, delete {contract.folder / 'tokenizer.tiktoken'}")
    return Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})


# --------------------------------------------------------------------------------------------------
# Tokens on disk, and packing


def _tokenize(path: Path, tokenizer: Tokenizer) -> Iterator[bytes]:
    """Encode a parquet file, uint16, on all cores: tiktoken works without Python's lock."""
    bos = np.uint16(tokenizer.get_bos_token_id()).tobytes()

    def encode(group: int) -> bytes:
        with _opened(path) as file:
            texts = _texts(file, group)
        tokens = [tokenizer.encode_to_numpy(text).astype(np.uint16) for text in texts]
        bar.update()
        return b"".join(bos + document.tobytes() for document in tokens)

    with _opened(path) as file:
        groups = range(file.num_row_groups)
    bar = _progress(f"tokenize {path.name}", len(groups), " groups")
    with bar, ThreadPoolExecutor() as pool:
        yield from pool.map(encode, groups)


def read_documents(contract: Contract, parts: list[Part], bos: int) -> Iterator[np.ndarray]:
    """The tokenized documents of some parts in dataset order, uint16, memory-mapped."""
    for name, start, stop in parts:
        path = contract.folder / "token_ids" / f"{name}.bin"
        try:
            rows = pq.read_metadata(contract.folder / "parquet" / name).num_rows
            if not path.stat().st_size and not rows:
                continue
            tokens = np.asarray(np.memmap(path, np.uint16, "r"))  # a memmap is slow to slice
            starts = np.flatnonzero(tokens == bos)
            if len(starts) != rows:  # copied to a disk that was full, say
                raise ValueError(f"{len(starts):,} documents, and {rows:,} in its text")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        stops = np.append(starts[1:], len(tokens))
        for begin, end in zip(starts[start:stop].tolist(), stops[start:stop].tolist()):
            yield tokens[begin:end]


def pack_rows(documents: Iterable[np.ndarray], length: int,
              buffer_size: int = 1000) -> Iterator[np.ndarray]:
    """Best-fit packing: yield rows of `length` tokens, uint16, that begin with a document.

    Whenever the buffer holds fewer than `buffer_size` documents, the next 128 are read. A row
    takes the longest document that fits in what is left of it (the first that arrived among
    equals), again and again; when none fits, the shortest (first among equals) is cropped to fill
    it, and the rest of that one is thrown away. Ends when a finite stream cannot fill a row.

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


def _pack_exam(contract: Contract, split: str, bos: int) -> Iterator[bytes]:
    """The exam of a split, uint16 (rows, T + 1), in one piece: its first rows."""
    count, length = contract.eval_tokens // contract.max_seq_len, contract.max_seq_len + 1
    documents = read_documents(contract, [getattr(contract, split)], bos)
    rows = list(itertools.islice(pack_rows(documents, length), count))
    if all((row == bos).all() for row in rows):
        raise Failure(f"the {split} text of {contract.name} is too short for a row of {length}")
    if len(rows) < count:
        print(f"note: the {split} text fills {len(rows):,} of {count:,} rows; they repeat")
    yield np.resize(np.stack(rows), (count, length)).tobytes()


def prepare(contract: Contract, shards: int | None = None, workers: int = 8) -> Tokenizer:
    """Make what is missing in the contract's cache folder, and return its tokenizer.

    `shards`: training shards; None keeps what was last prepared. A second process waits.
    """
    folder = contract.folder
    with _locked(folder):
        shards = shards or _noted_shards(contract)
        parts = contract.train_parts(shards)
        names = list(dict.fromkeys(name for name, _, _ in [*parts, contract.val, contract.test]))
        (folder / "parquet").mkdir(exist_ok=True)
        missing = [name for name in names if not os.path.lexists(folder / "parquet" / name)]
        if missing and contract.dataset == DOCSTRINGS:
            _write_docstrings(folder / "parquet", missing)
        elif missing:
            _download_all(contract, missing, workers)

        made, before = ("tokenizer.tiktoken", "val.bin", "test.bin"), _noted_sums(contract)
        for name in made:
            path = folder / name
            if name in before and path.exists() and _sha256(path) != before[name]:
                print(f"{path} is not what it was when it was made; making it again")
                path.unlink()
        digest = _digest(dataclasses.asdict(dataclasses.replace(contract, time_budget=0)))
        edited = before.get("contract", digest) != digest
        anew = edited or not (folder / "tokenizer.tiktoken").exists()
        # A new tokenizer voids all tokens; exams without token_ids are an older commit's
        if anew or not (folder / "token_ids").exists():
            for path in [*folder.glob("*.bin"), *folder.glob("token_ids/*.bin")]:
                path.unlink()
        if anew:
            _write(folder / "tokenizer.tiktoken", [_train_tokenizer(contract, parts).to_bytes()])
        tokenizer = Tokenizer.from_directory(folder)
        for name in names:
            text, tokens = folder / "parquet" / name, folder / "token_ids" / f"{name}.bin"
            _derive(tokens, text, _tokenize(text, tokenizer))
        for split in ("val", "test"):
            tokens = folder / "token_ids" / f"{getattr(contract, split)[0]}.bin"
            rows = _pack_exam(contract, split, tokenizer.get_bos_token_id())
            _derive(folder / f"{split}.bin", tokens, rows)
        now = {name: _sha256(folder / name) for name in made} | {"contract": digest}
        if any(now.get(name) != sha for name, sha in before.items()):
            print("note: contract, tokenizer or exam is not that of before; scores do not compare")
        _note(folder / "SHA256SUMS", "".join(f"{sha}  {name}\n" for name, sha in now.items()))
        _note(folder / "shards", str(shards))
    return tokenizer


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in `folder`; the lock goes with its process. OSError is a Failure."""
    lock = filelock.FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process is preparing {folder}; waiting for it", flush=True)
            held = lock.acquire()
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            held = contextlib.nullcontext()  # nobody can write here, and a whole cache needs none
        with held:
            yield
    except BrokenPipeError:  # stdout's
        raise
    except OSError as error:
        raise Failure(f"cannot read or write the cache {folder} ({error}). Free some disk, or move "
                      "the cache with AUTORESEARCH_CACHE; what is complete is kept.") from error


# --------------------------------------------------------------------------------------------------
# Loader

Batch = tuple[torch.Tensor, torch.Tensor, int]  # x, y, epoch


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, buffer_size: int = 1000,
                    device: str | torch.device | None = None) -> Iterator[Batch]:
    """Yield (x, y, epoch) for ever: int64 (B, T) on the device, y is x one token on; epochs from 1.

    Rows are those of `pack_rows` over the split's documents, in an order that does not depend on
    B. Same cache, same rows. The tensors are the caller's to keep. The first batch of "train"
    begins the run: its evidence, and its watchdog, which `close()` ends.
    """
    contract, device = active_contract()[0], torch.device(device or default_device())
    if split not in ("train", "val", "test"):
        raise Failure(f"there is no split {split!r}; use train, val or test")
    if not tokenizer.belongs_to(contract):
        raise Failure(f"{contract.folder} was made with another tokenizer; run: uv run prepare.py")
    shards, bos = _noted_shards(contract), tokenizer.get_bos_token_id()
    parts = contract.train_parts(shards) if split == "train" else [getattr(contract, split)]
    if next(read_documents(contract, parts, bos), None) is None:  # all passes would be as empty
        raise Failure(f"no documents in {[name for name, _, _ in parts]} of {contract.folder}; put "
                      "text there, delete token_ids and run: uv run prepare.py")
    if split == "train":
        _RUN.begin(shards)
    epoch = 0

    def documents() -> Iterator[np.ndarray]:
        nonlocal epoch
        while True:
            epoch += 1
            yield from read_documents(contract, parts, bos)

    def batches() -> Iterator[Batch]:
        rows = pack_rows(documents(), T + 1, buffer_size)
        try:
            while True:
                _RUN.draw(B * T, split)
                batch = torch.from_numpy(np.stack(list(itertools.islice(rows, B))).astype(np.int64))
                if device.type == "cuda":  # torch reuses a pinned block after its copy
                    batch = batch.pin_memory().to(device, non_blocking=True)
                batch = batch.to(device)
                yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), epoch
        finally:
            if split == "train":
                _RUN.alive = None

    return batches()


# --------------------------------------------------------------------------------------------------
# Metric: the locked exam

LEAK_BPB = 0.001  # bits per byte: what all that a model must not know may be worth to it
LEAK_NATS = 0.05  # nats: how far it may move one target (rounding's share: tests/test_exam.py)
CHANCE_NATS = 0.001  # nats: how far one may move when the same batch is scored again


def evaluate_bpb(model: Callable, tokenizer: Tokenizer, batch_size: int) -> float:
    """Return bits per byte: how many bits the model needs for a byte of the exam's text.

    That is the sum of -ln p over the exam's targets / (ln 2 * the bytes those targets stand for),
    so it compares across vocabularies. `model(x)` maps int64 (B, T) to logits (B, T, V); its own
    loss is not used. Reserved tokens are in neither sum. Every batch size scores the same targets.
    Log-softmax in float32, sums in float64 on the host.

    The first batch is of random tokens and does not count: whoever adapts to it gains nothing. At
    last rows are scored again: unchanged; beside other rows, so that every two places of a batch
    are told apart; and with other tokens after a position, every position once. ExamError if that
    moves a score, or if exam or tokenizer are not the contract's. Appends a line to runs.jsonl.
    """
    contract, split, trained = active_contract()[0], active_split(), _RUN.elapsed()
    rows, places = load_exam(contract, split, tokenizer), torch.arange(batch_size)
    # All batches have one size, so that they compile once: the last goes on with the first rows
    batches = [rows[(start + places) % len(rows)] for start in range(0, len(rows), batch_size)]
    nll = _examine(model, batches, tokenizer)
    weights = tokenizer.get_token_bytes()[rows[:, 1:]]
    nats = nll[: len(rows)].cpu().where(weights > 0, 0).double().sum().item()
    bpb = nats / (math.log(2) * weights.sum().item())
    _RUN.write_evidence(contract, split, bpb, nll.device, trained)
    return bpb


def check_model(model: Callable, batch_size: int) -> None:
    """Try a sample of the exam's probes on rows drawn at random, in warm-up. Raises ExamError.

    All calls have the exam's shape: what does not fit into memory or compile fails here.
    """
    tokenizer = Tokenizer.from_directory()
    rows = load_exam(active_contract()[0], "val", tokenizer)
    batch = rows[np.random.default_rng().integers(len(rows), size=batch_size)]
    _examine(model, [batch], tokenizer, warm_up=True)


def load_exam(contract: Contract, split: str, tokenizer: Tokenizer) -> torch.Tensor:
    """The exam of a split, int32 (rows, T + 1); ExamError if it or the tokenizer is another one."""
    path = contract.folder / f"{split}.bin"
    if not tokenizer.belongs_to(contract):
        raise ExamError("the exam was made with another tokenizer; use Tokenizer.from_directory()")
    if not path.is_file() or _sha256(path) != _noted_sums(contract)[path.name]:
        raise ExamError(f"{path} is not the exam that was packed; run: uv run prepare.py")
    rows = np.fromfile(path, dtype=np.uint16).reshape(-1, contract.max_seq_len + 1)
    return torch.from_numpy(rows.astype(np.int32))


@torch.no_grad()
def _examine(model: Callable, batches: list[torch.Tensor], tokenizer: Tokenizer,
             warm_up: bool = False) -> torch.Tensor:
    """Return -ln p of the batches' targets, float32 (rows, T), in eval mode, on the model's device.

    ExamError for the first probe that moves a target or the score further than it may.
    """
    module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
    device = next((parameter.device for parameter in module.parameters()), default_device())
    token_bytes = tokenizer.get_token_bytes(device)
    batches = [batch.to(device) for batch in batches]
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()  # its own, too: it may put averaged weights in, and train() take them out
        # The first batch is random and does not count, see evaluate_bpb
        drawn = np.random.default_rng().integers(len(token_bytes), size=batches[0].shape)
        _, *nll = (_nll(model, batch[:, :-1], batch[:, 1:], len(token_bytes))
                   for batch in (torch.from_numpy(drawn).to(device), *batches))
        for what, limit, moved, weights in _probes(model, batches, nll, token_bytes, warm_up):
            moved, weights = moved.cpu().double(), weights.cpu()
            nats, position = moved.abs().max().item(), moved.abs().argmax().item() % moved.size(1)
            worth = moved[weights > 0].sum().item() / (math.log(2) * max(weights.sum().item(), 1))
            if nats > limit or abs(worth) > LEAK_BPB:
                raise ExamError(
                    f"the model {what}: the log-probability of a target moves by up to {nats:.3g} "
                    f"nats, at position {position} (limit {limit:.3g}), and the score by "
                    f"{worth:.4f} bits per byte (limit {LEAK_BPB}). Dropout, a statistic that goes "
                    "on in the exam and sums in random order (index_add_) can look like that, too")
        return torch.cat(nll)
    finally:
        module.train(modes[module])
        for part, mode in modes.items():
            part.training = mode
        _RUN.alive = None


def _probes(model: Callable, batches: list, nll: list, token_bytes: torch.Tensor,
            warm_up: bool) -> Iterator[tuple[str, float, torch.Tensor, torch.Tensor]]:
    """Change what a model must not know, and score what it still has to know.

    batches: int (B, T + 1) each; nll: -ln p of their targets, (B, T) each. Yields per probe: what
    a model does whose -ln p change; the limit in nats for one target; the changes, (rows, T); the
    targets' bytes, 0 where a change does not count for the score's.

    In warm-up a sample is tried. What a model says is faint then, and so are its leaks and its
    rounding: the limits are multiplied by the standard deviation of -ln p where it is below 1 nat.
    """
    (B, T), V = nll[0].shape, len(token_bytes)
    bits = (B - 1).bit_length()  # of the numbers of a batch's places: any two differ in one of them
    cuts = T - 1  # positions after which tokens change, each in a row of its own
    share = 1  # of CHANCE_NATS and LEAK_NATS; LEAK_BPB stays
    if warm_up:
        bits, cuts = min(1, bits), 2 * B
        share = min(1, max(0.01, torch.cat(nll).std().item()))  # 0.01: float32 rounds, too
    dice = np.random.default_rng()  # nobody can foresee it, and torch's own stays as it is

    def moves(number: int, changed: torch.Tensor) -> torch.Tensor:
        """Score a batch with other tokens where `changed`, (B, T)."""
        x, targets = batches[number][:, :-1], batches[number][:, 1:]
        others = (x + torch.from_numpy(dice.integers(1, V, (B, T))).to(x)) % V
        return _nll(model, torch.where(changed.to(x.device), others, x), targets, V) - nll[number]

    turns = dice.permutation(len(batches)).tolist()  # else a model could count its calls
    first = token_bytes[batches[turns[0]][:, 1:]]
    again = moves(turns[0], torch.zeros(B, T, dtype=torch.bool))
    yield "has memory or is random", share * CHANCE_NATS, again, first
    places = torch.from_numpy(dice.permutation(B))
    for bit, side in itertools.product(range(bits), (0, 1)):
        kept = (places >> bit) % 2 == side
        moved = moves(turns[0], ~kept[:, None].expand(B, T))[kept]
        yield "mixes rows of a batch", share * LEAK_NATS, moved, first[kept]
    positions, order = torch.arange(T), torch.from_numpy(dice.permutation(T - 1))
    moved, weights = [], []
    for turn, start in enumerate(range(0, cuts, B)):
        number = turns[turn % len(batches)]
        cut = order[(start + torch.arange(B)) % (T - 1)][:, None]  # (B, 1): tokens after it change
        until, at = (mask.to(batches[0].device) for mask in (positions <= cut, positions == cut))
        moved.append(moves(number, ~until).where(until, 0))
        weights.append(token_bytes[batches[number][:, 1:]].where(at, 0))
    yield "sees the future", share * LEAK_NATS, torch.cat(moved), torch.cat(weights)


def _nll(model: Callable, x: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """-ln p of each target, float32 (B, T); x, targets: int (B, T). ExamError for odd logits."""
    logits = model(x.to(torch.int64, copy=True))  # x alone: no storage that holds the targets
    seen = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if seen != (wanted := (*x.shape, vocab_size)):
        raise ExamError(f"model(x) returned {seen}; the exam needs logits of shape {wanted}")
    _RUN.alive = time.monotonic()
    # Row by row, because float32 logits of all rows would be a second tensor of that size
    nll = torch.stack([F.cross_entropy(row.float(), target, reduction="none")
                       for row, target in zip(logits, targets.long())])
    # A logit of -inf that is not the target's does not show in the loss
    if not (nll.isfinite().all() and logits.amin().isfinite()):
        raise ExamError("model(x) returned non-finite logits (its arithmetic, a mask of -inf, or "
                        "weights that diverged: a learning rate, a beta, an eps)")
    return nll


# --------------------------------------------------------------------------------------------------
# Evidence, watchdog, device

HANG_SECONDS = 600  # without a batch drawn or scored
HERE = Path(__file__).resolve().parent
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()  # that runs
OURS = SCRIPT.is_file() and SCRIPT.parent == HERE
EVIDENCE = HERE / "runs.jsonl" if OURS else Path("runs.jsonl")
THREADS = torch.get_num_threads()  # of the machine: an edit of train.py may take others


class _Run:
    """This process's run, from its first training batch on; a score leaves a line in runs.jsonl."""

    began = None  # when the first training batch was drawn, by time.monotonic()
    alive = None  # when a batch was last drawn or scored; None: the watchdog has nothing to watch
    tokens = held_out_tokens = evaluations = 0
    compared = frozenset()  # files that `changed` has looked at

    @functools.cached_property
    def facts(self) -> dict:
        """What runs, as it is when first asked for: train.py may be edited meanwhile."""
        commit = _git("rev-parse", "HEAD")
        return {
            "commit": commit, "dirty": self.changed(commit) if commit and OURS else None,
            "script": SCRIPT.name if SCRIPT.is_file() else None,
            "train_sha256": _sha256(SCRIPT) if SCRIPT.is_file() else None,
            "prepare_sha256": _sha256(Path(__file__)),
        }

    def changed(self, commit: str) -> bool | None:
        """Whether script, or what it imported from here since the last look, is not the commit's.

        Python itself, its packages, what torch compiled and the hub's snapshots may lie here, too.
        """
        modules = {str(getattr(module, "__file__", None)) for name, module in [*sys.modules.items()]
                   if not name.startswith("torch.")}
        others = re.compile(f"^{re.escape(os.path.dirname(os.__file__))}|site-packages|snapshots")
        own = {file for file in modules if file.startswith(f"{HERE}{os.sep}")
               and file.endswith(".py") and not others.search(file)}
        own = (own | {str(SCRIPT)}) - self.compared
        self.compared |= own
        names = [Path(file).relative_to(HERE).as_posix() for file in own]
        now = _git("hash-object", "--", *names)  # git status believes flags that hide a change
        then = _git("rev-parse", *(f"{commit}:./{name}" for name in names))
        return None if now is None else now != then

    def begin(self, shards: int) -> None:
        self.facts.update(seed=torch.initial_seed(), shards=shards)  # before either can change
        try:
            if EVIDENCE.exists() and not EVIDENCE.is_file():
                raise OSError("it is no plain file")
            with open(EVIDENCE, "a+b") as file:
                file.seek(max(file.tell() - 1, 0))
                if file.read() not in b"\n":  # an editor took the last line end away
                    file.write(b"\n")
        except OSError as error:
            raise Failure(f"cannot write the record of this run, {EVIDENCE} ({error})") from error

    def draw(self, tokens: int, split: str) -> None:
        if split != "train":
            self.held_out_tokens += tokens
            return
        if self.began is None:
            self.began = time.monotonic()
            threading.Thread(target=self.watch, daemon=True).start()
        self.alive = time.monotonic()
        self.tokens += tokens

    def watch(self) -> None:
        """End a run that hangs, so that it does not stop the night: tracebacks, then the reason."""
        waited, seen, nap = 0.0, None, min(1, HANG_SECONDS / 4)
        while waited < HANG_SECONDS:  # not by the clock, which goes on while a process is stopped
            waited = (waited + nap) if self.alive and self.alive == seen else 0.0
            seen = self.alive
            time.sleep(nap)
        with contextlib.suppress(Exception):  # stderr may be closed
            faulthandler.dump_traceback(file=sys.__stderr__)
        print(f"FAIL: for {HANG_SECONDS} s no batch was drawn and none was scored: the run hangs "
              "where the tracebacks above say. If a step takes that long, make it smaller",
              file=sys.__stderr__, flush=True)
        os._exit(1)

    def elapsed(self) -> float | None:
        """Seconds since the first training batch was drawn."""
        return None if self.began is None else round(time.monotonic() - self.began, 1)

    def write_evidence(self, contract: Contract, split: str, bpb: float, device: torch.device,
                       trained: float | None) -> None:
        self.evaluations += 1
        if self.facts["dirty"] is False:  # what was imported in main
            self.facts["dirty"] = self.changed(self.facts["commit"])
        line = json.dumps({  # `facts` has seed and shards of a run that trained, as it began
            "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "seed": torch.initial_seed(), "shards": _noted_shards(contract), **self.facts,
            "contract": fingerprint(contract), "split": split, "bpb": bpb,
            "evaluation": self.evaluations, "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens, "training_seconds": trained,
            "seconds": self.elapsed(), "peak_memory_mb": peak_memory_mb(device),
            "device": device_name(device), "torch": torch.__version__,
        })
        try:
            with open(EVIDENCE, "ab") as file:
                file.write(f"{line}\n".encode())  # in one piece: lines of two runs do not mix
        except OSError as error:
            print(f"note: {EVIDENCE} could not be written ({error}); its line is:\n{line}")


_RUN = _Run()


def _git(*arguments: str) -> str | None:
    """What git says in this repo, or None if it does not answer."""
    other = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # of the repo whose hook runs this, say
    env = {name: value for name, value in os.environ.items() if name not in other}
    options = dict(stderr=subprocess.DEVNULL, text=True, timeout=10, env=env)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(["git", "-C", HERE, *arguments], **options).strip()


def default_device() -> torch.device:
    """CUDA or ROCm, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; kernels on torch's stable ABI name only the call that failed."""
    signs = "out of memory|allocate memory|not enough memory|\"aten::(new_empty\"|empty)"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(signs, str(error).lower()))


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak allocation on a CUDA/ROCm device, elsewhere the process's peak resident set; MiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with contextlib.suppress(ImportError):  # Windows
        import resource
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor} {device.type}, {THREADS} threads"


# --------------------------------------------------------------------------------------------------
# Verdict


def verdict() -> str:
    """The keep rule of program.md for HEAD: its figures, and last what follows from them.

    results.tsv says which commit is the baseline and which the best (the last kept one), runs.jsonl
    has the scores. They compare seed by seed: most of what a seed does, it does to all.
    """
    head = (_git("rev-parse", "HEAD") or "")[:7]
    if not head:
        raise Failure("--verdict compares commits, and git knows none here")
    ledger = _read(HERE / "results.tsv", "replace").lower()
    rows = [[cell.strip(' "*`_') for cell in f"{line}\t".split("\t")]
            for line in ledger.splitlines() if line.count("\t") > 2]
    if ledger and (not rows or "\0" in ledger):  # UTF-16
        raise Failure("results.tsv has no cells with tabs between them; save it as text with tabs")
    # Of each row: commit, `keep`, `disc` or another status, text
    rows = [(row[0][:7], row[3][:4].replace("kept", "keep"), row[4]) for row in rows]
    runs = []
    for line in _read(HERE / "runs.jsonl", "replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):  # not ours, cut
            run = {"script": "train.py", "evaluation": 1} | json.loads(line)
            if (run["script"], run["dirty"], run["split"]) == ("train.py", False, "val"):
                runs.append(run | {"commit": run["commit"][:7], "bpb": round(run["bpb"], 6),
                                   "seed": int(run["seed"]), "evaluation": int(run["evaluation"])})
    again = any(run["commit"] == head and run["evaluation"] > 1 for run in runs)
    runs = [run for run in runs if run["evaluation"] == 1]

    def of(commit: str, seed: int, what: str = "bpb") -> list:
        """What the runs of a commit and a seed say, in order; 1 stands for none."""
        return [run.get(what) or 1 for run in runs
                if run["commit"] == commit and run["seed"] == seed]

    def behind(commit: str) -> bool:
        return _git("merge-base", "--is-ancestor", commit, "HEAD") is not None

    if not of(head, 42):
        seeds = sorted({run["seed"] for run in runs if run["commit"] == head})
        others = f"; it has seeds {seeds}: does train.py set one?" if seeds else ""
        return (f"verdict: run SEED=42 (runs.jsonl has no such run of {head} as committed, "
                f"on the split val{others})")
    every = runs
    for same in ("contract", "device", "shards", "torch", "prepare_sha256"):
        newest = of(head, 42, same)[-1]
        runs = [run for run in runs if (run.get(same) or 1) == newest]
    baseline = re.compile(
        r"((new|first|initial|the) )?baseline(\W*|\W*\d+\W*|\W+(again|re-?run|runs?|seed|n|on|"
        r"for|of|default|unchanged|unmodified|original|no change)\b.*)")
    named = [commit for commit, _, text in reversed(rows) if baseline.fullmatch(text)]
    usable = [commit for commit in named if of(commit, 42)]
    base = next(filter(behind, usable), usable[0] if usable else head)
    missing = [f"SEED={seed}" for seed in (42, 43) for _ in range(2 - len(of(base, seed)))]
    if missing:
        more = f"{len(missing)} more run{'s' * (len(missing) > 1)}"
        note = ""
        if any(run["commit"] in named and run["commit"] not in usable for run in every):
            note = ("note: the baselines of results.tsv ran on another machine, contract, torch or "
                    "prepare.py. Is HEAD an attempt? Step 7 then, and a new baseline\n")
        elif not named and any(status == "keep" for _, status, _ in rows):
            note = "note: no row of results.tsv has the text `baseline`\n"
        return f"{note}verdict: baseline: {more} of {base}: {', '.join(missing)}"

    runs = list(itertools.dropwhile(lambda run: run["commit"] != base, runs))  # this session's
    if not of(head, 42):
        return f"verdict: run SEED=42 ({head} has no run since the baseline, {base}, was run)"
    # A commit's last row but crashes counts, in the order of first rows: a dict keeps a key's place
    last = {commit: status for commit, status, _ in rows if status in ("keep", "disc")}
    kept = [commit for commit in reversed(last) if last[commit] == "keep"] + [base]
    best = next((commit for commit in kept if of(commit, 42) and behind(commit)), base)
    equal = [key for key in {(run["commit"], run["seed"]) for run in runs} if len(of(*key)) > 1]
    noise = 1.5 * max(np.ptp(of(*key)) for key in equal)
    jitter = max(1 - min(of(*key, "tokens")) / max(of(*key, "tokens")) for key in equal)
    memory, of_base, of_best = (max(of(one, 42, "peak_memory_mb")) for one in (head, base, best))
    free = max(2 * of_base, 1.05 * of_best)  # what was kept pays for its memory once
    both = [seed for seed in (42, 43) if of(head, seed) and of(best, seed)]
    change = [np.mean(of(head, seed)) - np.mean(of(best, seed)) for seed in both]
    mean = np.mean(change)
    tokens = [np.mean(of(head, seed, "tokens")) / np.mean(of(best, seed, "tokens")) - 1
              for seed in both]
    apart = max(0.05, jitter)
    faster = max(tokens) > apart
    took, budget = (max(of(commit, 42, "training_seconds")) for commit in (head, base))
    late = took > 1.05 * budget
    blind = max(of(head, 42, "tokens")) == 1 and max(of(base, 42, "tokens")) > 1
    peeked = any(max(of(head, seed, "held_out_tokens")) > 1 for seed in both)
    changed = _git("diff", "--text", "--numstat", best, head, "--", "train.py")
    if changed is None:
        raise Failure(f"git does not know {best}, the best commit of results.tsv")
    added, removed = map(int, (changed or "0 0").split()[:2])
    # SEED=42: below `sure` keep, below `worth` run 43. Then keep if the mean is below `limit`
    sure, worth, limit = -noise, 0.0, -noise / 3
    if added - removed <= -10:  # less code may cost a little
        worth, limit = noise, noise / 3
    elif added - removed >= 20:  # much code has to gain more
        limit = -noise
    if memory > free:  # a bigger table always buys a little
        sure = worth = limit = -10 * noise
    if head == best:
        word = "this is the best commit; go on with the next idea"
    elif change[0] >= worth or late or blind or peeked:
        word = "discard"
    elif change[0] < sure and not faster:  # else the machine may have been
        word = "keep"
    elif len(change) == 2:
        word = "keep" if mean < limit else "discard"
    elif of(best, 43):
        word = "run SEED=43"
    else:
        word = f"run BEST under SEED=43 ({best}; after it, this one)"
    odd = [commit for commit, status, _ in rows if status not in ("keep", "disc", "cras", "stat")]
    speed = ": SLOWER" if min(tokens) < -apart else ": FASTER" if faster else ""
    notes = [
        (again, f"{head} evaluates more than once; the first score of a run counts"),
        (late, f"{head} trained for {took:g} s, the baseline for {budget:g} s"),
        (blind, f"{head} drew no batch of the split train: what did it learn from?"),
        (peeked, f"{head} drew batches of the split val or test, which a run must not know"),
        (kept[0] != best, f"{kept[0]} is kept last in results.tsv, but has no such run under "
                          "SEED=42 or is not behind HEAD"),
        (odd, f"the status of {', '.join(odd)} in results.tsv is not keep, discard or crash"),
        (speed, "if the change does not explain that speed, it is a `slow machine`"),
        (jitter > 0.1, "equal runs differ much: stop what else runs here or, on CPU cores, give "
                       "every run OMP_WAIT_POLICY=PASSIVE; then, once, a new baseline")]
    note = "".join(f"note: {text}\n" for holds, text in notes if holds)
    return f"""best {best}: SEED=42 {of(best, 42)}, SEED=43 {of(best, 43)}
HEAD {head}: SEED=42 {of(head, 42)}, SEED=43 {of(head, 43)}
noise: {noise:.6f}, 1.5 x the largest difference between equal runs (n = {len(equal)})
HEAD - best: {", ".join(f"{by:+.6f}" for by in change)}, mean {mean:+.6f}
limits: below {sure:+.6f} keep, below {worth:+.6f} run the other seed, then keep a mean below {limit:+.6f}
lines of code: +{added} -{removed}; memory: {memory:.0f} MB, free up to {free:.0f} MB
tokens trained: {", ".join(f"{by:+.1%}" for by in tokens)}, equal runs differ by {jitter:.1%}{speed}
{note}verdict: {word}"""


# --------------------------------------------------------------------------------------------------
# Command line


def run_main(main: Callable[[], None]) -> None:
    """Call a script's main; whatever ends it, the last line says why in short."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it was closed
    for stream in (sys.stdout, sys.stderr):  # in order in one log, and no character stops a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="replace", newline="\n")
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a number without a name, in a container say; torch wants a name
        os.environ["USER"] = f"user-{os.getuid()}"
    _ = _RUN.facts  # what runs is what is there now, whatever is edited or committed meanwhile
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
    except Exception as error:  # its message may be longer than what is read of a log
        traceback.print_exc()
        sys.exit(f"FAIL: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def describe(contract: Contract, why: str) -> str:
    """The first lines that prepare.py and train.py print."""
    return f"contract: {contract.name} ({why}); cache: {contract.folder}\n{unseen_gpu()}".rstrip()


def unseen_gpu() -> str:
    """A line on a GPU that is here and that torch does not see, and why; empty if there is none."""
    shown = [os.environ.get(f"{maker}_VISIBLE_DEVICES") for maker in ("CUDA", "HIP", "ROCR")]
    if "" in shown or "-1" in shown or torch.cuda.is_available():
        return ""
    named = ", or a _VISIBLE_DEVICES variable names no card that is here" * any(shown)
    if shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia"):
        gpu, needs, build = "NVIDIA", "CUDA", torch.version.cuda
        why = "its driver is too old for that, or not loaded"
    elif os.path.exists("/dev/kfd"):
        gpu, needs, build = "AMD", "ROCm", torch.version.hip
        why = "it is no such card, or /dev/kfd is closed to you (groups render, video)"
    else:
        return ""
    problem = f"for {needs} {build}: {why}{named}" if build else f"without {needs}"
    return (f"An {gpu} GPU is here but not used: torch {torch.__version__} is built {problem}; "
            "see README, Other machines")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare data, tokenizer and exam of a contract.")
    parser.print_usage = lambda file=None: None  # a bad value gets one line
    parser.add_argument("--contract", choices=list(CONTRACTS), help="prepare and remember this one")
    parser.add_argument("--num-shards", type=int, metavar="N",
                        help=f"training shards, -1: all (default {DEFAULT_SHARDS} or as last time)")
    parser.add_argument("--download-workers", type=int, metavar="N", default=8,
                        help="files at a time, up to 64 (default 8)")
    parser.add_argument("--verdict", action="store_true", help="only apply the keep rule to HEAD")
    arguments = parser.parse_args()
    if arguments.verdict:
        return print(verdict())
    contract, why = active_contract(arguments.contract)
    print(describe(contract, why), flush=True)
    shards = contract.train_files if arguments.num_shards == -1 else arguments.num_shards
    if shards is not None and not 1 <= shards <= contract.train_files:
        parser.error(f"--num-shards {shards}: it takes 1 to {contract.train_files}, or -1 for all")
    if not 1 <= arguments.download_workers <= 64:
        parser.error(f"--download-workers {arguments.download_workers}: it takes 1 to 64")
    start = time.monotonic()
    prepare(contract, shards, arguments.download_workers)
    if arguments.contract:
        with _locked(cache_dir()):
            _note(cache_dir() / "active", contract.name)
    print(f"ready: {fingerprint(contract)} in {time.monotonic() - start:.1f} s; now: uv run train.py")


if __name__ == "__main__":
    run_main(main)
