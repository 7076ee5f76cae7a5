"""The exam: one number for one model, whatever the batch size; what a model must not know is refused.

What leaks are worth, measured on the demo's exam with a table of bigram counts (2.925 bpb): a bonus on the
next token's logit, by how much it lowers the score, and what the probes say of it (n = 1 each):

    everywhere        0.002 nats 0.0011, probes 0.0011    0.01 0.0053, 0.0053    0.15 0.0799, 0.0808
    one position      1 nat at 254: 0.0020, 0.0022        5 nats at 77: 0.0075, 0.0085
    some positions    5 nats at 200 to 249: 0.377, 0.394  at 65 to 119: 0.416, 0.423

How far honest models move a target (nats; limit LEAK_NATS): on a CPU in float32 the mixture of experts 1e-6, the other
kinds of HONEST 0. On an H100, float32 and bfloat16, T 2048, batches of 32 and 7: train.py's (fa3 compiled and not,
varlen, sdpa) and all kinds 0, but the convolution by FFT, 3.6e-5 in float32 and 0.048 under bfloat16 autocast.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, ROOT, TINY, commit, evidence, exam_rows, folder, forget, write_shards

import prepare
import train

V = 338  # the vocabulary of tiny


def leaky(bonus, places, smooth=0.0):
    """What followed each token in the exam, down to -20, and `bonus` nats on the next token at `places`."""
    rows, counts = exam_rows(), torch.full((V, V), 1e-6)
    pairs = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    counts.index_put_(pairs, torch.ones(()), accumulate=True)
    table = ((1 - smooth) * counts / counts.sum(1, keepdim=True) + smooth / V).log()

    def model(idx):
        known = torch.zeros(idx.size(1))
        known[places] = bonus
        known[-1] = 0  # nothing is there to be seen
        seen = idx.roll(-1, 1)[..., None]
        return table[idx].scatter_add(2, seen, known[None, :, None].expand(seen.shape).contiguous())

    return model


class Small(nn.Module):
    """Embedding, `mix` (B, T, C) -> (B, T, C) beside it, head; most models here change one thing of it."""

    def __init__(self, mix=torch.zeros_like):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.lm_head = nn.Embedding(V, 32), nn.Linear(32, V, bias=False)
        self.mix = mix

    def forward(self, idx):
        x = self.wte(idx)
        return self.lm_head(x + self.mix(x))


def counting(act):
    """An honest model; what `act` says of the number of a call, if anything, sharpens its logits."""
    small, calls = Small(), itertools.count(1)
    return lambda idx: small(idx) * (act(next(calls)) or 1)


def small_gpt(tokenizer, pattern="SL", dtype=torch.float32, steps=3, device=CPU, T=32, depth=3, width=64,
              head_dim=32, n_kv_head=None, bigram_rows=4096):
    """A model of train.py after some optimizer steps, so that no projection is zero any more."""
    windows = train.window_sizes(pattern, depth, max(T // 8, 1), T)
    n_head = width // head_dim
    config = train.GPTConfig(tokenizer.get_vocab_size(), T, depth, n_head, n_kv_head or n_head, width, windows,
                             bigram_rows)
    model, optimizer = train.build(config, device, dtype, False, 0)
    rows = exam_rows()[:8].to(device)
    with autocast(device, dtype):
        for _ in range(steps):
            train.train_step(model, optimizer, [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())])
    return model


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def refused(model, tokenizer, match, batch_size=16):
    with pytest.raises(prepare.ExamError, match=match):
        prepare.evaluate_bpb(model, tokenizer, batch_size)
    assert evidence() == []


# The number


def bpb_row_by_row(model, tokenizer, split="val") -> float:
    """The formula for one row at a time, in float64, token bytes from tiktoken's own decoder."""
    nats, count = 0.0, 0
    for row in exam_rows(split):
        with torch.no_grad():
            logits = model(row[None, :-1])[0].double().numpy()
        for scores, target in zip(logits, row[1:].tolist()):
            if target < tokenizer.get_bos_token_id():
                nats += math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
                count += len(tokenizer.encoding.decode_single_token_bytes(target))
    return nats / (math.log(2) * count)


