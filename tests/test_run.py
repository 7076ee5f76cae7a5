"""The run: warm-up, clock, memory, seeds, the log, the summary, and how each failure ends."""

import copy
import dataclasses
import functools
import gc
import io
import itertools
import os
import re
import runpy
import subprocess
import sys
import time
import types
import weakref

import pytest
import torch
import torch.nn as nn
from conftest import CPU, ROOT, TINY, commit, evidence, forget, run

import prepare
import train

STEP = re.compile(r"step \d{5,} \(\d+\.\d%\) \| loss: \d+\.\d{6} \| lrm: \d\.\d\d \| dt: \d+ms \| "
                  r"tok/sec: [\d,]+ \| mfu: (n/a|\d+\.\d%) \| epoch: \d+ \| remaining: \d+s")
FIELDS = {
    "val_bpb": r"\d+\.\d{6}", "training_seconds": r"\d+\.\d", "total_seconds": r"\d+\.\d", "peak_vram_mb": r"\d+\.\d",
    "mfu_percent": r"n/a|\d+\.\d\d", "total_tokens_M": r"\d{1,2}\.\d{3}|\d{3,}\.\d", "num_steps": r"\d+",
    "num_params_M": r"\d+\.\d", "depth": r"\d+", "seed": r"\d+", "contract": r"[a-z]+-[0-9a-f]{8}", "device": ".+",
    "attention": "fa3|varlen|sdpa", "next": ".+"}
SUMMARY = "---\n" + "".join(f"{name + ':':17} (?P<{name}>{form})\n" for name, form in FIELDS.items()) + r"\Z"


@pytest.fixture
def small(tiny, monkeypatch):
    """train.py with the smallest model on the tiny contract, CPU, float32; returns the clock that it reads."""
    clock = types.SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)  # moves only when told to
    knobs = {"DEPTH": 2, "ASPECT_RATIO": 16, "HEAD_DIM": 16, "TOTAL_BATCH_SIZE": 512, "DEVICE_BATCH_SIZE": 8,
             "BIGRAM_ROWS": 64, "SHIFTED_CHANNELS": 8, "WINDOW_PATTERN": "SL", "SHORT_WINDOW": 8, "COMPILE": False,
             "time": clock, "compute_dtype": lambda device: torch.float32}
    for name, value in knobs.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(prepare, "default_device", lambda: CPU)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("SEED", raising=False)
    yield clock
    gc.enable()
    gc.unfreeze()
    prepare._RUN.alive = None  # else the watchdog of a run that failed here would end all the tests


def watch_steps(monkeypatch, clock, seconds=0.25, before=None):
    """The real steps of the run to come, [(loss, shapes of its batches)], each of so many seconds."""
    seen, real, calls = [], train.train_step, iter(range(-train.WARMUP_STEPS, 10**9))

    def step(model, optimizer, batches):
        if before:
            before(model, optimizer, batches)
        loss = real(model, optimizer, batches)
        clock.now += seconds
        if next(calls) >= 0:
            seen.append((loss.item(), [x.shape for x, *_ in batches]))
        return loss

    monkeypatch.setattr(train, "train_step", step)
    return seen


@pytest.fixture
def steps(small, monkeypatch):
    return watch_steps(monkeypatch, small)


def summary_of(output):
    found = re.search(SUMMARY, output, re.M)
    assert found, output
    return found.groupdict()


def step_lines(output):
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert all(STEP.fullmatch(line) for line in lines)
    return lines


def failure():
    """How main ends under run_main: the line that becomes stderr's last, and exit code 1."""
    with pytest.raises(SystemExit) as raised:
        prepare.run_main(train.main)
    assert isinstance(raised.value.code, str)  # which Python prints on stderr, and exits with 1
    assert raised.value.code.startswith("FAIL: ") and "\n" not in raised.value.code
    return raised.value.code


