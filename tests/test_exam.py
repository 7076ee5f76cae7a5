"""The exam: one number for one model, whatever the batch size; cheating and broken models are refused by name."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, TINY

import prepare
import train


def make_exam(monkeypatch, vocab_size: int, T: int, rows: int = 16) -> prepare.Tokenizer:
    """An active contract of any size with an exam of random rows (a token follows from the one before it, mostly)."""
    contract = dataclasses.replace(TINY, name="exam", vocab_size=vocab_size, max_seq_len=T, eval_tokens=rows * T)
    monkeypatch.setitem(prepare.CONTRACTS, "exam", contract)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "exam")
    prepare.active_contract.cache_clear()
    tokens = [bytes([i]) for i in range(256)] + [bytes([i % 256, i // 256]) for i in range(256, vocab_size - 4)]
    tokenizer = prepare.Tokenizer({token: rank for rank, token in enumerate(tokens)})
    manifest = prepare.Manifest(contract)
    manifest.folder.mkdir(parents=True)
    lines = (prepare.base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (manifest.folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    manifest.update(tokenizer=tokenizer.digest(), shards=1)
    for seed, split in enumerate(("val", "test")):
        path = manifest.derived(f"{split}.npy")
        path.parent.mkdir(exist_ok=True)
        np.save(path, some_rows(vocab_size, T, rows, seed).numpy().astype(np.uint16))
        manifest.update(**{split: prepare._sha256(path)})
    return tokenizer


def some_rows(vocab_size: int, T: int, rows: int, seed: int) -> torch.Tensor:
    """int64 (rows, T + 1): frequent and rare tokens, each followed three times in four by the same next one."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, T + 1, generator=draw) ** 3 * (vocab_size - 5)).long()
    follows = torch.rand(rows, T + 1, generator=draw) < 0.75
    for t in range(1, T + 1):
        x[:, t] = torch.where(follows[:, t], (x[:, t - 1] * 31 + 7) % (vocab_size - 4), x[:, t])
    x[:, 0] = vocab_size - 4
    return x


def honest_gpt(kind: str, vocab_size: int, T: int, dtype, depth: int, width: int, pattern: str, steps: int,
               compiled: bool = False, n_kv_head: int | None = None, bigram_rows: int = 4096, head_dim: int = 64):
    """A model of train.py after some optimizer steps, so that no projection is zero any more."""
    windows = train.window_sizes(pattern, depth, max(T // 8, 1), T)
    n_head = width // head_dim
    config = train.GPTConfig(vocab_size, T, depth, n_head, n_kv_head or n_head, width, windows, bigram_rows)
    device = torch.device(kind)
    model, optimizer = train.build(config, device, dtype, False, 0)
    rows = some_rows(vocab_size, T, 8, seed=5).to(device)
    with autocast(kind, dtype):
        for _ in range(steps):
            train.train_step(model, optimizer, [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())])
    if compiled:
        train.compile_parts()
    return model


def autocast(kind: str, dtype):
    return torch.autocast(kind, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


class FourierConvolution(nn.Module):
    """An honest spectral model: a long causal convolution per channel, by FFT over twice the length."""

    def __init__(self, vocab_size: int, T: int, width: int = 64, layers: int = 2):
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size, bias=False)
        decay = torch.exp(-torch.arange(T) / (T / 8))[:, None]
        self.filters = nn.ParameterList(decay * torch.randn(T, width) for _ in range(layers))
        self.mixes = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, idx):
        x, T = self.wte(idx), idx.size(1)
        for kernel, mix in zip(self.filters, self.mixes):
            spectrum = torch.fft.rfft(F.rms_norm(x, x.shape[-1:]).float(), 2 * T, dim=1)
            mixed = torch.fft.irfft(spectrum * torch.fft.rfft(kernel[:T], 2 * T, dim=0), 2 * T, dim=1)[:, :T]
            x = x + mix(mixed)
        return 15 * torch.tanh(self.lm_head(F.rms_norm(x, x.shape[-1:])).float() / 15)


