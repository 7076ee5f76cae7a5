"""
Rows per second of pack_rows in one thread, against a scan of the waiting documents, of tokens or
tokenising on the fly (targets: 4 and 10 times as many); by hand, on an idle machine:

    uv run tests/bench_data.py
"""

import collections
import itertools
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import rustbpe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare  # noqa: E402

DOCUMENTS, LENGTH, BUFFER, REFILL, REPEATS = 20_000, 2049, 1000, 128, 3  # about 100 MB of text


def some_texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdluc", k=draw.randint(2, 9))) for _ in range(30_000)]
    return [" ".join(draw.choices(words, k=draw.randint(50, 1500))) for _ in range(DOCUMENTS)]


def scanned_rows(documents):
    """Best-fit packing as one would write it first: read all that wait for each placement."""
    buffer = []
    while True:
        row, filled = np.empty(LENGTH, dtype=np.uint16), 0
        while filled < LENGTH:
            while len(buffer) < BUFFER:
                buffer.extend(itertools.islice(documents, REFILL))
            best, size = -1, 0
            for i, document in enumerate(buffer):
                if size < len(document) <= LENGTH - filled:
                    best, size = i, len(document)
            if best < 0:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            document = buffer.pop(best)[: LENGTH - filled]
            row[filled : filled + len(document)] = document
            filled += len(document)
        yield row


def rate(rows, count: int) -> float:
    """Rows per second, the buffer being full already."""
    next(rows)
    start = time.perf_counter()
    collections.deque(itertools.islice(rows, count), 0)
    return count / (time.perf_counter() - start)


def show(name: str, values) -> None:
    middle, spread = statistics.median(values), f"{min(values):,.2f} to {max(values):,.2f}"
    print(f"{name:<40} {middle:10,.2f} ({spread}, n={len(values)})", flush=True)


def main() -> None:
    texts, trainer = some_texts(), rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts[:4000]), 8188, pattern=prepare.SPLIT_PATTERN)
    tokenizer = prepare.Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})
    bos = tokenizer.get_bos_token_id()
    on_the_fly = (tokenizer.encode(text, prepend=bos) for text in itertools.cycle(texts))
    documents = [np.array(next(on_the_fly), dtype=np.uint16) for _ in texts]
    packed = prepare.pack_rows(itertools.cycle(documents), LENGTH, BUFFER)
    scanned, flying = scanned_rows(itertools.cycle(documents)), scanned_rows(on_the_fly)
    assert all(np.array_equal(next(packed), next(scanned)) for _ in range(1000))
    pack, scan, fly = zip(*((rate(packed, 5000), rate(scanned, 300), rate(flying, 300))
                            for _ in range(REPEATS)))
    show("pack_rows, rows/s", pack)
    show("  times the scan's", np.divide(pack, scan))
    show("  times those of tokenising and scanning", np.divide(pack, fly))


if __name__ == "__main__":
    main()
