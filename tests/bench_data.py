"""
Rows per second in one thread: pack_rows against a scan of the waiting documents; by hand, on an idle machine:

    uv run tests/bench_data.py

The text is the active contract's training text, as it was prepared. The scan is of documents that
are tokenized already, or tokenizes on the fly (targets: 4 and 10 times as many rows as they).
"""

import collections
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_loader import naive_rows  # noqa: E402

import prepare  # noqa: E402

DOCUMENTS, LENGTH, BUFFER, REPEATS = 20_000, 2049, 1000, 3


def rate(rows, count: int) -> float:
    """Rows per second, the buffer being full already."""
    next(rows)
    start = time.perf_counter()
    collections.deque(itertools.islice(rows, count), 0)
    return count / (time.perf_counter() - start)


def show(name: str, values) -> None:
    middle, spread = statistics.median(values), f"{min(values):,.2f} to {max(values):,.2f}"
    print(f"  {name:<44} {middle:10,.2f} ({spread}, n={len(values)})", flush=True)


def main() -> None:
    contract, tokenizer = prepare.active_contract()[0], prepare.Tokenizer.from_directory()
    bos = tokenizer.get_bos_token_id()
    documents = list(itertools.islice(prepare.read_documents(contract, contract.train_parts(1), bos), DOCUMENTS))
    texts = [tokenizer.decode(document[1:]) for document in documents]
    print(f"{len(texts):,} documents of {contract.name}")
    packed = prepare.pack_rows(itertools.cycle(documents), LENGTH, BUFFER)
    lists = map(np.ndarray.tolist, itertools.cycle(documents))
    on_the_fly = (tokenizer.encode(text, prepend=bos) for text in itertools.cycle(texts))
    scanned, flying = (naive_rows(some, LENGTH, BUFFER) for some in (lists, on_the_fly))
    assert all(np.array_equal(next(packed), next(scanned)[0]) for _ in range(1000))
    pack, scan, fly = zip(*((rate(packed, 5000), rate(scanned, 300), rate(flying, 300)) for _ in range(REPEATS)))
    show("pack_rows, rows/s", pack)
    show("  times the scan's", np.divide(pack, scan))
    show("  times those of tokenizing and scanning", np.divide(pack, fly))


if __name__ == "__main__":
    main()