def largest_deviation(monkeypatch, model, batch_size: int) -> float:
    """Run check_model; return the largest share by which its probes saw a log-probability move."""
    seen = []
    refuse = prepare._refuse_if_moved

    def record(before, after, what):
        before, after = before.clamp(-30, 30), after.clamp(-30, 30)
        seen.append(((before - after).abs().max() / before.abs().max().clamp(min=1)).item())
        refuse(before, after, what)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_refuse_if_moved", record)
        prepare.check_model(model, batch_size)
    return max(seen)


class Small(nn.Module):
    """Embedding, `mix` (B, T, C) -> (B, T, C) on top of it, head; the rest of the models here change one thing."""

    def __init__(self, vocab_size: int, mix=torch.zeros_like):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.lm_head = nn.Embedding(vocab_size, 32), nn.Linear(32, vocab_size, bias=False)
        self.mix = mix

    def forward(self, idx):
        x = self.wte(idx)
        return self.lm_head(x + self.mix(x))


def small_gpt(tokenizer, pattern="SL", dtype=torch.float32, steps=3, **options):
    return honest_gpt("cpu", tokenizer.get_vocab_size(), 32, dtype, 3, 64, pattern, steps, head_dim=32, **options)


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    monkeypatch.setattr(train, "BACKENDS", {})
    train.choose_attention(torch.device("cpu"), "sdpa")


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines() -> list[dict]:
    try:
        with open("runs.jsonl") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []


def bpb_row_by_row(model, tokenizer, split="val") -> float:
    """The formula for one row at a time, in float64, token bytes from the tokenizer's own decoder."""
    nats, count = 0.0, 0
    for row in np.load(prepare.Manifest(prepare.active_contract()[0]).derived(f"{split}.npy")).astype(np.int64):
        with torch.no_grad():
            logits = model(torch.from_numpy(row[None, :-1]))[0].double().numpy()
        for scores, target in zip(logits, row[1:]):
            if target < tokenizer.get_bos_token_id():
                nats += math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
                count += len(tokenizer.encoding.decode_single_token_bytes(int(target)))
    return nats / (math.log(2) * count)


# The number


@pytest.mark.parametrize("batch_size", [1, 7, 16, 128])
def test_bpb_is_the_row_by_row_oracles_for_every_batch_size(tiny, batch_size):
    """1e-6: float32 logits and losses, whose errors average out over 2,048 targets."""
    model = small_gpt(tiny)
    assert prepare.evaluate_bpb(model, tiny, batch_size) == pytest.approx(bpb_row_by_row(model, tiny), abs=1e-6)