def test_a_run_says_what_it_does_prints_the_summary_and_leaves_one_line_of_evidence(steps, capsys, tmp_path):
    train.main()
    output = capsys.readouterr().out
    summary = summary_of(output)
    assert output.startswith("contract: tiny (AUTORESEARCH_CONTRACT is set)")
    assert "attention: sdpa (torch's scaled_dot_product_attention on cpu)\n" in output
    announced = ["\nwarm-up\n", "\ntraining for 1 s\nstep ", "\nexam: 2,048 targets", "\n---\n"]
    assert sorted(announced, key=output.index) == announced
    expected = {"training_seconds": "1.0", "num_steps": "4", "mfu_percent": "n/a", "total_tokens_M": "0.002",
                "total_seconds": "1.8", "depth": "2", "seed": "42", "contract": prepare.fingerprint(TINY)}
    assert expected.items() <= summary.items() and "runs.jsonl" in summary["next"]
    first, last = step_lines(output)
    assert first.startswith("step 00001 (25.0%)") and last.startswith("step 00004 (100.0%)")
    assert last.endswith("remaining: 0s") and f"loss: {steps[-1][0]:.6f}" in last
    (line,) = evidence()
    assert f"{line['bpb']:.6f}" == summary["val_bpb"] and line["contract"] == summary["contract"]
    assert (line["seed"], line["split"], line["tokens"]) == (42, "val", 4 * 512)


@pytest.mark.parametrize("epoch, files", [(1, 3), (2, 3), (2, 1)])
def test_training_text_that_began_again_is_said_where_there_is_more(epoch, files, steps, monkeypatch, capsys):
    make = prepare.make_dataloader
    monkeypatch.setitem(prepare.CONTRACTS, "tiny", dataclasses.replace(TINY, train_files=files))
    forget()
    monkeypatch.setattr(prepare, "make_dataloader", lambda *a, **k: ((x, y, epoch) for x, y, _ in make(*a, **k)))
    train.main()
    assert ("\nnote: the training text began again. " in capsys.readouterr().out) == (epoch > 1 < files)


@pytest.mark.parametrize("name, known", [
    ("NVIDIA A100-SXM4-80GB", True), ("NVIDIA RTX A1000 Laptop GPU", False), ("NVIDIA RTX 4090 D", False),
    ("NVIDIA GeForce RTX 5090", True), ("NVIDIA GeForce RTX 5090 D v2", False),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", False), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", False)])
def test_the_test_split_prints_no_val_bpb_and_no_mfu_of_an_unknown_device(name, known, steps, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "test")
    monkeypatch.setattr(prepare, "device_name", lambda device: name)
    monkeypatch.setitem(train.PEAK_FLOPS, "A100", 1e9)
    train.main()
    output = capsys.readouterr().out
    if "A100-SXM4-80GB" in name:
        shown, total = (float(re.search(words, output)[1]) for words in (r"mfu: ([\d.]+)%", r"mfu_percent: +([\d.]+)"))
        assert total == pytest.approx(shown, abs=0.06) and shown > 1
    assert "\ntest_bpb:         " in output and "val_bpb" not in output
    assert ("mfu: n/a" not in output) == ("mfu_percent:      n/a" not in output) == known


@pytest.mark.parametrize("compile", [lambda model: model, functools.partial(torch.compile, backend="eager")],
                         ids=["as it is", "compiled whole"])
