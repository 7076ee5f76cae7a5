"""The loader: exactly best-fit rows, in the same order always; no batch lost, repeated or torn."""

import itertools

import pytest
import torch
from conftest import some_texts

import prepare


def naive_rows(documents, length, buffer_size):
    """The packing as pack_rows describes it, word by word: yield (row, documents read by then)."""
    documents, read, buffer = iter(documents), 0, []
    while True:
        row = []
        while len(row) < length:
            while len(buffer) < buffer_size and (batch := list(itertools.islice(documents, 128))):
                buffer, read = buffer + batch, read + len(batch)
            if not buffer:
                return
            left, sizes = length - len(row), [len(document) for document in buffer]
            fitting = [size for size in sizes if size <= left]
            take = sizes.index(max(fitting) if fitting else min(sizes))  # the first of that length
            row += list(buffer.pop(take))[:left]
        yield row, read


def encoded(tokenizer, *shards: int) -> list[list[int]]:
    """The documents of these shards of `tiny`, from the texts themselves."""
    bos, texts = tokenizer.get_bos_token_id(), itertools.chain(*map(some_texts, shards))
    return [[bos, *tokenizer.encode(text)] for text in texts]


def drawn(loader, count: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """The first `count` batches, all of them kept."""
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


@pytest.mark.parametrize("B, buffer_size, split, shards", [
    *((B, size, "train", (0, 1, 2)) for B in (1, 3, 16, 128) for size in (1000, 50, 1)),
    (7, 1, "val", (4,)), (7, 1000, "test", (3,))])
def test_batches_and_epochs_are_the_oracles_for_every_batch_size_and_split(tiny, B, buffer_size, split, shards):
    """A shard holds 200 documents: fewer than the largest buffer, and read several times over."""
    T, count, documents = 256, 384 // B, encoded(tiny, *shards)
    batches = drawn(prepare.make_dataloader(tiny, B, T, split, buffer_size, device="cpu"), count)
    oracle = naive_rows(itertools.cycle(documents), T + 1, buffer_size)
    for x, y, epoch in batches:
        rows, read = zip(*itertools.islice(oracle, B))
        rows = torch.tensor(rows)
        assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
        assert epoch == 1 + (read[-1] - 1) // len(documents)
    assert len(batches) == count and epoch >= 2


def test_another_tokenizer_a_split_that_there_is_not_and_one_without_text_are_refused(tiny, monkeypatch):
    other = prepare.Tokenizer({bytes([i]): i for i in range(256)})
    with pytest.raises(prepare.Failure, match="tokenizer"):
        next(prepare.make_dataloader(other, 2, 32, "train", device="cpu"))
    with pytest.raises(prepare.Failure, match="no split 'training'; use train, val or test"):
        prepare.make_dataloader(tiny, 2, 32, "training", device="cpu")
    monkeypatch.setattr(prepare, "read_documents", lambda *_: iter(()))  # it would look for one for ever
    with pytest.raises(prepare.Failure, match="no documents in "):
        prepare.make_dataloader(tiny, 2, 32, "train", device="cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("accumulation", [1, 4, 16])
@pytest.mark.parametrize("guarded", [True, False])
def test_copies_queued_behind_long_kernels_are_never_torn(tiny, monkeypatch, accumulation, guarded):
    """Oracle: the same batches on the CPU. One pinned buffer for all must fail the very same check."""
    B, T, count = 64, 1024, 48
    expected = drawn(prepare.make_dataloader(tiny, B, T, "train", device="cpu"), count)
    if not guarded:
        pinned, pin_memory = {}, torch.Tensor.pin_memory

        def reused(tensor, *arguments):
            key = tensor.shape, tensor.dtype
            buffer = pinned.setdefault(key, pin_memory(tensor.clone()))
            buffer.copy_(tensor)
            return buffer

        monkeypatch.setattr(torch.Tensor, "pin_memory", reused)
    loader = prepare.make_dataloader(tiny, B, T, "train", device="cuda")
    batches = []
    while len(batches) < count:
        for _ in range(accumulation):
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms; the copy that next() queues waits
            batches.append(next(loader))
    torch.cuda.synchronize()
    loader.close()
    assert all(x.dtype == y.dtype == torch.int64 and x.is_cuda and y.is_cuda for x, y, _ in batches)
    same = [torch.equal(x.cpu(), a) and torch.equal(y.cpu(), b) and epoch == pass_
            for (x, y, epoch), (a, b, pass_) in zip(batches, expected, strict=True)]
    assert all(same) == guarded