def test_a_uniform_model_scores_its_closed_form(tiny):
    rows = np.load(prepare.Manifest(TINY).derived("val.npy"))
    assert rows.shape == (TINY.eval_tokens // TINY.max_seq_len, TINY.max_seq_len + 1)
    targets = rows[:, 1:][rows[:, 1:] < tiny.get_bos_token_id()].tolist()
    text_bytes = sum(len(tiny.encoding.decode_single_token_bytes(token)) for token in targets)
    expected = len(targets) * math.log2(tiny.get_vocab_size()) / text_bytes
    assert (rows[:, 1:] == tiny.get_bos_token_id()).any()  # reserved tokens are there to be left out
    uniform = lambda x: torch.zeros(*x.shape, tiny.get_vocab_size())  # noqa: E731
    assert prepare.evaluate_bpb(uniform, tiny, 7) == pytest.approx(expected, rel=1e-6)


def test_the_models_own_loss_is_never_used(tiny):
    class Flatters(Small):
        def forward(self, idx, targets=None):
            return super().forward(idx) if targets is None else torch.tensor(-37.8)

    honest, flatters = Small(tiny.get_vocab_size()), Flatters(tiny.get_vocab_size())
    assert prepare.evaluate_bpb(flatters, tiny, 16) == prepare.evaluate_bpb(honest, tiny, 16) > 0


def test_adding_a_constant_to_all_logits_changes_nothing(tiny):
    model = small_gpt(tiny)
    plain = prepare.evaluate_bpb(model, tiny, 16)
    assert prepare.evaluate_bpb(lambda x: model(x) + 100, tiny, 16) == pytest.approx(plain, abs=1e-4)
    assert prepare.evaluate_bpb(lambda x: model(x).double() - 1e6, tiny, 16) == pytest.approx(plain, abs=0.05)


def test_the_model_is_in_eval_mode_without_gradients_and_left_as_it_was(tiny):
    class Dropped(Small):
        def forward(self, idx):
            assert not self.training and not torch.is_grad_enabled()
            return super().forward(idx)

    model = Dropped(tiny.get_vocab_size())
    prepare.evaluate_bpb(model, tiny, 16)
    assert model.training
    model.eval()
    prepare.check_model(model, 16)
    assert not model.training


def test_the_model_gets_the_inputs_and_no_storage_that_holds_the_targets(tiny):
    seen = []

    class Grabs(Small):
        def forward(self, idx, targets=None, **more):
            assert targets is None and not more
            assert idx._base is None and idx.is_contiguous() and idx.storage_offset() == 0
            assert idx.untyped_storage().nbytes() == idx.numel() * idx.element_size()
            seen.append(tuple(idx.shape))
            logits = super().forward(idx)
            idx.zero_()  # writing into it spoils nobody's rows
            return logits

    spoiler, honest = Grabs(tiny.get_vocab_size()), Small(tiny.get_vocab_size())
    assert prepare.evaluate_bpb(spoiler, tiny, 7) == prepare.evaluate_bpb(honest, tiny, 7)
    assert set(seen) == {(7, 32)}  # one shape: one compilation


# Refusals


def future_attention(q, k, v, window):
    """Attention whose window is off by one to the right."""
    T = q.size(1)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = (distance >= -1) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


LEAKS = {
    "mean over time": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "spectral filter": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.linspace(1, 0, 17)[:, None], 32, 1),
    "cumulative max from the right": lambda x: x.flip(1).cummax(1)[0].flip(1),
    "chunk-wise recurrence": lambda x: x.unflatten(1, (-1, 8)).mean(2).repeat_interleave(8, 1),
    "chunks of two": lambda x: x.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1),
    "next token": lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "faint next token": lambda x: 0.05 * F.pad(x[:, 1:], (0, 0, 0, 1)),
    "token far ahead": lambda x: F.pad(x[:, 16:], (0, 0, 0, 16)),
    "norm over time": lambda x: -x + (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
}
MIXES = {
    "batch norm": lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "mean over the batch": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "in-batch retrieval": lambda x: (x @ x.roll(1, 0).mT).tril().softmax(-1).tril() @ x.roll(1, 0),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_model_that_sees_the_future_is_refused(tiny, leak, batch_size):
    model = Small(tiny.get_vocab_size(), LEAKS[leak])
    with pytest.raises(prepare.ExamError, match=r"sees the future: tokens after position \d+ change the logits"):
        prepare.check_model(model, batch_size)
    with pytest.raises(prepare.ExamError, match="sees the future"):
        prepare.evaluate_bpb(model, tiny, batch_size)
    assert lines() == []


@pytest.mark.parametrize("pattern", ["L", "SL"])
def test_attention_off_by_one_to_the_right_is_refused(tiny, monkeypatch, pattern):
    model = small_gpt(tiny, pattern)
    prepare.check_model(model, 16)
    monkeypatch.setitem(train.BACKENDS, "in use", future_attention)
    with pytest.raises(prepare.ExamError, match="sees the future: tokens after position 0 "):
        prepare.check_model(model, 16)


def test_a_masked_vocabulary_entry_or_a_constant_does_not_hide_a_leak(tiny):
    """Logits are compared as log-probabilities: a scale taken from the largest logit would be 1e9 here."""
    leaky = Small(tiny.get_vocab_size(), LEAKS["next token"])
    masked = torch.zeros(tiny.get_vocab_size())
    masked[-3:] = -1e9
    for hidden in (lambda x: leaky(x) + masked, lambda x: leaky(x) + 1e4):
        with pytest.raises(prepare.ExamError, match="sees the future"):
            prepare.check_model(hidden, 16)
    honest = Small(tiny.get_vocab_size())
    prepare.check_model(lambda x: honest(x) + masked, 16)


@pytest.mark.parametrize("mix", MIXES)
def test_a_model_whose_rows_depend_on_other_rows_is_refused(tiny, mix):
    model = Small(tiny.get_vocab_size(), MIXES[mix])
    with pytest.raises(prepare.ExamError, match=r"mixes rows: other rows of the batch change the logits of row \d+"):
        prepare.check_model(model, 16)


class Remembers(Small):
    """Logits sharpen from call to call, once `after` calls are over."""

    def __init__(self, vocab_size, after):
        super().__init__(vocab_size)
        self.calls, self.after = 0, after

    def forward(self, idx):
        self.calls += 1
        return super().forward(idx) * (1 + 0.1 * max(self.calls - self.after, 0))


def test_a_model_with_state_between_calls_is_refused_at_once(tiny):
    with pytest.raises(prepare.ExamError, match="has memory: the same batch, given twice"):
        prepare.check_model(Remembers(tiny.get_vocab_size(), 0), 16)


def test_a_model_that_begins_to_remember_during_the_exam_is_refused_at_its_end(tiny):
    with pytest.raises(prepare.ExamError, match="has memory: the first batch, scored again at the end"):
        prepare.evaluate_bpb(Remembers(tiny.get_vocab_size(), 12), tiny, 4)
    assert lines() == []


def broken(change):
    return lambda model: lambda x: change(model(x))


@pytest.mark.parametrize("wrong, message", [
    (broken(lambda logits: logits.index_fill(1, torch.tensor([5]), math.nan)), r"non-finite logits"),
    (broken(lambda logits: logits.index_fill(2, torch.tensor([5]), math.inf)), r"returned \d+ non-finite"),
    (broken(lambda logits: logits.index_fill(2, torch.tensor([5]), -math.inf)), r"non-finite logits"),
    (broken(lambda logits: logits[..., :-1]), r"returned \(4, 32, 337\); .* shape \(4, 32, 338\)"),
    (broken(lambda logits: F.pad(logits, (0, 1))), r"returned \(4, 32, 339\)"),
    (broken(lambda logits: logits[:, -1:]), r"returned \(4, 1, 338\)"),
    (broken(lambda logits: logits.flatten(0, 1)), r"returned \(128, 338\)"),
    (broken(lambda logits: (logits, None)), r"returned tuple; .*logits of shape"),
    (broken(lambda logits: None), r"returned NoneType"),
    (broken(lambda logits: logits.mean()), r"returned \(\)"),
])
def test_logits_of_a_wrong_kind_are_refused_by_what_was_seen(tiny, wrong, message):
    assert tiny.get_vocab_size() == 338
    model = wrong(Small(338))
    for ask in (lambda: prepare.check_model(model, 4), lambda: prepare.evaluate_bpb(model, tiny, 4)):
        with pytest.raises(prepare.ExamError, match=message):
            ask()
    assert lines() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_in_the_last_row_alone_is_refused(tiny, value):
    row = np.load(prepare.Manifest(prepare.active_contract()[0]).derived("val.npy"))[-1].astype(np.int64)
    no_target = (row[-1] + 1) % 338  # at the last position
    small = Small(338)

    def model(x):
        logits = small(x)
        logits[(x == torch.from_numpy(row[:-1])).all(dim=1), -1, no_target] = value
        return logits

    with pytest.raises(prepare.ExamError, match="non-finite logits in one of its batches"):
        prepare.evaluate_bpb(model, tiny, 4)


def test_a_tampered_exam_and_a_missing_one_are_refused(tiny):
    path = prepare.Manifest(TINY).derived("val.npy")
    rows = np.load(path)
    rows[3, 4] += 1
    np.save(path, rows)
    with pytest.raises(prepare.ExamError, match="val.npy is not the exam that was packed"):
        prepare.evaluate_bpb(Small(tiny.get_vocab_size()), tiny, 16)
    path.unlink()
    with pytest.raises(prepare.ExamError, match="val.npy is not the exam that was packed"):
        prepare.evaluate_bpb(Small(tiny.get_vocab_size()), tiny, 16)
    assert lines() == []


def test_another_tokenizer_is_refused(tiny):
    """One whose tokens claim more bytes would lower the number."""
    longer = {tiny.encoding.decode_single_token_bytes(i): i for i in range(tiny.get_bos_token_id())}
    longer[b" a much longer token"] = longer.pop(tiny.encoding.decode_single_token_bytes(300))
    with pytest.raises(prepare.ExamError, match="the tokenizer is not the one the exam was packed with"):
        prepare.evaluate_bpb(Small(tiny.get_vocab_size()), prepare.Tokenizer(longer), 16)


# Honest models are never refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern, options", [
    ("L", {}), ("S", {}), ("SL", {"n_kv_head": 1}), ("SSSL", {"bigram_rows": 0}), ("SSSSL", {"steps": 0})])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_honest_models_of_train_py_pass(tiny, dtype, pattern, options, batch_size):
    model = small_gpt(tiny, pattern, dtype, **options)
    with autocast("cpu", dtype):
        prepare.check_model(model, batch_size)


