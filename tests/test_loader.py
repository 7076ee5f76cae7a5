"""The loader: the rows of SPEC's paragraph exactly, in the same order always, and no batch lost, repeated or torn."""

import hashlib
import itertools
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, run
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

BOS = 65_535  # of documents made here


def naive_rows(documents, length, buffer_size):
    """SPEC's paragraph word by word: yield (row, documents read by then)."""
    documents, read, buffer = iter(documents), 0, []
    while True:
        row = []
        while len(row) < length:
            while len(buffer) < buffer_size:
                batch = list(itertools.islice(documents, 128))
                if not batch:
                    break
                buffer, read = buffer + batch, read + len(batch)
            if not buffer:
                return
            left = length - len(row)
            fitting = [document for document in buffer if len(document) <= left]
            if fitting:
                longest = max(len(document) for document in fitting)
                take = next(i for i, document in enumerate(buffer) if len(document) == longest)
            else:
                shortest = min(len(document) for document in buffer)
                take = next(i for i, document in enumerate(buffer) if len(document) == shortest)
            row += list(buffer.pop(take))[:left]
        yield row, read


def made_up(lengths) -> list[np.ndarray]:
    """Documents of these lengths that differ from each other: BOS, then the document's own token."""
    return [np.array([BOS] + [i] * (length - 1), dtype=np.uint16) for i, length in enumerate(lengths)]


@st.composite
def streams(draw):
    """(length of a row, document lengths in runs of equal ones, dealt out in turn)."""
    length = draw(st.integers(1, 40))
    one = st.one_of(st.sampled_from([1, 2, length, length + 1, max(length - 1, 1)]), st.integers(1, 4 * length))
    runs = draw(st.lists(st.tuples(one, st.integers(1, 60)), min_size=1, max_size=12))
    if draw(st.booleans()):
        return length, [size for size, repeat in runs for _ in range(repeat)]
    turns = itertools.zip_longest(*([size] * repeat for size, repeat in runs))
    return length, [size for turn in turns for size in turn if size]


@settings(max_examples=120, deadline=None)
@given(streams(), st.sampled_from([1, 2, 100, 129, 1000]))
def test_rows_are_those_of_the_naive_packing(stream, buffer_size):
    length, lengths = stream
    documents = made_up(lengths)
    rows = [row.tolist() for row in prepare.pack_rows(documents, length, buffer_size)]
    assert rows == [row for row, _ in naive_rows(documents, length, buffer_size)]
    assert all(row[0] == BOS for row in rows)


@settings(max_examples=40, deadline=None)
@given(streams())
def test_every_document_is_used_once_and_only_the_last_of_a_row_is_cropped(stream):
    length, lengths = stream
    seen = []
    for row in prepare.pack_rows(made_up(lengths), length):
        starts = np.flatnonzero(row == BOS)
        for start, stop in zip(starts, [*starts[1:], length]):
            if stop - start > 1:
                seen.append(row[start + 1])
                assert (row[start + 1 : stop] == row[start + 1]).all()
                assert stop - start == lengths[row[start + 1]] or stop == length
    assert len(seen) == len(set(seen))


def oracle(tokenizer, B: int, T: int, count: int, buffer_size: int = 1000, shards: int = 3):
    """The first batches of the train split from the texts themselves: (rows, epoch)."""
    texts = []
    for number in range(shards):
        path = prepare.Manifest(TINY).parquet(f"shard_{number:05d}.parquet")
        texts += pq.read_table(path).column("text").to_pylist()
    documents = [[tokenizer.get_bos_token_id(), *tokenizer.encode(text)] for text in texts]
    rows = naive_rows(itertools.cycle(documents), T + 1, buffer_size)
    for _ in range(count):
        batch = list(itertools.islice(rows, B))
        yield torch.tensor([row for row, _ in batch]), 1 + (batch[-1][1] - 1) // len(documents)


def drawn(loader, count: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """The first `count` batches; ends the loader's thread."""
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def same(first, second) -> bool:
    """Whether two lists of batches are equal, compared on the host."""
    return len(first) == len(second) and all(
        torch.equal(a.cpu(), b.cpu()) and torch.equal(c.cpu(), d.cpu()) and epoch == other
        for (a, c, epoch), (b, d, other) in zip(first, second)
    )


@pytest.mark.parametrize("B", [1, 3, 16, 128])
@pytest.mark.parametrize("buffer_size", [1000, 50])
def test_batches_and_epochs_are_the_oracles_for_every_batch_size(tiny, B, buffer_size):
    """The split holds 600 documents: fewer than the larger buffer, and read several times over."""
    T = 256
    count = 384 // B
    batches = drawn(prepare.make_dataloader(tiny, B, T, "train", buffer_size, device="cpu"), count)
    for (x, y, epoch), (rows, pass_) in zip(batches, oracle(tiny, B, T, count, buffer_size)):
        assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
        assert epoch == pass_
    assert batches[-1][2] >= 2


def test_the_epoch_counts_passes_begun_and_starts_at_1(tiny):
    batches = drawn(prepare.make_dataloader(tiny, 4, 64, "train", buffer_size=1, device="cpu"), 300)
    epochs = [epoch for _, _, epoch in batches]
    assert epochs[0] == 1 and epochs == sorted(epochs) and set(epochs) == set(range(1, epochs[-1] + 1))
    assert epochs == [epoch for _, epoch in oracle(tiny, 4, 64, 300, buffer_size=1)]


def digest(batches) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() + b"%d" % epoch for x, _, epoch in batches)).hexdigest()