def test_warm_up_leaves_no_trace_not_even_in_buffers_gains_and_lists_of_ones_own(compile, small, monkeypatch):
    """Oracle: model, optimizer and loader made afresh from the same seed; all is equal bit for bit."""
    class Own(train.GPT):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("calls", torch.full((2,), 1.5))
            self.plain = [1.5]  # nothing that a state_dict knows
            self.h[0].gain = nn.Parameter(1 + 0.1 * torch.randn(config.n_embd))

        def forward(self, idx, targets=None):
            self.calls += 1
            self.plain[0] += 1
            return super().forward(idx, targets) * self.h[0].gain.mean()

    def whole(*arguments):
        model, optimizer = build(*arguments)
        return compile(model), optimizer

    def groups_of(optimizer):
        return [{**group, "params": 0} for group in optimizer.param_groups]

    def look(model, optimizer, batches):
        assert all(p.grad is None for p in model.parameters())
        seen.append((copy.deepcopy(model), groups_of(optimizer), dict(optimizer.state), torch.get_rng_state(),
                     gc.isenabled(), batches))

    seen, build = [], train.build
    monkeypatch.setattr(train, "build", whole)
    monkeypatch.setattr(train, "GPT", Own)
    watch_steps(monkeypatch, small, before=look)
    train.main()
    began, groups, state, random, collects, batches = seen[train.WARMUP_STEPS]
    model, optimizer = train.build(began.config, CPU, torch.float32, False, 42)
    assert torch.equal(random, torch.get_rng_state()) and not state
    assert not collects  # a collection would stop a step
    fresh, weights = model.state_dict(), began.state_dict()
    assert fresh.keys() == weights.keys() and all(torch.equal(fresh[name], weights[name]) for name in fresh)
    assert began.plain == [1.5] and began.calls.tolist() == [1.5, 1.5]
    assert not torch.equal(seen[-1][0].h[0].gain, model.h[0].gain)  # it learns, too
    train.set_schedules(optimizer, 0, 0.0)
    assert groups == groups_of(optimizer)
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 8, 32, "train", device=CPU)
    for x, y, epoch in batches:
        first = next(loader)
        assert torch.equal(x, first[0]) and torch.equal(y, first[1]) and epoch == first[2]
    loader.close()


def test_cycles_that_an_edit_leaves_are_collected_at_log_lines(small, monkeypatch):
    class Cycle(list):
        pass

    def leaves(*arguments):
        made.append(weakref.ref(cycle := Cycle()))
        cycle.append(cycle)

    made = []
    monkeypatch.setattr(train, "LOG_SECONDS", 0)
    watch_steps(monkeypatch, small, before=leaves)
    train.main()
    assert not gc.isenabled() and [each() for each in made[train.WARMUP_STEPS:]] == [None] * 4


def test_determinism_that_was_asked_for_stays(small):
    config = train.GPTConfig(50, 16, 2, 2, 2, 32, (16, 16))
    for wanted in (True, False):
        torch.use_deterministic_algorithms(wanted)
        train.build(config, CPU, torch.float32, False, 0)
        assert torch.are_deterministic_algorithms_enabled() == wanted


def test_accumulated_batches_step_as_one_batch_of_all_their_rows(small):
    """The losses and gradients are means: equal within float32 rounding, whatever the cut."""
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    seen = []
    for rows in (8, 4, 1):
        model, optimizer = train.build(train.GPTConfig(50, 16, 2, 2, 2, 32, (16, 16)), CPU, torch.float32, False, 0)
        optimizer.step = lambda: seen.append([p.grad.clone() for p in model.parameters()])  # noqa: B023
        loss = train.train_step(model, optimizer, list(zip(x.split(rows), y.split(rows))))
        assert not loss.requires_grad and all(p.grad is None for p in model.parameters())
        seen[-1].append(loss)
        torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device, lag", [("cpu", 0), pytest.param("cuda", 1, marks=pytest.mark.cuda)])
def test_a_loss_is_read_at_once_on_a_cpu_and_one_step_late_on_a_gpu(device, lag, small, monkeypatch):
    events, finite = [], train.finite
    monkeypatch.setattr(train, "finite", lambda *read: (events.append("read"), finite(*read))[1])
    monkeypatch.setattr(prepare, "default_device", lambda: torch.device(device))
    monkeypatch.setattr(train, "ATTENTION", "sdpa")
    watch_steps(monkeypatch, small, before=lambda *arguments: events.append("step"))
    train.main()
    late = ["step"] * lag + ["step", "read"] * (4 - lag) + ["read"] * lag
    assert events == ["step"] * train.WARMUP_STEPS + late


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("where", ["a batch", "a second batch", "the exam"])
def test_a_batch_that_does_not_fit_is_halved_and_the_losses_are_those_of_half(where, small, monkeypatch, capsys):
    real = train.GPT.forward

    def forward(model, idx, targets=None):
        trains, second = targets is not None, model.wte.weight.grad is not None
        refuses = {"a batch": trains, "a second batch": trains and second, "the exam": not trains}
        if len(idx) > 4 and refuses[where]:
            raise OUT_OF_MEMORY
        return real(model, idx, targets)

    with monkeypatch.context() as patch:
        patch.setattr(train.GPT, "forward", forward)
        halved = watch_steps(patch, small)
        train.main()
    assert re.findall("out of memory: .*", output := capsys.readouterr().out) == [
        "out of memory: now DEVICE_BATCH_SIZE is 4, with 4 batches per step"], output
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 4)
    from_the_start = watch_steps(monkeypatch, small)
    train.main()
    assert "out of memory" not in capsys.readouterr().out
    assert len(from_the_start) == 4 and halved[-4:] == from_the_start
    assert all(shapes == [(4, 32)] * 4 for _, shapes in from_the_start)