def test_a_compiled_model_scores_as_the_plain_one(tiny):
    """backend="eager": Dynamo's wrapper without the need for a C++ compiler."""
    model = small_gpt(tiny)
    compiled = torch.compile(model, dynamic=False, backend="eager")
    assert prepare.evaluate_bpb(compiled, tiny, 16) == prepare.evaluate_bpb(model, tiny, 16)


def test_bf16_logits_are_scored_in_float32(tiny):
    model = small_gpt(tiny)
    plain = prepare.evaluate_bpb(model, tiny, 16)
    rounded = lambda x: model(x).bfloat16()  # noqa: E731
    assert prepare.evaluate_bpb(rounded, tiny, 16) == pytest.approx(bpb_row_by_row(rounded, tiny), abs=1e-6)
    assert prepare.evaluate_bpb(rounded, tiny, 16) == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_causal_fourier_convolution_passes_with_room(tiny, monkeypatch, dtype):
    """Its rounding errors do come from later tokens; in bf16 they are the largest honest deviation known."""
    torch.manual_seed(0)
    model = FourierConvolution(tiny.get_vocab_size(), 32)
    with autocast("cpu", dtype):
        moved = max(largest_deviation(monkeypatch, model, batch_size) for batch_size in (1, 16))
    assert moved < prepare.PROBE_TOLERANCE / 2
    assert moved > 0 or dtype == torch.bfloat16  # whose rounding may swallow it whole, as on some CPUs