def test_bpb_is_the_row_by_row_oracles_for_every_batch_size_and_whatever_constant_is_on_all_logits(tiny):
    """1e-6: float32 logits and losses, whose errors average out over 2,048 targets."""
    assert (exam_rows()[:, 1:] == tiny.get_bos_token_id()).any()  # there to be left out
    model = small_gpt(tiny)
    plain = bpb_row_by_row(model, tiny)
    for batch_size in (1, 7, 16, 128):
        assert prepare.evaluate_bpb(model, tiny, batch_size) == pytest.approx(plain, abs=1e-6), batch_size
    assert prepare.evaluate_bpb(lambda x: model(x) + 100, tiny, 16) == pytest.approx(plain, abs=1e-4)
    assert prepare.evaluate_bpb(lambda x: model(x).double() - 1e6, tiny, 16) == pytest.approx(plain, abs=0.05)
    rounded = lambda x: model(x).bfloat16()  # noqa: E731
    assert prepare.evaluate_bpb(rounded, tiny, 16) == pytest.approx(bpb_row_by_row(rounded, tiny), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_model_gets_the_inputs_alone_in_eval_mode_and_is_left_as_it_was(tiny, batch_size):
    """Neither targets, nor a storage that holds them: its own loss is never used."""
    seen = []

    class Grabs(Small):
        def forward(self, idx, targets=None, **more):
            assert targets is None and not more and idx.dtype == torch.int64
            assert idx._base is None and idx.is_contiguous() and idx.storage_offset() == 0
            assert idx.untyped_storage().nbytes() == idx.numel() * idx.element_size()
            assert not self.training and not self.wte.training and not torch.is_grad_enabled()
            seen.append(tuple(idx.shape))
            logits = super().forward(idx)
            idx.zero_()  # writing into it spoils nobody's rows
            return logits

    model, honest = Grabs(), Small()
    model.wte.eval()
    bpb = prepare.evaluate_bpb(honest, tiny, batch_size)
    assert prepare.evaluate_bpb(model, tiny, batch_size) == bpb > 0
    prepare.check_model(model, batch_size)
    assert set(seen) == {(batch_size, 32)}  # one shape: one compilation
    assert model.training and model.lm_head.training and not model.wte.training


def test_weights_that_a_models_own_eval_puts_in_are_scored_and_its_own_train_takes_them_out(tiny):
    class Averaged(Small):
        def train(self, mode=True):
            with torch.no_grad():
                self.lm_head.weight.copy_(mine if mode else average)
            return super().train(mode)

    mine, average = Small().lm_head.weight.detach(), torch.randn(V, 32)
    model, expected = Averaged(), Small()
    expected.lm_head.weight.data.copy_(average)
    assert prepare.evaluate_bpb(model, tiny, 16) == prepare.evaluate_bpb(expected, tiny, 16)
    assert torch.equal(model.lm_head.weight, mine) and model.training


# The future


@pytest.mark.parametrize("batch_size", [1, 16, 40])
@pytest.mark.parametrize("bonus, places", [
    (0.01, slice(None)), (0.05, slice(None)), (0.15, slice(None)), (-0.05, slice(None)),  # faint, everywhere
    *((5, slice(place, place + 1)) for place in range(31)), (1, slice(17, 18)), (0.05, slice(8, 25))])
def test_a_leak_of_the_next_token_is_refused_at_any_place_and_strength(tiny, bonus, places, batch_size):
    alone = places.stop == (places.start or 0) + 1  # in one row, where no target may be certain
    model = leaky(bonus, places, smooth=0.2 * alone)
    refused(model, tiny, "sees the future.* at position [0-9]+ .* bits per byte", batch_size)


def test_what_the_probes_say_a_leak_is_worth_is_what_it_gains(tiny, monkeypatch):
    """Oracle: the score with and without it; the positions that are cut are a sample of 31 of 2,048."""
    monkeypatch.setattr(prepare, "LEAK_BPB", 100)
    monkeypatch.setattr(prepare, "LEAK_NATS", 100)
    honest, sees = (leaky(bonus, slice(None)) for bonus in (0, 0.15))
    gain = prepare.evaluate_bpb(honest, tiny, 16) - prepare.evaluate_bpb(sees, tiny, 16)
    monkeypatch.setattr(prepare, "LEAK_NATS", 0.001)
    with pytest.raises(prepare.ExamError) as raised:
        prepare.evaluate_bpb(sees, tiny, 16)
    said = float(str(raised.value).split("the score by ")[1].split()[0])
    assert said == pytest.approx(gain, rel=0.3) and gain > 0.02


LEAKS = {
    "mean over time": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "spectral filter": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.linspace(1, 0, 17)[:, None], 32, 1),
    "maximum from the right": lambda x: x.flip(1).cummax(1)[0].flip(1),
    "bag of later tokens": lambda x: x.flip(1).cumsum(1).flip(1) - x,
    "own chunk": lambda x: x.unflatten(1, (-1, 8)).mean(2).repeat_interleave(8, 1),
    "chunks of two": lambda x: x.unflatten(1, (-1, 2)).sum(2).repeat_interleave(2, 1),
    "scan off by one chunk": lambda x: x.unflatten(1, (-1, 8)).sum(2).cumsum(1).repeat_interleave(8, 1),
    "next token": lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)),
    "token far ahead": lambda x: F.pad(x[:, 16:], (0, 0, 0, 16)),
    "last token": lambda x: x[:, -1:].expand_as(x),
    "norm over time": lambda x: -x + (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_model_that_mixes_later_tokens_in_is_refused_in_warm_up_already(tiny, leak, batch_size):
    model = Small(LEAKS[leak])
    if batch_size > 1 or "chunk" not in leak:  # two cuts may fall on the ends of chunks
        with pytest.raises(prepare.ExamError, match="sees the future"):
            prepare.check_model(model, batch_size)
    refused(model, tiny, "sees the future", batch_size)


def test_a_leak_that_is_faint_because_the_model_has_hardly_trained_is_refused_in_warm_up(tiny):
    honest, sees = Small(), Small(LEAKS["next token"])
    prepare.check_model(lambda x: 0.003 * honest(x), 16)
    prepare.check_model(lambda x: 1e-6 * torch.randn(*x.shape, V), 16)  # as float32 may round
    with pytest.raises(prepare.ExamError, match=r"sees the future: .* \(limit 0.000"):
        prepare.check_model(lambda x: 0.003 * sees(x), 16)
    prepare.evaluate_bpb(lambda x: 0.003 * sees(x), tiny, 16)  # of a whole run it would be within rounding


def test_a_masked_vocabulary_entry_or_a_constant_does_not_hide_a_leak(tiny):
    sees, honest = Small(LEAKS["next token"]), Small()
    masked = torch.zeros(V)
    masked[-3:] = -1e9
    for hidden in (lambda x: sees(x) + masked, lambda x: sees(x) + 1e4):
        refused(hidden, tiny, "sees the future")
    prepare.check_model(lambda x: honest(x) + masked, 16)


# Other rows, earlier calls, chance

MIXES = {
    "batch norm": lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "mean over the batch": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "in-batch retrieval": lambda x: (x @ x.roll(1, 0).mT).tril().softmax(-1).tril() @ x.roll(1, 0),
    "the row two places on": lambda x: x.roll(-2, 0),
    "row 5 sees row 3": lambda x: torch.zeros_like(x).index_copy(0, torch.tensor([5]), x[3:4]),
    "dropout": lambda x: F.dropout(x, 0.02),
    "weak dropout": lambda x: F.dropout(x, 0.02) * 0.02 + x * 0.98,
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_model_whose_rows_depend_on_other_rows_or_on_chance_is_refused(tiny, mix):
    what = "has memory or is random" if "dropout" in mix else "mixes rows of a batch"
    refused(Small(MIXES[mix]), tiny, what)
    if "batch" in mix:
        refused(Small(MIXES[mix]), tiny, what, 2)


def test_nobody_can_foresee_what_an_exam_asks_but_its_four_batches_of_which_one_comes_again(tiny):
    asked, model = [], lambda idx: (asked.append(idx.tolist()), torch.zeros(*idx.shape, V))[1]
    for _ in range(2):
        prepare.check_model(model, 16)
        prepare.evaluate_bpb(model, tiny, 16)
    assert sum(a == b for a, b in zip(asked, asked[len(asked) // 2 :])) in (4, 5)


def test_a_model_with_state_between_calls_is_refused_at_once_and_one_that_begins_later_in_the_exam(tiny):
    at_once, later = (counting(lambda call, after=after: 1 + 0.1 * max(call - after, 0)) for after in (0, 12))
    with pytest.raises(prepare.ExamError, match="has memory or is random"):
        prepare.check_model(at_once, 16)
    refused(later, tiny, "has memory or is random", 4)
    with pytest.raises(prepare.ExamError):  # in the last two of four batches alone: the probes begin with any
        for _ in range(9):
            prepare.evaluate_bpb(counting(lambda call: call in (4, 5) and 1.1), tiny, 16)


def test_a_model_that_keeps_what_its_first_call_shows_learns_nothing_of_the_exam(tiny):
    kept = []

    def model(idx):
        counts = torch.full((V, V), 0.01)
        counts.index_put_((idx[:, :-1], idx[:, 1:]), torch.ones(()), accumulate=True)
        kept.append((counts / counts.sum(1, keepdim=True)).log())
        return kept[0][idx]

    uniform = prepare.evaluate_bpb(lambda idx: torch.zeros(*idx.shape, V), tiny, 16)
    assert prepare.evaluate_bpb(model, tiny, 16) > uniform


# What is no answer


@pytest.mark.parametrize("change, message", [
    (lambda logits: logits[..., :-1], r"returned \(4, 32, 337\); .* shape \(4, 32, 338\)"),
    (lambda logits: F.pad(logits, (0, 1)), r"returned \(4, 32, 339\)"),
    (lambda logits: logits[:, -1:], r"returned \(4, 1, 338\)"),
    (lambda logits: logits.flatten(0, 1), r"returned \(128, 338\)"),
    (lambda logits: (logits, None), "returned tuple; .*logits of shape"),
    (lambda logits: None, "returned NoneType"), (lambda logits: logits.mean(), r"returned \(\)"),
])
def test_logits_of_a_wrong_kind_are_refused_by_what_was_seen(tiny, change, message):
    assert tiny.get_vocab_size() == V
    small = Small()
    with pytest.raises(prepare.ExamError, match=message):
        prepare.check_model(lambda x: change(small(x)), 4)
    refused(lambda x: change(small(x)), tiny, message, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_in_the_last_row_alone_is_refused(tiny, value):
    row = exam_rows()[-1]
    no_target = (row[-1] + 1) % V  # at the last position
    small = Small()

    def model(x):
        logits = small(x)
        logits[(x == row[:-1]).all(dim=1), -1, no_target] = value
        return logits

    refused(model, tiny, "non-finite logits", 4)


def test_a_tampered_exam_a_missing_one_and_another_tokenizer_are_refused(tiny):
    """A tokenizer whose tokens claim more bytes would lower the number."""
    longer = {tiny.encoding.decode_single_token_bytes(i): i for i in range(tiny.get_bos_token_id())}
    longer[b" a much longer token"] = longer.pop(tiny.encoding.decode_single_token_bytes(300))
    model, path = Small(), folder() / "val.bin"
    refused(model, prepare.Tokenizer(longer), "another tokenizer")
    body = bytearray(path.read_bytes())
    body[-100] ^= 1
    path.write_bytes(body)
    refused(model, tiny, f"{path.name} is not the exam that was packed")
    path.unlink()
    refused(model, tiny, f"{path.name} is not the exam that was packed")


# Honest models are never refused


class ChunkedLinearAttention(nn.Module):
    def __init__(self, C, chunk=8):
        super().__init__()
        self.qkv, self.chunk = nn.Linear(C, 3 * C, bias=False), chunk

    def forward(self, x):
        q, k, v = (t.unflatten(1, (-1, self.chunk)) for t in self.qkv(x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = F.pad((k.mT @ v).cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))  # at each chunk's beginning
        seen = F.pad(k.sum(2).cumsum(1)[:, :-1], (0, 0, 1, 0))
        y = q @ state + (q @ k.mT).tril() @ v
        return (y / (q * (seen[:, :, None] + k.cumsum(2))).sum(-1, keepdim=True)).flatten(1, 2)


class StateSpaceScan(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        a, b, reach = torch.sigmoid(self.a(x)), self.b(x), 1
        while reach < x.size(1):  # an associative scan by doubling
            b = b + a * F.pad(b[:, :-reach], (0, 0, reach, 0))
            a = a * F.pad(a[:, :-reach], (0, 0, reach, 0), value=1.0)
            reach *= 2
        return b


class Experts(nn.Module):
    """Two experts of eight per token, none dropped: each expert's matrix product has as many rows as chose it."""

    def __init__(self, C):
        super().__init__()
        self.router, self.w = nn.Linear(C, 8, bias=False), nn.Parameter(torch.randn(8, C, C) * C**-0.5)

    def forward(self, x):
        flat = x.flatten(0, 1)
        weight, expert = self.router(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for e in range(8):
            token, choice = torch.where(expert == e)
            y = y.index_add(0, token, ((flat[token] @ self.w[e]) * weight[token, choice, None]).to(y.dtype))
        return y.view_as(x) + F.pad(x[:, :-1], (0, 0, 1, 0))


class SoftExperts(Experts):
    def forward(self, x):
        return torch.einsum("bte,btc,ecd->btd", self.router(x).softmax(-1), x, self.w)


class Recurrent(nn.LSTM):
    def __init__(self, C):
        super().__init__(C, C, batch_first=True)

    def forward(self, x):
        return super().forward(x)[0]


class FourierConvolution(nn.Module):
    """A long causal convolution per channel, by FFT over twice the length, in float32."""

    def __init__(self, C, longest=2048):
        super().__init__()
        self.filter = nn.Parameter(torch.exp(-torch.arange(longest) / 64)[:, None] * torch.randn(longest, C))

    def forward(self, x):
        T = x.size(1)
        spectrum = torch.fft.rfft(x.float(), 2 * T, dim=1) * torch.fft.rfft(self.filter[:T], 2 * T, dim=0)
        return torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T]


HONEST = [ChunkedLinearAttention, StateSpaceScan, Experts, SoftExperts, Recurrent, FourierConvolution]


class Stack(nn.Module):
    """Layers of a kind between an embedding and a head; logits as large as a trained model's."""

    def __init__(self, kind, vocab_size, C=64, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.lm_head = nn.Embedding(vocab_size, C), nn.Linear(C, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, 0, 0.5)
        self.layers = nn.ModuleList(kind(C) for _ in range(layers))

    def forward(self, idx):
        x = self.wte(idx)
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, x.shape[-1:]))
        return 15 * torch.tanh(self.lm_head(F.rms_norm(x, x.shape[-1:])).float() / 15)


def assert_scored(model, tokenizer, batch_sizes, limit):
    """No probe moves a target by more than `limit` nats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "LEAK_NATS", limit)
        for batch_size in batch_sizes:
            prepare.check_model(model, batch_size)
            assert prepare.evaluate_bpb(model, tokenizer, batch_size) > 0


@pytest.mark.parametrize("kind", HONEST)
def test_honest_models_of_many_kinds_pass_with_room(tiny, kind):
    assert_scored(Stack(kind, tiny.get_vocab_size()), tiny, (1, 16), prepare.LEAK_NATS / 500)


@pytest.mark.parametrize("dtype, batch_size, pattern, options", [
    (torch.float32, 5, "L", {}), (torch.bfloat16, 16, "SL", {}), (torch.float32, 5, "SL", {"n_kv_head": 1}),
    (torch.float32, 16, "SSSL", {"bigram_rows": 0}), (torch.bfloat16, 5, "SSSSL", {"steps": 0})])
def test_honest_models_of_train_py_pass(tiny, dtype, batch_size, pattern, options):
    model = small_gpt(tiny, pattern, dtype, **options)
    with autocast(CPU, dtype):
        assert_scored(model, tiny, (batch_size,), prepare.LEAK_NATS / 500)


@pytest.fixture
def long_exam(tmp_path, monkeypatch):
    """A contract with the context of climbmix and an exam of 64 rows; returns its tokenizer."""
    contract = dataclasses.replace(TINY, name="long", vocab_size=2048, max_seq_len=2048, eval_tokens=64 * 2048)
    monkeypatch.setitem(prepare.CONTRACTS, "long", contract)
    monkeypatch.setenv("AUTORESEARCH_CONTRACT", "long")
    forget()
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(5000)]
    write_shards(contract.folder, lambda number: [" ".join(draw.choices(words, k=600)) for _ in range(300)])
    return prepare.prepare(contract, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("wanted, pattern, compiled, n_kv_head", [
    ("auto", "SSSSL", False, None), ("auto", "SSSSL", True, None), ("varlen", "SL", False, 1),
    ("sdpa", "SSSSL", False, None)])
def test_honest_bf16_models_of_train_py_pass_on_the_gpu(long_exam, parts, wanted, pattern, compiled, n_kv_head):
    device = torch.device("cuda")
    print(train.choose_attention(device, wanted))
    model = small_gpt(long_exam, pattern, torch.bfloat16, 50, device, 2048, 9, 640, 128, n_kv_head, 2**18)
    if compiled:
        train.compile_parts()
    with autocast(device, torch.bfloat16):
        assert_scored(model, long_exam, (32, 7), prepare.LEAK_NATS / 5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HONEST)
def test_honest_models_of_many_kinds_pass_on_the_gpu(long_exam, kind, dtype):
    model = Stack(kind, long_exam.get_vocab_size(), 256).cuda()
    share = 2 if kind == FourierConvolution and dtype == torch.bfloat16 else 1 / 5  # README says so
    with autocast(torch.device("cuda"), dtype):
        assert_scored(model, long_exam, (32, 7), prepare.LEAK_NATS * share)


# Evidence, held-out split, watchdog

KEYS = {"time", "commit", "dirty", "script", "train_sha256", "prepare_sha256", "contract", "shards", "split",
        "bpb", "evaluation", "training_seconds", "seconds", "tokens", "held_out_tokens", "peak_memory_mb", "device",
        "torch", "seed"}


def test_a_scored_run_leaves_one_line_that_says_what_ran_and_whether_it_trained(tiny, monkeypatch):
    device = prepare.device_name(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)  # the run's, on the same machine
    torch.manual_seed(43)
    Path("runs.jsonl").write_text('{"bpb": 9}')  # as an editor leaves it that takes the last line end away
    loader = prepare.make_dataloader(tiny, 4, 32, "train", device="cpu")
    for _ in range(5):
        next(loader)
    torch.manual_seed(9)  # the line says with what the run began
    for split in ("val", "test"):
        held_out = prepare.make_dataloader(tiny, 4, 32, split, device="cpu")
        next(held_out)
        held_out.close()
    assert prepare._RUN.alive  # the watchdog goes on
    shards = Path("cache/tiny/shards").read_text()
    Path("cache/tiny/shards").write_text("1")  # as another worktree may: the line says what the run began with
    model = Small()  # which seeds with 0
    bpb = prepare.evaluate_bpb(model, tiny, 16)
    loader.close()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    expected = {
        "bpb": bpb, "split": "val", "contract": prepare.fingerprint(), "tokens": 5 * 4 * 32, "seed": 43,
        "held_out_tokens": 2 * 4 * 32,
        "evaluation": 1, "shards": int(shards), "torch": torch.__version__, "device": device,
        "commit": git.stdout.strip() if git.returncode == 0 else None}
    other, line = evidence()
    assert other == {"bpb": 9} and set(line) == KEYS and expected.items() <= line.items()
    assert 0 <= line["training_seconds"] <= line["seconds"] < 60 and 50 < line["peak_memory_mb"] < 50_000
    prepare.evaluate_bpb(model, tiny, 16)
    prepare._RUN = type(prepare._RUN)()  # another run, which only scores
    prepare.evaluate_bpb(model, tiny, 16)
    *_, last = evidence()
    assert [line["evaluation"] for line in evidence()[1:]] == [1, 2, 1]
    assert set(last) == KEYS and last["seconds"] is None and last["tokens"] == 0


FACTS = """import conf, json, of_python, pathlib, prepare
def facts():
    prepare._RUN = type(prepare._RUN)()
    return [prepare._RUN.facts[name] for name in ("dirty", "script", "train_sha256")]
seen = [facts()]
pathlib.Path("conf.py").write_text("LR = 2")
print(json.dumps([*seen, facts()]))
pathlib.Path("conf.py").write_text("LR = 1")
"""


def test_what_a_script_imports_from_here_is_part_of_it_and_a_script_elsewhere_or_a_copy_is_another(
        tmp_path, monkeypatch, capsys):
    commit(tmp_path, ("prepare.py", (ROOT / "prepare.py").read_text()), ("conf.py", "LR = 1"),
           ("train.py", FACTS), ("old/train.py", FACTS + "# another"))
    (tmp_path / "try2.py").write_text(FACTS + "# a copy")
    subprocess.run(["git", "config", "status.showUntrackedFiles", "no"], cwd=tmp_path, check=True)
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook of another repo
    (tmp_path / "python").mkdir()  # installed in the clone, it is no part of the script
    (tmp_path / "python" / "of_python.py").touch()
    monkeypatch.setattr(os, "__file__", str(tmp_path / "python" / "os.py"))
    monkeypatch.syspath_prepend(tmp_path / "python")
    monkeypatch.syspath_prepend(tmp_path)
    for name, dirty in ("train.py", [False, True]), ("old/train.py", [None] * 2), ("try2.py", [True] * 2):
        monkeypatch.delitem(sys.modules, "prepare")  # the script imports its own
        runpy.run_path(name, run_name="__main__")
        sha256 = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        assert json.loads(capsys.readouterr().out) == [[each, Path(name).name, sha256] for each in dirty]


SCORE = """import prepare, sys, torch, types
prepare._RUN.facts
import late
compiled = types.ModuleType("torch._inductor.runtime.compile_tasks.c5g")
compiled.__file__ = str(prepare.HERE / ".cache" / "c5g.py")
sys.modules[compiled.__name__] = compiled
prepare.fingerprint = str
prepare._RUN.write_evidence(prepare.CONTRACTS["demo"], "val", 1.0, torch.device("cpu"), None)
"""


def test_what_is_imported_after_the_run_began_counts_too_even_where_git_status_is_told_to_look_away(
        tmp_path, monkeypatch):
    commit(tmp_path, ("prepare.py", (ROOT / "prepare.py").read_text()), ("late.py", "LR = 1"), ("train.py", SCORE))
    monkeypatch.syspath_prepend(tmp_path)
    for text in "LR = 1", "LR = 2":
        (tmp_path / "late.py").write_text(text)
        subprocess.run(["git", "update-index", "--assume-unchanged", "late.py"], cwd=tmp_path, check=True)
        for module in "prepare", "late", "torch._inductor.runtime.compile_tasks.c5g":
            monkeypatch.delitem(sys.modules, module, raising=False)
        runpy.run_path("train.py", run_name="__main__")
    assert [line["dirty"] for line in evidence()] == [False, True]


@pytest.mark.parametrize("spoil", [Path.mkdir, lambda file: file.symlink_to("/dev/full")])
def test_a_score_is_returned_and_its_line_printed_when_no_file_can_be_written(spoil, tiny, capsys):
    spoil(Path("runs.jsonl"))
    bpb = prepare.evaluate_bpb(Small(), tiny, 16)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bpb"] == bpb


@pytest.mark.parametrize("begin", [
    lambda tiny: prepare.make_dataloader(tiny, 4, 32, "train", device="cpu"),
    lambda tiny: prepare.run_main(lambda: None)], ids=["a loop of its own", "run_main"])
def test_a_run_is_what_it_was_when_it_began_whatever_is_edited_later(begin, tiny, monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("as it ran")
    monkeypatch.setattr(prepare, "SCRIPT", script)
    for text in ("edited", "edited again"):
        begin(tiny)
        script.write_text(text)
    prepare.evaluate_bpb(Small(), tiny, 16)
    (line,) = evidence()
    assert line["train_sha256"] == hashlib.sha256(b"as it ran").hexdigest()


def test_the_held_out_split_scores_other_rows_and_the_line_says_so(tiny, monkeypatch):
    model = small_gpt(tiny)
    val = prepare.evaluate_bpb(model, tiny, 16)
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "test")
    test = prepare.evaluate_bpb(model, tiny, 16)
    assert test == pytest.approx(bpb_row_by_row(model, tiny, "test"), abs=1e-6) and test != val
    assert [line["split"] for line in evidence()] == ["val", "test"]


@pytest.fixture
def forked(capfd):
    """Run jobs in processes of their own, at once: their exit codes, all that stdout and stderr got."""
    def forked(*jobs):
        process = multiprocessing.get_context("fork").Process
        processes = [process(target=job, daemon=True) for job in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes], *capfd.readouterr()
    return forked


@pytest.fixture
def hasty(tiny, monkeypatch):
    """(train loader, function that scores a model which acts in its calls); hung after a second."""
    monkeypatch.setattr(prepare, "HANG_SECONDS", 1)
    loader = prepare.make_dataloader(tiny, 4, 32, "train", device="cpu")
    return loader, lambda act: prepare.evaluate_bpb(counting(act), tiny, 4)


def test_two_processes_that_append_at_once_leave_whole_lines(tiny, forked, monkeypatch):
    monkeypatch.setattr(prepare, "fingerprint", str)  # no file to read: more lines in the same time
    begin = time.monotonic() + 1

    def job(number):
        prepare._RUN.facts = dict(commit="x" * 3000, dirty=True)
        time.sleep(begin - time.monotonic())
        for i in range(1000):
            prepare._RUN.write_evidence(TINY, "val", number + i / 1024, CPU, None)

    assert forked(lambda: job(1), lambda: job(2)) == ([0, 0], "", "")
    assert sorted(line["bpb"] for line in evidence()) == [n + i / 1024 for n in (1, 2) for i in range(1000)]


@pytest.mark.parametrize("where", ["training", "exam"])
def test_a_run_that_hangs_ends_with_the_tracebacks_of_all_threads_and_then_the_reason(where, hasty, forked):
    loader, score = hasty

    def hangs_here(*_):
        time.sleep(60)

    def job():
        threading.Thread(target=hangs_here, daemon=True).start()
        next(loader)
        hangs_here() if where == "training" else score(hangs_here)

    codes, out, err = forked(job)
    assert (codes, out) == ([1], "") and err.count("in hangs_here") == 2
    assert err.splitlines()[-1].startswith("FAIL: for 1 s no batch was drawn and none was scored")
    assert evidence() == []


def test_with_stderr_closed_a_run_that_hangs_ends_too(hasty, forked, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert forked(lambda: (next(hasty[0]), time.sleep(60)))[0] == [1]


def test_a_run_that_was_stopped_for_longer_goes_on(hasty, forked):
    def job():
        next(hasty[0])
        time.sleep(0.3)
        subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.4)
        hasty[0].close()

    assert forked(job) == ([0], "", "")


def test_a_slow_run_that_lives_is_not_ended_nor_one_that_is_over(hasty, forked):
    """Training, exam and what follows take longer than HANG_SECONDS, each batch less."""
    loader, score = hasty

    def job():
        for _ in range(3):
            next(loader)
            time.sleep(0.4)
        score(lambda call: call < 4 and time.sleep(0.4))
        time.sleep(1.3)
        next(loader)
        loader.close()
        time.sleep(1.3)

    assert forked(job) == ([0], "", "")
    (line,) = evidence()
    assert line["tokens"] == 3 * 4 * 32 and line["seconds"] - line["training_seconds"] > 1