@pytest.mark.parametrize("words", [
    "DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory",
    "not enough memory: you tried to allocate 9 bytes", "API call failed \"aten::empty\""])
def test_other_words_for_it_are_known(words):
    assert prepare.is_out_of_memory(RuntimeError(words)) and not prepare.is_out_of_memory(RuntimeError("a mat"))


OTHER = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
TO_ONE_ROW = [("5", "3"), ("1", "15")]  # an odd batch shrinks to what divides the tokens per step


NOT_A_ROW = "out of memory with one row at once: lower BIGRAM_ROWS or DEPTH (CUDA out of memory. Tried"


@pytest.mark.parametrize("where, fits, error, sizes, said", [
    ("train_step", 0, OUT_OF_MEMORY, TO_ONE_ROW, NOT_A_ROW), ("build", 0, OUT_OF_MEMORY, TO_ONE_ROW, NOT_A_ROW),
    ("build", 1, OUT_OF_MEMORY, [], "CUDA out of memory"), ("train_step", 0, OTHER, [], "mat1 and mat2")])
def test_one_row_that_does_not_fit_a_model_that_does_not_behind_warm_up_and_any_other_error_end_the_run(
        where, fits, error, sizes, said, small, monkeypatch, capsys):
    real, calls = getattr(train, where), itertools.count()

    def fails(*arguments):
        if next(calls) >= fits:
            raise error
        return real(*arguments)

    for name, value in {where: fails, "DEVICE_BATCH_SIZE": 15, "TOTAL_BATCH_SIZE": 15 * 32}.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises((RuntimeError, prepare.Failure), match=re.escape(said)) as raised:
        train.main()
    assert error in (raised.value, raised.value.__cause__) and next(calls) == fits + 1 + len(sizes)
    assert re.findall(r"DEVICE_BATCH_SIZE is (\d+), with (\d+) batches", capsys.readouterr().out) == sizes


@pytest.mark.parametrize("total, at_once", [(16, 8), (10, 5), (5, 5), (1, 1)])
def test_half_a_step_holds_the_rows_at_once_where_a_step_can_be_halved(total, at_once, small, monkeypatch):
    for name, value in {"HALF_BATCH_RATIO": 0.5, "DEVICE_BATCH_SIZE": 16, "TOTAL_BATCH_SIZE": total * 32}.items():
        monkeypatch.setattr(train, name, value)
    assert train.sizes("cpu", 32, 256)[1:] == (total * 32, at_once)


@pytest.mark.parametrize("rows", [8, 16])
def test_the_first_steps_take_half_of_the_tokens_and_each_token_counts_once(rows, small, monkeypatch, capsys):
    """A budget of 1 s and steps of 0.25 s; rows at once are at most those of half a step."""
    for name, value in {"HALF_BATCH_RATIO": 0.5, "DEVICE_BATCH_SIZE": rows}.items():
        monkeypatch.setattr(train, name, value)
    counts = []
    seen = watch_steps(monkeypatch, small, before=lambda model, optimizer, batches: counts.append(len(batches)))
    train.main()
    assert counts == [1, 2, 2] + [1, 1, 2, 2]  # warm-up has compiled both
    assert [shapes for _, shapes in seen] == [[(8, 32)] * count for count in counts[-4:]]
    first, last = step_lines(output := capsys.readouterr().out)
    assert "; 512 tokens per step (256 until 50%), 8 rows at once\n" in output
    assert "tok/sec: 1,024 |" in first and "tok/sec: 1,707 |" in last  # 256 in 0.25 s, 1,280 in 0.75 s
    (line,) = evidence()
    assert line["tokens"] == 6 * 256 and summary_of(output)["total_tokens_M"] == "0.002"