@pytest.mark.parametrize("mix", [
    lambda x: x.cumsum(1) / torch.arange(1, 33)[:, None], lambda x: x.cummax(1)[0], lambda x: x.roll(0, 1),
    lambda x: F.pad(x[:, :-1], (0, 0, 1, 0)), lambda x: F.layer_norm(x, (32,))])
def test_honest_ways_to_mix_the_past_pass(tiny, mix):
    prepare.check_model(Small(tiny.get_vocab_size(), mix), 16)


# Memory


class Hungry(Small):
    """Fits `limit` rows at once; fails at first outside the probes too."""

    def __init__(self, vocab_size, limit, error):
        super().__init__(vocab_size)
        self.limit, self.error = limit, error

    def forward(self, idx):
        if len(idx) > self.limit:
            raise self.error
        return super().forward(idx)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("MPS backend out of memory"),
                                   RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack.data(), '
                                                "TORCH_ABI_VERSION) API call failed at ops.h, line 117")])
def test_an_evaluation_that_does_not_fit_halves_its_batch_says_so_and_scores_the_same(tiny, capsys, error):
    expected = prepare.evaluate_bpb(Small(tiny.get_vocab_size()), tiny, 16)
    capsys.readouterr()
    hungry = Hungry(tiny.get_vocab_size(), 5, error)
    assert prepare.evaluate_bpb(hungry, tiny, 16) == pytest.approx(expected, abs=1e-6)
    said = capsys.readouterr().out
    assert "out of memory, going on with 8 rows" in said and "out of memory, going on with 4 rows" in said
    assert len(lines()) == 2


