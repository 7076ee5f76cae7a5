"""
Three figures about data, each a comparison within one run; by hand, on an idle machine:

    uv run tests/bench_data.py [PARQUET]

PARQUET: a file with a `text` column, say a downloaded shard; else text is made up. (1) Rows per
second in one thread: pack_rows against a scan of the waiting documents, of tokens or tokenising on
the fly (targets: 4 and 10 times as many). (2) MB/s: tokenising a shard on all cores against
tiktoken in one thread. (3) Seconds of a second prepare on the complete cache (target: 2).
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_loader import naive_rows  # noqa: E402

import prepare  # noqa: E402

DOCUMENTS, LENGTH, BUFFER, REPEATS = 20_000, 2049, 1000, 3  # about 100 MB of text
ALL = ("shard_00000.parquet", 0, None)
CONTRACT = dataclasses.replace(prepare.CONTRACTS["climbmix"], train_files=1, val=ALL, test=ALL,
                               tokenizer_chars=2 * 10**7, eval_tokens=8 * 2**19)


def some_texts() -> list[str]:
    if len(sys.argv) > 1:
        batches = pq.ParquetFile(sys.argv[1]).iter_batches(1000, columns=["text"])
        texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
    else:
        draw = random.Random(0)
        words = ["".join(draw.choices("etaoinshrdluc", k=draw.randint(2, 9))) for _ in range(30_000)]
        texts = (" ".join(draw.choices(words, k=draw.randint(50, 1500))) for _ in itertools.count())
    return list(itertools.islice(texts, DOCUMENTS))


def seconds(job, *arguments) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        job(*arguments)
    return time.perf_counter() - start


def rate(rows, count: int) -> float:
    """Rows per second, the buffer being full already."""
    next(rows)
    return count / seconds(collections.deque, itertools.islice(rows, count), 0)


def show(name: str, values) -> None:
    middle, spread = statistics.median(values), f"{min(values):,.2f} to {max(values):,.2f}"
    print(f"  {name:<44} {middle:10,.2f} ({spread}, n={len(values)})", flush=True)


def main() -> None:
    texts = some_texts()
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents, {size:.0f} MB of text, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUTORESEARCH_CACHE"] = cache
        folder = Path(cache) / CONTRACT.name
        (folder / "parquet").mkdir(parents=True)
        pq.write_table(pa.table({"text": texts}), folder / "parquet" / ALL[0], row_group_size=1000)
        seconds(prepare.prepare, CONTRACT)
        tokenizer = prepare.Tokenizer.from_directory(folder)
        alone, everywhere, again = [], [], []
        for _ in range(REPEATS):
            again.append(seconds(prepare.prepare, CONTRACT))
            for path in folder.rglob("shard_00000.*"):
                path.suffix == ".parquet" or path.unlink()  # its tokens
            everywhere.append(size / (seconds(prepare.prepare, CONTRACT) - again[-1]))
            encoded = map(tokenizer.encoding.encode_ordinary, texts)
            alone.append(size / seconds(collections.deque, encoded, 0))
    bos = tokenizer.get_bos_token_id()
    on_the_fly = (tokenizer.encode(text, prepend=bos) for text in itertools.cycle(texts))
    documents = [np.array(next(on_the_fly), dtype=np.uint16) for _ in texts]
    packed = prepare.pack_rows(itertools.cycle(documents), LENGTH, BUFFER)
    lists = map(np.ndarray.tolist, itertools.cycle(documents))
    scanned, flying = (naive_rows(some, LENGTH, BUFFER) for some in (lists, on_the_fly))
    assert all(np.array_equal(next(packed), next(scanned)[0]) for _ in range(1000))
    pack, scan, fly = zip(*((rate(packed, 5000), rate(scanned, 300), rate(flying, 300))
                            for _ in range(REPEATS)))
    show("pack_rows, rows/s", pack)
    show("  times the scan's", np.divide(pack, scan))
    show("  times those of tokenising and scanning", np.divide(pack, fly))
    show("tokenising a shard, MB/s", everywhere)
    show("  times tiktoken's in one thread", np.divide(everywhere, alone))
    show("a second prepare on the complete cache, s", again)


if __name__ == "__main__":
    main()