def test_a_fresh_process_gives_the_same_batches_and_ends_with_its_thread_still_running(tiny):
    here = digest(drawn(prepare.make_dataloader(tiny, 16, 32, "train", device="cpu"), 20))
    code = """
import sys; sys.path.insert(0, "tests")
import itertools, conftest, prepare, test_loader
prepare.CONTRACTS["tiny"] = conftest.TINY
loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 16, 32, "train", device="cpu")
print(test_loader.digest(itertools.islice(loader, 20)))
assert loader.thread.is_alive()
"""
    done = run("-c", code, PYTHONHASHSEED="7", timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, here, "")


def test_val_is_one_pass_of_whole_batches(tiny):
    rows = list(prepare.pack_rows(prepare.Documents(prepare.Manifest(TINY), [TINY.val]), 33))
    loader = prepare.make_dataloader(tiny, 7, 32, "val", device="cpu")
    batches = list(loader)
    assert len(batches) == len(rows) // 7 and len(rows) % 7
    expected = np.stack(rows).astype(np.int64)[: 7 * len(batches), :-1]
    assert torch.equal(torch.cat([x for x, _, _ in batches]), torch.tensor(expected))
    assert list(loader) == []  # still at its end
    loader.close()


@pytest.mark.parametrize("accumulation", [1, 4, 16])
@pytest.mark.parametrize("pause", [0, 0.01])
def test_slow_and_fast_consumers_get_every_batch_once_and_may_keep_them(tiny, accumulation, pause):
    count = 48
    loader = prepare.make_dataloader(tiny, 4, 32, "train", device="cpu")
    kept, copies = [], []
    while len(kept) < count:
        group = [next(loader) for _ in range(accumulation)]
        copies += [(x.clone(), y.clone(), epoch) for x, y, epoch in group]
        kept += group
        time.sleep(pause)
        assert loader.ready.qsize() <= loader.PREFETCH
    loader.close()
    assert same(kept, copies)  # nothing was written into them later
    for (x, y, epoch), (rows, pass_) in zip(kept, oracle(tiny, 4, 32, count)):
        assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:]) and epoch == pass_


def test_an_exception_in_the_thread_reaches_the_consumer_after_the_good_batches(tiny, monkeypatch):
    documents = prepare.Documents.__iter__

    def breaks_off(self):
        yield from itertools.islice(documents(self), 500)
        raise OSError("the disk went away")

    monkeypatch.setattr(prepare.Documents, "__iter__", breaks_off)
    loader = prepare.make_dataloader(tiny, 2, 32, "train", buffer_size=10, device="cpu")
    good = 0
    with pytest.raises(OSError, match="the disk went away"):
        for _ in loader:
            good += 1
    assert good > 10
    with pytest.raises(OSError, match="the disk went away"):  # and again, not a hang
        next(loader)
    loader.close()


def test_close_ends_the_thread_at_any_time_and_no_batch_comes_after_it(tiny):
    for drawn_before in (0, 1, 30):
        loader = prepare.make_dataloader(tiny, 4, 32, "train", device="cpu")
        for _ in range(drawn_before):
            next(loader)
        loader.close()
        loader.close()
        assert not loader.thread.is_alive() and list(loader) == []
    assert "loader" not in [thread.name for thread in threading.enumerate()]


def test_another_tokenizer_is_refused(tiny):
    other = prepare.Tokenizer({bytes([i]): i for i in range(256)})
    with pytest.raises(prepare.Failure, match="not the tokenizer"):
        prepare.make_dataloader(other, 2, 32, "train", device="cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("accumulation", [1, 4, 16])
@pytest.mark.parametrize("guarded", [True, False])
def test_copies_queued_behind_long_kernels_are_never_torn(tiny, monkeypatch, accumulation, guarded):
    """Oracle: the same batches on the CPU. Without the events the very same check must see torn batches."""
    B, T, count = 64, 1024, 48
    expected = drawn(prepare.make_dataloader(tiny, B, T, "train", device="cpu"), count)
    if not guarded:
        for method in ("record", "synchronize"):
            monkeypatch.setattr(torch.cuda.Event, method, lambda *_: None)
    loader = prepare.make_dataloader(tiny, B, T, "train", device="cuda")
    batches = []
    while len(batches) < count:
        for _ in range(accumulation):
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms: the copy that next() queues waits for this kernel
            batches.append(next(loader))
    torch.cuda.synchronize()
    loader.close()
    assert all(x.dtype == y.dtype == torch.int64 and x.is_cuda and y.is_cuda for x, y, _ in batches)
    assert same(batches, expected) == guarded