def test_an_error_that_is_not_about_memory_and_one_row_that_does_not_fit_are_raised(tiny):
    for limit, error in ((5, RuntimeError("wrong shapes")), (0, torch.OutOfMemoryError("out of memory"))):
        with pytest.raises(type(error), match=str(error)):
            prepare.evaluate_bpb(Hungry(tiny.get_vocab_size(), limit, error), tiny, 16)
    assert lines() == []


# Evidence, held-out split, watchdog

KEYS = {"time", "commit", "dirty", "train_sha256", "prepare_sha256", "contract", "split", "bpb", "seconds", "tokens",
        "peak_memory_mb", "device", "torch", "seed"}


def test_a_scored_run_leaves_one_line_that_says_what_ran(tiny):
    torch.manual_seed(43)
    loader = prepare.make_dataloader(tiny, 4, 32, "train", device="cpu")
    for _ in range(5):
        next(loader)
    bpb = prepare.evaluate_bpb(Small(tiny.get_vocab_size()), tiny, 16)
    loader.close()
    (line,) = lines()
    assert set(line) == KEYS
    assert line["bpb"] == bpb and line["split"] == "val" and line["contract"] == prepare.fingerprint()
    assert line["tokens"] == 5 * 4 * 32 and 0 <= line["seconds"] < 60 and line["peak_memory_mb"] > 1
    assert line["torch"] == torch.__version__ and line["device"] == prepare.device_name(torch.device("cpu"))
    for name in ("train", "prepare"):
        assert line[f"{name}_sha256"] == prepare._sha256(ROOT / f"{name}.py")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert line["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert isinstance(line["dirty"], bool)


def test_a_score_without_training_says_so_in_the_same_fields(tiny):
    prepare.evaluate_bpb(Small(tiny.get_vocab_size()), tiny, 16)
    (line,) = lines()
    assert set(line) == KEYS and line["seconds"] is None and line["tokens"] == 0


def test_the_seed_of_the_run_is_the_one_in_the_line_whatever_is_drawn_later(tiny):
    torch.manual_seed(43)
    next(loader := prepare.make_dataloader(tiny, 4, 32, "train", device="cpu"))
    Small(tiny.get_vocab_size())  # seeds with 0
    prepare.evaluate_bpb(Small(tiny.get_vocab_size()), tiny, 16)
    loader.close()
    assert lines()[0]["seed"] == 43


def test_the_held_out_split_scores_other_rows_and_the_line_says_so(tiny, monkeypatch):
    model = small_gpt(tiny)
    val = prepare.evaluate_bpb(model, tiny, 16)
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "test")
    test = prepare.evaluate_bpb(model, tiny, 16)
    assert test == pytest.approx(bpb_row_by_row(model, tiny, "test"), abs=1e-6) and test != val
    assert [line["split"] for line in lines()] == ["val", "test"]
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "train")
    with pytest.raises(prepare.Failure, match="AUTORESEARCH_SPLIT is 'train'; use val or test"):
        prepare.evaluate_bpb(model, tiny, 16)


def test_a_run_that_crashes_in_the_exam_leaves_no_line(tiny):
    class Crashes(Remembers):
        def forward(self, idx):
            if self.calls > 15:
                raise ZeroDivisionError
            return super().forward(idx)

    with pytest.raises(ZeroDivisionError):
        prepare.evaluate_bpb(Crashes(tiny.get_vocab_size(), 10**6), tiny, 4)
    assert lines() == []


CHILD = """
import sys; sys.path[:0] = ["{root}", "{root}/tests"]
import faulthandler, time, conftest, prepare, test_exam, torch
prepare.CONTRACTS["tiny"] = conftest.TINY
"""


def child(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD.format(root=ROOT) + code], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_run_that_is_killed_in_the_exam_leaves_no_line(tiny):
    process = child("""
class Stops(test_exam.Remembers):
    def forward(self, idx):
        if self.calls == 15: print("deep in the exam", flush=True); time.sleep(60)
        return super().forward(idx)
prepare.evaluate_bpb(Stops(338, 10**6), prepare.Tokenizer.from_directory(), 4)
""")
    assert process.stdout.readline() == "deep in the exam\n"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL and lines() == []
    process.communicate()