@pytest.mark.parametrize("seconds, expected", [(0.5, 4), (0.52, 4), (0.98, 3), (1.02, 2), (10.0, 1)])
def test_the_budget_ends_with_the_step_in_which_it_runs_out(seconds, expected, small, monkeypatch, capsys):
    """Budget 2 s, fake clock: the last step begins in time, and overshoots by less than its duration."""
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "2")
    monkeypatch.setattr(train, "MTP_WEIGHT", 0.5)
    forget()
    progress, real, mtp_weight = [], train.set_schedules, []
    monkeypatch.setattr(train, "set_schedules", lambda *given: (progress.append(given[2]), real(*given)))
    watch = lambda model, *_: mtp_weight.append(model.mtp_weight.item())  # noqa: E731
    seen = watch_steps(monkeypatch, small, seconds=seconds, before=watch)
    train.main()
    summary = summary_of(capsys.readouterr().out)
    assert int(summary["num_steps"]) == len(seen) == expected
    assert float(summary["training_seconds"]) == pytest.approx(expected * seconds, abs=0.051)
    assert progress == pytest.approx([step * seconds / 2 for step in range(expected)])
    assert mtp_weight[train.WARMUP_STEPS :] == pytest.approx([max(0, 0.5 - at) for at in progress])


@pytest.mark.parametrize("loss, shown", [(float("nan"), "nan"), (float("inf"), "inf"), (100.5, "100.5")])
def test_a_diverged_run_ends_at_once_with_the_loss_and_the_step(loss, shown, steps, monkeypatch, tmp_path):
    watched = train.train_step
    diverge = lambda *batch: (watched(*batch), torch.tensor(loss if len(steps) == 3 else 100.0))[1]  # noqa: E731
    monkeypatch.setattr(train, "train_step", diverge)
    message = failure()
    assert message.startswith(f"FAIL: loss {shown} at step 3 (") and "learning rate" in message
    assert len(steps) == 3 and (tmp_path / "runs.jsonl").read_text() == ""


@pytest.mark.parametrize("knob, value, remedy", [
    ("DEPTH", 0, "at least 1"), ("DEPTH", {"cpu": 2.5}, "a whole number"),
    ("HEAD_DIM", 63, "a multiple of 4"), ("HEADS_PER_KV_HEAD", 3, "a divisor of the 2 heads"),
    ("BIGRAM_ROWS", -1, "at least 0"), ("SHORT_WINDOW", -1, "at least 0"),
    ("SHIFTED_CHANNELS", 33, "at most the width, 32"), ("GATE_CHANNELS", 33, "1 to 32"),
    ("SOFTCAP", None, "at most 79"), ("SOFTCAP", 100, "at most 79"),
    ("EMBEDDING_LR", {"cuda": 0.9}, "a value for 'cpu' too"),
    ("HALF_BATCH_RATIO", None, "a number"), ("EMBEDDING_LR", {"cpu": "0.3"}, "a number"),
    ("WEIGHT_DECAY", 0.1, "for each name"), ("WEIGHT_DECAY", {"wte": None}, "for each name"),
    ("ADAM_BETAS", 0.9, "a pair"), ("ADAM_BETAS", (None, 0.9), "a pair"), ("MUON_MOMENTUM", (0.9,), "a pair"),
    ("MATRIX_LR", {"cuda": 0.1}, "a number"), ("MUON_RAMP", None, "a number"),
    ("DEVICE_BATCH_SIZE", 0, "at least 1"), ("TOTAL_BATCH_SIZE", 0, "at least 1"),
    ("TOTAL_BATCH_SIZE", 1000, "a multiple of MAX_SEQ_LEN (32)"),
    ("TOTAL_BATCH_SIZE", 288, "DEVICE_BATCH_SIZE (8) x MAX_SEQ_LEN (32) = 256"),
    ("WINDOW_PATTERN", "SXL", "S and L only"), ("ATTENTION", "flash", "use auto or sdpa"),
    ("SEED", "-1", "whole number below 2**63, or unset"), ("SEED", str(2**64), "whole number"),
    ("SEED", "9" * 5000, "whole number"),
    ("AUTORESEARCH_SPLIT", "train", "val or test"),
])
def test_a_bad_knob_ends_in_one_line_with_the_remedy_before_data_is_touched(knob, value, remedy, small, monkeypatch):
    monkeypatch.setattr(prepare, "prepare", None)
    if hasattr(train, knob):
        monkeypatch.setattr(train, knob, value)
    else:
        monkeypatch.setenv(knob, value)
    seen = value.get("cpu", value) if isinstance(value, dict) else value
    message = failure()
    assert message.startswith(f"FAIL: {knob} is {seen!r}") and remedy in message, message


