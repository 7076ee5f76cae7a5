"""
Time the loader against the ways that a reader would try first, in one run on one thread; run by hand.

    uv run tests/bench_loader.py PARQUET [PARQUET ...]

Reads the column `text` of the files, trains a tokenizer of 8192 tokens on their beginning, writes a cache of ten
shards (the same one under ten names) to a temporary folder that is removed at the end. Prints a table.
"""

import collections
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

import prepare  # noqa: E402

T, BUFFER, ROUNDS, ROWS = 2048, 1000, 5, 300
TEXT_CHARS = 150_000_000  # at most so many are read


def scanned_rows(documents):
    """Scan the whole list of waiting documents for each placement."""
    buffer, stream = [], iter(documents)
    while True:
        row, filled = np.empty(T + 1, dtype=np.uint16), 0
        while filled <= T:
            while len(buffer) < BUFFER:
                buffer.extend(itertools.islice(stream, 128))
            left = T + 1 - filled
            best, size = -1, 0
            for i, document in enumerate(buffer):
                if size < len(document) <= left:
                    best, size = i, len(document)
            if best < 0:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            document = buffer.pop(best)[:left]
            row[filled : filled + len(document)] = document
            filled += len(document)
        yield row


def tokenized_on_the_fly(tokenizer, texts):
    """Tokenize 128 documents when they are needed."""
    texts = itertools.cycle(texts)
    while True:
        batch = list(itertools.islice(texts, 128))
        for tokens in tokenizer.encoding.encode_ordinary_batch(batch, num_threads=1):
            yield [tokenizer.get_bos_token_id(), *tokens]


def rate(rows, count: int) -> float:
    """Rows per second over `count` rows, the buffer being full already."""
    next(rows)
    start = time.perf_counter()
    collections.deque(itertools.islice(rows, count), maxlen=0)
    return count / (time.perf_counter() - start)


def private_mb() -> float:
    """Memory of the process that no file backs, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def main():
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    texts, chars = [], 0
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            if chars < TEXT_CHARS:
                texts += batch.column(0).to_pylist()
                chars += sum(len(text) for text in texts[-len(batch) :])
    trainer = prepare.rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts[:4000]), 8192 - prepare.SPECIALS, pattern=prepare.SPLIT_PATTERN)
    tokenizer = prepare.Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})
    documents = tokenizer.documents(texts)
    lengths = np.array([len(document) for document in documents])
    print(f"{len(texts):,} documents, {chars / 1e6:.0f} MB of text, {lengths.sum() / 1e6:.1f} M tokens; "
          f"{(lengths > T + 1).mean():.1%} of documents are longer than a row and hold "
          f"{lengths[lengths > T + 1].sum() / lengths.sum():.1%} of the tokens")

    pairs = zip(scanned_rows(documents), prepare.pack_rows(documents, T + 1, BUFFER))
    if not all(np.array_equal(scanned, packed) for scanned, packed in itertools.islice(pairs, 2000)):
        sys.exit("FAIL: pack_rows and the scan do not give the same rows")
    print("the first 2,000 rows are the same by scan and by pack_rows")

    ways = {
        "tokenize on the fly, scan": lambda: rate(scanned_rows(tokenized_on_the_fly(tokenizer, texts)), ROWS),
        "scan tokenized lists": lambda: rate(scanned_rows(itertools.cycle(documents)), ROWS),
        "pack_rows": lambda: rate(prepare.pack_rows(itertools.cycle(documents), T + 1, BUFFER), 10 * ROWS),
    }
    rates = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            rates[name].append(way())
    print(f"\nrows of {T + 1} tokens per second, buffer {BUFFER}, one thread; median (least, most), n={ROUNDS}")
    ours = statistics.median(rates["pack_rows"])
    for name, values in rates.items():
        ratio = f"pack_rows is {ours / statistics.median(values):.1f} x"
        print(f"  {name:<26} {statistics.median(values):8,.0f} ({min(values):,.0f}, {max(values):,.0f})  {ratio}")

    count, read, used = 10_000, [], []

    class Watched(np.ndarray):
        def __getitem__(self, key):  # pack_rows takes a document by slicing it to what is left of the row
            used.append((len(self), min(len(self), key.stop)))
            return np.asarray(self)[key]

    def watched():
        for document in itertools.cycle(documents):
            read.append(len(document))
            yield document.view(Watched)

    collections.deque(itertools.islice(prepare.pack_rows(watched(), T + 1, BUFFER), count), maxlen=0)
    cropped = sum(size - kept for size, kept in used) / sum(size for size, _ in used)
    waiting = collections.Counter(read) - collections.Counter(size for size, _ in used)
    tokens = sum(size * number for size, number in waiting.items())
    long = sum(number for size, number in waiting.items() if size > T + 1)
    print(f"\nafter {count:,} rows: {len(read):,} documents read; {cropped:.1%} of the tokens of those used were "
          f"cropped away; {sum(waiting.values()):,} documents wait, {long:,} of them longer than a row, the longest "
          f"{max(waiting):,} tokens; with them wait {tokens / sum(read):.1%} of the tokens read")

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(AUTORESEARCH_CACHE=folder, AUTORESEARCH_CONTRACT="climbmix")
        contract = prepare.CONTRACTS["climbmix"]
        manifest = prepare.Manifest(contract)
        manifest.folder.mkdir()
        manifest.update(tokenizer=tokenizer.digest(), shards=10)
        names = [name for name, _, _ in contract.train(10)]
        manifest.derived("").mkdir()
        np.concatenate(documents).tofile(manifest.derived(f"{names[0]}.tokens"))
        with open(manifest.derived(f"{names[0]}.offsets"), "wb") as file:
            np.save(file, np.cumsum([0, *lengths], dtype=np.int64))
        for name in names[1:]:
            for kind in ("tokens", "offsets"):
                os.link(manifest.derived(f"{names[0]}.{kind}"), manifest.derived(f"{name}.{kind}"))
        before, start = private_mb(), time.perf_counter()
        loader = prepare.make_dataloader(tokenizer, 128, T, "train", device="cpu")
        next(loader)
        startup, latencies, batches = time.perf_counter() - start, [], 40
        for _ in range(batches):
            time.sleep(0.1)
            start = time.perf_counter()
            next(loader)
            latencies.append(1000 * (time.perf_counter() - start))
        memory = private_mb() - before
        loader.close()
    print(f"\nten shards: first batch of 128 x {T} after {startup:.2f} s; then next() with 100 ms between takes "
          f"{statistics.median(latencies):.2f} ms (most {max(latencies):.2f}, n={batches}); private memory "
          f"+{memory:.0f} MB")


if __name__ == "__main__":
    main()