def test_two_processes_that_append_at_once_leave_whole_lines(tiny):
    code = """
run, cpu = prepare._RUN, torch.device("cpu")
run.facts = {{"commit": "x" * 3000}}
for i in range(200): run.write_evidence(conftest.TINY, "val", {number} + i / 1000, cpu)
"""
    processes = [child(code.replace("{{", "{").replace("}}", "}").replace("{number}", str(n))) for n in (1, 2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sorted(line["bpb"] for line in lines()) == [n + i / 1000 for n in (1, 2) for i in range(200)]
    for process in processes:
        process.communicate()


@pytest.mark.parametrize("budget, limit", [(1.0, 120), (60.0, 120), (300.0, 600)])
def test_the_watchdog_waits_twice_the_budget_and_at_least_two_minutes(tiny, monkeypatch, budget, limit):
    armed = []
    monkeypatch.setattr(prepare.faulthandler, "dump_traceback_later", lambda *a, **k: armed.append((*a, k["exit"])))
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", str(budget))
    prepare.active_contract.cache_clear()
    loader = prepare.make_dataloader(tiny, 4, 32, "val", device="cpu")
    next(loader)
    loader.close()
    assert armed == []  # no run begins with a look at the validation rows
    loader = prepare.make_dataloader(tiny, 4, 32, "train", device="cpu")
    assert armed == []
    next(loader), next(loader)
    loader.close()
    assert armed == [(limit, True)]


def test_a_run_that_hangs_ends_with_exit_code_1_and_every_threads_traceback(tiny):
    process = child("""
later = faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda seconds, **options: later(0.5, **options)
loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 4, 32, "train", device="cpu")
def hangs_here(): time.sleep(60)
next(loader)
hangs_here()
""")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert "Timeout" in err and "in hangs_here" in err and "in _fill" in err
    assert lines() == []


def test_closing_the_loader_ends_the_watchdog(tiny):
    process = child("""
later = faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda seconds, **options: later(0.5, **options)
loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 4, 32, "train", device="cpu")
next(loader)
loader.close()
time.sleep(1)
print("alive")
""")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "alive\n", "")


# On the GPU


@pytest.mark.cuda
@pytest.mark.parametrize("wanted, pattern, compiled, n_kv_head", [
    ("auto", "SSSSL", False, None), ("auto", "SSSSL", True, None), ("varlen", "SL", False, 1), ("sdpa", "SSSSL", False,
    None), ("sdpa", "L", False, 1)])
def test_honest_bf16_models_on_the_gpu_pass_and_the_largest_deviation_is_printed(
        monkeypatch, capsys, parts, wanted, pattern, compiled, n_kv_head):
    monkeypatch.setattr(train, "BACKENDS", {})
    backend, reason = train.choose_attention(torch.device("cuda"), wanted)
    make_exam(monkeypatch, 8192, 2048)
    model = honest_gpt("cuda", 8192, 2048, torch.bfloat16, 9, 640, pattern, 50, compiled, n_kv_head, 2**18, 128)
    with torch.autocast("cuda", torch.bfloat16):
        deviations = {B: largest_deviation(monkeypatch, model, B) for B in (32, 7, 1)}
        torch.cuda.synchronize()
        start = time.monotonic()
        prepare.check_model(model, 32)
        seconds = time.monotonic() - start
    with capsys.disabled():
        print(f"\n{backend} {pattern} compiled={compiled} kv={n_kv_head}: largest honest deviation by batch size "
              f"{ {B: f'{moved:.2e}' for B, moved in deviations.items()} }, check_model {seconds:.2f} s ({reason})")


@pytest.mark.cuda
def test_an_honest_fourier_convolution_on_the_gpu_passes(monkeypatch, capsys):
    make_exam(monkeypatch, 8192, 2048)
    torch.manual_seed(0)
    model = FourierConvolution(8192, 2048, width=640, layers=9).cuda()
    with autocast("cuda", torch.float32):
        deviations = {B: largest_deviation(monkeypatch, model, B) for B in (32, 7, 1)}
    with capsys.disabled():
        print(f"\nFourier convolution: { {B: f'{moved:.2e}' for B, moved in deviations.items()} }")