ONES = torch.ones(3)


@pytest.mark.parametrize("add, words", [
    (lambda module: setattr(module, "gain", nn.Parameter(torch.empty(3))), "left as torch.empty made it"),
    (lambda module: module.register_buffer("gain", torch.empty(3), persistent=False), "left as torch.empty made it"),
    (lambda module: setattr(module, "gain", nn.Parameter(ONES)), "they share memory; to tie weights"),
    (lambda module: setattr(module, "gain", nn.Parameter(torch.eye(8)[:, :4])), "add .contiguous()")])
def test_what_nobody_filled_views_and_what_shares_memory_are_named(add, words, small, monkeypatch):
    """Memory that was used before holds anything; torch's AdamW of a CPU steps what lies between a view's rows."""
    class Own(train.MLP):
        def __init__(self, config):
            super().__init__(config)
            add(self)

    monkeypatch.setattr(train, "MLP", Own)
    message = failure()
    assert message.startswith("FAIL: h.0.mlp.gain, h.1.mlp.gain: ") and words in message


def test_weights_that_do_not_train_are_named_whatever_the_reason(small, monkeypatch, capsys):
    class Own(train.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.gain, self.fixed = (nn.Parameter(torch.ones(3), requires_grad=named) for named in (True, False))
            self.scale = [torch.ones(5, requires_grad=True)]
            self.register_buffer("fp8", torch.ones(3).to(torch.float8_e4m3fn))

        def forward(self, x):
            return super().forward(x) * self.scale[0].mean()

    class LowRank(train.MLP):  # init_weights zeroes both matrices
        def __init__(self, config):
            super().__init__(config)
            C = config.n_embd
            self.c_proj = nn.Sequential(nn.RMSNorm(4 * C), nn.Linear(4 * C, 8, bias=False), nn.Linear(8, C, bias=False))

    def late_head(*given, build=train.build):
        model, optimizer = build(*given)
        model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        return model, optimizer

    low_rank = [f"h.{layer}.mlp.{name}.weight" for layer in (0, 1)
                for name in ("c_fc", "c_proj.0", "c_proj.1", "c_proj.2")]
    loose = ("note: gradients of tensors that are no parameters of the model: [(5,), (5,)]; modules in a list? "
             "Use nn.ModuleList")
    for changes, lost, more in [
            ({}, [], []), ({"build": late_head}, ["lm_head.weight"], []), ({"MLP": LowRank}, low_rank, []),
            ({"MLP": Own}, ["h.0.mlp.gain", "h.1.mlp.gain"], [loose])]:
        gc.freeze()  # what other tests left is no weight of this run
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(train, name, value)
            watch_steps(patch, small)
            train.main()
        said = [f"note: not trained{when}: {', '.join(lost)}" for when in (" in warm-up", "") if lost]
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("note: not", "note: grad"))]
        assert notes == said[:1] + more + said[1:]


def test_a_model_that_sees_the_future_fails_in_warm_up(steps, monkeypatch):
    monkeypatch.setattr(train, "ngram_hash", lambda idx, n, rows: (idx.roll(-1, 1) * 31 + idx) % rows)
    assert "sees the future" in failure()
    assert not steps


def test_a_record_that_cannot_be_written_fails_before_the_clock(steps, tmp_path):
    (tmp_path / "runs.jsonl").mkdir()
    assert "cannot write the record of this run, " in failure() and not steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_completes_with_and_without_fast_bfloat16(dtype, small, monkeypatch, capsys):
    seen, dtypes, polar_express = {}, set(), train.polar_express
    monkeypatch.setattr(train, "polar_express", lambda x, dtype: (dtypes.add(dtype), polar_express(x, dtype))[1])
    monkeypatch.setattr(train, "compute_dtype", lambda device: dtype)
    losses = watch_steps(monkeypatch, small, before=lambda model, *rest: seen.update(
        {name: p.dtype for name, p in model.named_parameters()}, cast=torch.is_autocast_enabled("cpu")))
    train.main()
    output = capsys.readouterr().out
    assert seen.pop("cast") == (dtype == torch.bfloat16)
    assert float(summary_of(output)["val_bpb"]) < 8 and losses[-1][0] < losses[0][0] + 0.1
    assert f", {str(dtype).removeprefix('torch.')}\n" in output
    tables = {name for name in seen if name.startswith(("wte", "ngrams", "bigram", "value_embeds"))}
    assert tables and all(seen[name] == (dtype if name in tables else torch.float32) for name in seen)
    assert dtypes == {dtype}  # float32: no bfloat16 anywhere, which such a CPU would emulate


@pytest.mark.parametrize("fast", [False, True])
def test_a_device_computes_in_bfloat16_only_if_it_has_instructions_for_it(fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if fast else (7, 5))
    for device in ("cpu", "cuda"):
        assert train.compute_dtype(torch.device(device)) == (torch.bfloat16 if fast else torch.float32)
    assert train.compute_dtype(torch.device("mps")) == torch.float32


def test_a_log_stays_under_20_kb_however_many_steps_a_run_has(small, monkeypatch, capsys):
    def step(model, optimizer, batches):
        small.now += 6.0
        return torch.tensor(3.0)

    for name, value in {"train_step": step, "DEVICE_BATCH_SIZE": 1, "TOTAL_BATCH_SIZE": 32}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "36000")
    forget()
    train.main()
    output = capsys.readouterr().out
    assert len(output) < 20_000 and "\r" not in output
    assert summary_of(output)["num_steps"] == "6000" and 50 < len(step_lines(output)) <= 102


@pytest.mark.parametrize("shares, passive", [
    ([0, 0, 0], False), ([45, 45, 45], True), ([50, 50, 0], False), ([], False),
], ids=["idle", "busy", "a moment", "no /proc/stat"])
def test_threads_wait_without_spinning_only_where_others_use_the_cores(shares, passive, monkeypatch):
    """Per cent of processor time that others take in each look, which reads the file twice."""
    reads = ((busy, idle) for share in shares for busy, idle in ((0, 0), (share, 100 - share)))
    lines, real = (f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\n" for busy, idle in reads), open

    def stat(file, *rest, **options):
        if file != "/proc/stat":
            return real(file, *rest, **options)
        return io.StringIO(next(lines)) if shares else real("/no/such/file")

    monkeypatch.setattr("builtins.open", stat)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(SystemExit, match=r"^FAIL: train.py takes no arguments, but got \['--help'\]; edit "):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert os.environ.pop("OMP_WAIT_POLICY", None) == ("PASSIVE" if passive else None)


def test_a_closed_stdout_stops_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    ran = []
    prepare.run_main(lambda: ran.append(print("a line")))
    assert ran == [None]


def test_an_error_of_many_lines_is_said_in_short_below_its_traceback(steps, monkeypatch, capsys):
    """Clipping by a norm, say, when a table has a sparse gradient: torch names every backend that it has."""
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    monkeypatch.setattr(train, "sizes", lambda *_: torch.nn.utils.clip_grad_norm_(table.parameters(), 1.0))
    assert len(words := failure()) < 250 and words.startswith("FAIL: NotImplementedError: Could not run 'aten::")
    assert "Traceback" in capsys.readouterr().err


def test_a_log_line_has_the_form_of_the_specification():
    line = train.log_line(50, 5.123456, 25.0, 10, 2.4, 10 * 2**19, 1, 300, 2e6, 989e12)
    assert line == ("step 00050 (8.3%) | loss: 5.123456 | lrm: 1.00 | dt: 240ms | tok/sec: 2,184,533 | "
                    "mfu: 0.4% | epoch: 1 | remaining: 275s")
    line = train.log_line(123_456, 0.5, 301.0, 1, 0.01, 2048, 2, 300, 1e12, None)
    assert STEP.fullmatch(line) and "(100.0%)" in line


# In processes of their own


def test_one_command_from_any_folder_trains_and_leaves_evidence(demo, tmp_path):
    clone = tmp_path / "clone"
    commit(clone, *((name, (ROOT / name).read_text()) for name in ("train.py", "prepare.py")))
    for name in ("profile.py", "queue.py", "types.py"):  # not to be taken for Python's own
        (clone / name).touch()
    done = run(str(clone / "train.py"), cwd=tmp_path, CUDA_VISIBLE_DEVICES="", AUTORESEARCH_TIME_BUDGET="1")
    assert (done.returncode, done.stderr) == (0, "")
    summary = summary_of(done.stdout)
    assert 2 < float(summary["val_bpb"]) < 8 and float(summary["training_seconds"]) >= 1
    assert summary["depth"] == str(train.DEPTH["cpu"])
    (line,) = evidence(clone)
    assert f"{line['bpb']:.6f}" == summary["val_bpb"]
    assert line["contract"] == summary["contract"] and line["device"] == summary["device"]
    assert (line["script"], line["dirty"]) == ("train.py", False) and line["commit"]
    assert line["tokens"] == int(summary["num_steps"]) * train.TOTAL_BATCH_SIZE["cpu"]
    assert float(summary["training_seconds"]) <= line["seconds"] <= float(summary["total_seconds"]) + 1
    assert "train.py takes no arguments" in run(str(clone / "train.py"), "x", cwd=tmp_path, PYTHONSAFEPATH="1").stderr


# A small model, interrupted after 10 steps. Learning rates follow the clock: this one ticks by itself
LOSSES = """
import itertools, os, sys, types, prepare, train
train.DEPTH, train.BIGRAM_ROWS, train.TOTAL_BATCH_SIZE, train.DEVICE_BATCH_SIZE = 2, 1000, 512, 2
def finite(loss, step):
    print("loss", loss.hex())
    if step == 10: raise KeyboardInterrupt
    return loss
train.finite, seeds = finite, sys.argv[1:]
del sys.argv[1:]
for os.environ["SEED"] in seeds:
    train.time = types.SimpleNamespace(monotonic=itertools.count(0, 0.1).__next__)
    try: prepare.run_main(train.main)
    except SystemExit as end: print(end, file=sys.stderr)
"""


def test_a_seed_fixes_the_losses_across_processes_and_another_changes_them(demo, tmp_path):
    losses = []
    for seeds in ([""], ["43", "42"]):
        done = run("-c", LOSSES, *seeds, cwd=tmp_path, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="",
                   OMP_NUM_THREADS="2")
        assert done.stderr == "FAIL: interrupted\n" * len(seeds), done.stderr
        losses += re.findall(r"^loss (.*)", done.stdout, re.M)
    default, other, same = losses[:10], losses[10:20], losses[20:]
    assert default == same and all(a != b for a, b in zip(default, other, strict=True))


def test_a_closed_pipe_ends_quietly_even_under_the_caches_lock():
    command = f"{sys.executable} prepare.py --contract demo | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert done.stdout.startswith("contract: demo (") and done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_python_without_torch_is_told_how_to_start_in_one_line():
    done = run("-S", "train.py")
    assert done.returncode == 1 and done.stderr.startswith("FAIL: ") and done.stderr.count("\n") == 1
    assert "No module named 'torch'. Start with `uv run train.py`" in done.stderr
