"""The run: warm-up, clock, memory, seeds, the log, the summary, and how each failure ends."""

import gc
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run

import prepare
import train

CPU = torch.device("cpu")
STEP = re.compile(r"step \d{5,} \(\d+\.\d%\) \| loss: \d+\.\d{6} \| lrm: \d\.\d\d \| dt: \d+ms \| tok/sec: [\d,]+ \| "
                  r"mfu: (n/a|\d+\.\d%) \| epoch: \d+ \| remaining: \d+s")
SUMMARY = r"""---
val_bpb:          (?P<val_bpb>\d+\.\d{6})
training_seconds: (?P<training_seconds>\d+\.\d)
total_seconds:    (?P<total_seconds>\d+\.\d)
peak_vram_mb:     (?P<peak_vram_mb>\d+\.\d)
mfu_percent:      (?P<mfu_percent>\d+\.\d\d)
total_tokens_M:   (?P<total_tokens_M>\d+\.\d)
num_steps:        (?P<num_steps>\d+)
num_params_M:     (?P<num_params_M>\d+\.\d)
depth:            (?P<depth>\d+)
seed:             (?P<seed>\d+)
contract:         (?P<contract>[a-z]+-[0-9a-f]{8})
device:           (?P<device>.+)
(?:[a-z_]+: +.+\n)*\Z"""


class Clock:
    """Stands in for train's `time` module; moves only when told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def small(tiny, monkeypatch):
    """train.py with the smallest model on the tiny contract, CPU, float32; returns the clock that it reads."""
    sizes = {"DEPTH": 2, "ASPECT_RATIO": 16, "HEAD_DIM": 16, "TOTAL_BATCH_SIZE": 512, "DEVICE_BATCH_SIZE": 8,
             "BIGRAM_ROWS": 64, "WINDOW_PATTERN": "SL"}
    for name, value in sizes.items():
        monkeypatch.setitem(getattr(train, name), "cpu", value)
    monkeypatch.setattr(train, "SHORT_WINDOW", 8)
    monkeypatch.setattr(train, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(prepare, "default_device", lambda: CPU)
    clock = Clock()
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.delenv("SEED", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for one another
    yield clock
    torch.set_num_threads(threads)
    gc.enable()


@pytest.fixture
def steps(small, monkeypatch):
    """The real steps of a run, [(loss, shapes of the batches)], warm-up left out; each takes a quarter of a second."""
    return watch_steps(monkeypatch, small)


def watch_steps(monkeypatch, clock, seconds=0.25, before=None):
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


def summary_of(output):
    found = re.search(SUMMARY, output, re.M)
    assert found, output
    return found.groupdict()


def failure():
    """How main ends under run_main: the line that becomes stderr's last, and exit code 1."""
    with pytest.raises(SystemExit) as raised:
        prepare.run_main(train.main)
    assert isinstance(raised.value.code, str)  # which Python prints on stderr, and exits with 1
    assert raised.value.code.startswith("FAIL: ") and "\n" not in raised.value.code
    return raised.value.code


def test_a_run_prints_the_summary_of_the_specification_and_leaves_one_line_of_evidence(steps, capsys, tmp_path):
    train.main()
    output = capsys.readouterr().out
    summary = summary_of(output)
    assert output.startswith("contract: tiny (AUTORESEARCH_CONTRACT is set)")
    assert "attention: sdpa (torch's scaled_dot_product_attention on cpu)\n" in output
    assert (summary["training_seconds"], summary["num_steps"], summary["mfu_percent"]) == ("1.0", "4", "0.00")
    assert (summary["depth"], summary["seed"], summary["contract"]) == ("2", "42", prepare.fingerprint(TINY))
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert all(STEP.fullmatch(line) for line in lines)
    assert [line.split()[1] for line in lines] == ["00001", "00004"]  # the first and the last
    assert "(100.0%)" in lines[-1] and lines[-1].endswith("remaining: 0s") and f"loss: {steps[-1][0]:.6f}" in lines[-1]
    (evidence,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert f"{evidence['bpb']:.6f}" == summary["val_bpb"]
    assert (evidence["contract"], evidence["seed"], evidence["split"]) == (summary["contract"], 42, "val")
    assert evidence["tokens"] == 5 * 512  # drawn: one step more than trained


def test_the_test_split_prints_no_val_bpb(small, monkeypatch, capsys):
    watch_steps(monkeypatch, small, seconds=1.0)
    monkeypatch.setenv("AUTORESEARCH_SPLIT", "test")
    train.main()
    output = capsys.readouterr().out
    assert "\ntest_bpb:         " in output and "val_bpb" not in output


def tensors_of(model):
    return [*model.named_parameters(), *model.named_buffers()]


def test_warm_up_leaves_no_trace(small, monkeypatch):
    """Oracle: a model, an optimizer and a loader made afresh from the same seed; everything is equal bit for bit."""
    seen = {}

    def look(model, optimizer, batches):
        seen["calls"] = seen.get("calls", 0) + 1
        if seen["calls"] == train.WARMUP_STEPS + 1:
            seen["random"] = torch.get_rng_state()
            seen["weights"] = {name: t.clone() for name, t in tensors_of(model)}
            seen["gradients"] = [p.grad for p in model.parameters() if p.grad is not None]
            seen["state"], seen["groups"] = dict(optimizer.state), [dict(g) for g in optimizer.param_groups]
            seen["batches"], seen["model"] = batches, model

    watch_steps(monkeypatch, small, before=look)
    train.main()
    model, optimizer = train.build(seen["model"].config, CPU, torch.float32, False, 42)
    assert torch.equal(seen["random"], torch.get_rng_state())
    fresh = dict(tensors_of(model))
    assert fresh.keys() == seen["weights"].keys()
    assert all(torch.equal(fresh[name], seen["weights"][name]) for name in fresh)
    assert not seen["state"] and not seen["gradients"]
    train.set_schedules(optimizer, 0, 0.0)
    for ours, theirs in zip(optimizer.param_groups, seen["groups"], strict=True):
        assert {**ours, "params": 0} == {**theirs, "params": 0}
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 8, 32, "train", device=CPU)
    for x, y, epoch in seen["batches"]:
        first = next(loader)
        assert torch.equal(x, first[0]) and torch.equal(y, first[1]) and epoch == first[2]
    loader.close()


def test_accumulated_batches_step_as_one_batch_of_all_their_rows(small):
    """The losses and gradients are means: equal within float32 rounding, whatever the cut."""
    train.choose_attention(CPU)
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    seen = []
    for rows in (8, 4, 1):
        config = train.GPTConfig(50, 16, 2, 2, 2, 32, (16, 16))
        model, optimizer = train.build(config, CPU, torch.float32, False, 0)
        gradients = {}
        optimizer.step = lambda: gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})  # noqa: B023
        loss = train.train_step(model, optimizer, list(zip(x.split(rows), y.split(rows))))
        assert loss.ndim == 0 and not loss.requires_grad and all(p.grad is None for p in model.parameters())
        seen.append((loss, gradients))
    for loss, gradients in seen[1:]:
        torch.testing.assert_close(loss, seen[0][0])
        for name in gradients:
            torch.testing.assert_close(gradients[name], seen[0][1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_no_step_is_stopped_by_a_garbage_collection(small, monkeypatch):
    enabled, prepared = [], prepare.prepare
    monkeypatch.setattr(prepare, "prepare", lambda contract: (gc.enable(), prepared(contract))[1])  # as if it was new
    watch_steps(monkeypatch, small, before=lambda *arguments: enabled.append(gc.isenabled()))
    train.main()
    assert enabled and not any(enabled)


def out_of_memory_above(rows):
    def refuse(model, optimizer, batches):
        x, y, *_ = batches[0]
        if len(x) > rows:
            model(x, y).backward()  # it got so far
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return refuse


def test_a_batch_that_does_not_fit_is_halved_and_the_losses_are_those_of_the_smaller_one(small, monkeypatch, capsys):
    monkeypatch.setitem(train.DEVICE_BATCH_SIZE, "cpu", 16)
    with monkeypatch.context() as patch:
        halved = watch_steps(patch, small, before=out_of_memory_above(4))
        train.main()
    output = capsys.readouterr().out
    assert "out of memory: now DEVICE_BATCH_SIZE is 8, with 2 batches per step\n" in output
    assert "out of memory: now DEVICE_BATCH_SIZE is 4, with 4 batches per step\n" in output
    monkeypatch.setitem(train.DEVICE_BATCH_SIZE, "cpu", 4)
    with monkeypatch.context() as patch:
        from_the_start = watch_steps(patch, small)
        train.main()
    assert "out of memory" not in capsys.readouterr().out
    halved = halved[-len(from_the_start) :]  # a refused step counts as no warm-up step
    assert len(halved) == 4 and halved == from_the_start
    assert all(shapes == [(4, 32)] * 4 for _, shapes in halved)


def test_warm_up_rehearses_a_second_batch_beside_the_gradients_of_the_first(small, monkeypatch, capsys):
    """As where one batch of 8 rows fits, but not while the gradients of another are there."""
    def refuse(model, optimizer, batches):
        if len(batches) > 1 and len(batches[0][0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(train.DEVICE_BATCH_SIZE, "cpu", 8)
    seen = watch_steps(monkeypatch, small, before=refuse)
    train.main()
    assert "out of memory: now DEVICE_BATCH_SIZE is 4, with 4 batches per step\n" in capsys.readouterr().out
    assert seen[-1][1] == [(4, 32)] * 4


@pytest.mark.parametrize("name, known", [
    ("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", True), ("NVIDIA RTX A1000 Laptop GPU", False), ("a cpu", False)])
def test_mfu_is_told_only_for_a_device_whose_peak_is_known(name, known, steps, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "device_name", lambda device: name)
    train.main()
    assert ("mfu: n/a" in capsys.readouterr().out) != known


def test_an_odd_batch_shrinks_to_one_that_divides_the_tokens_per_step(small, monkeypatch, capsys):
    monkeypatch.setitem(train.DEVICE_BATCH_SIZE, "cpu", 15)
    monkeypatch.setitem(train.TOTAL_BATCH_SIZE, "cpu", 15 * 32)
    seen = watch_steps(monkeypatch, small, before=out_of_memory_above(4))
    train.main()
    sizes = re.findall(r"DEVICE_BATCH_SIZE is (\d+), with (\d+) batches", capsys.readouterr().out)
    assert sizes == [("5", "3"), ("1", "15")]
    assert seen[-1][1] == [(1, 32)] * 15


def test_a_model_that_does_not_fit_at_one_row_says_out_of_memory(small, monkeypatch):
    watch_steps(monkeypatch, small, before=out_of_memory_above(0))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        train.main()


def test_another_error_in_warm_up_is_not_taken_for_too_little_memory(small, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    watch_steps(monkeypatch, small, before=refuse)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.main()
    assert "out of memory" not in capsys.readouterr().out


@pytest.mark.parametrize("seconds, expected", [(0.5, 4), (0.52, 4), (0.6, 4), (0.98, 3), (1.02, 2), (10.0, 1)])
def test_the_budget_ends_with_the_step_in_which_it_runs_out(seconds, expected, small, monkeypatch, capsys):
    """Budget 2 s, fake clock: the last step begins before the budget ends, and overshoots by less than its duration."""
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "2")
    prepare.active_contract.cache_clear()
    progress, real = [], train.set_schedules
    monkeypatch.setattr(train, "set_schedules", lambda *arguments: (progress.append(arguments[2]), real(*arguments)))
    seen = watch_steps(monkeypatch, small, seconds=seconds)
    train.main()
    summary = summary_of(capsys.readouterr().out)
    assert int(summary["num_steps"]) == len(seen) == expected
    assert float(summary["training_seconds"]) == pytest.approx(expected * seconds, abs=0.051)
    assert 2.0 <= expected * seconds < 2.0 + seconds
    assert progress == pytest.approx([step * seconds / 2 for step in range(expected)])


@pytest.mark.parametrize("loss, shown", [(float("nan"), "nan"), (float("inf"), "inf"), (100.5, "100.5")])
@pytest.mark.parametrize("step", [1, 3])
def test_a_diverged_run_ends_at_once_with_the_loss_and_the_step(loss, shown, step, steps, monkeypatch, tmp_path):
    watched = train.train_step
    diverge = lambda *batch: (watched(*batch), torch.tensor(loss if len(steps) == step else 3.0))[1]  # noqa: E731
    monkeypatch.setattr(train, "train_step", diverge)
    message = failure()
    assert message.startswith(f"FAIL: loss {shown} at step {step} (") and "learning rate" in message
    assert len(steps) == step and not (tmp_path / "runs.jsonl").exists()


def test_a_loss_of_exactly_100_goes_on(steps, monkeypatch, capsys):
    watched = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *batch: (watched(*batch), torch.tensor(100.0))[1])
    train.main()
    assert summary_of(capsys.readouterr().out)["num_steps"] == "4"


@pytest.mark.parametrize("knob, value, words", [
    ("TOTAL_BATCH_SIZE", 1000, ("TOTAL_BATCH_SIZE (1000)", "DEVICE_BATCH_SIZE (8)", "MAX_SEQ_LEN (32)", "change the")),
    ("TOTAL_BATCH_SIZE", 16, ("TOTAL_BATCH_SIZE (16)", "DEVICE_BATCH_SIZE (1)", "MAX_SEQ_LEN (32)", "change the")),
    ("WINDOW_PATTERN", "SXL", ("WINDOW_PATTERN", "'SXL'", "S and L only")),
    ("WINDOW_PATTERN", "", ("WINDOW_PATTERN", "''", "S and L only")),
    ("ATTENTION", "flash", ("ATTENTION", "'flash'", "use auto or sdpa")),
    ("SEED", "forty-two", ("SEED", "'forty-two'", "whole number", "unset")),
    ("SEED", "-1", ("SEED", "'-1'", "whole number")),
    ("SEED", str(2**64), ("SEED", str(2**64), "whole number")),
    ("AUTORESEARCH_SPLIT", "train", ("AUTORESEARCH_SPLIT", "'train'", "val or test")),
])
def test_a_bad_knob_ends_in_one_line_with_its_name_its_values_and_the_remedy(knob, value, words, steps, monkeypatch):
    if knob.isupper() and not hasattr(train, knob):
        monkeypatch.setenv(knob, value)
    elif isinstance(getattr(train, knob), dict):
        monkeypatch.setitem(getattr(train, knob), "cpu", value)
    else:
        monkeypatch.setattr(train, knob, value)
    message = failure()
    assert all(word in message for word in words), message
    assert not steps


def test_a_model_that_sees_the_future_fails_in_warm_up(steps, monkeypatch):
    monkeypatch.setattr(train, "bigram_hash", lambda idx, rows: (torch.roll(idx, -1, 1) * 31 + idx) % rows)
    assert "sees the future" in failure()
    assert not steps


def test_an_uninitialised_parameter_ends_the_run_in_one_line(steps, monkeypatch):
    class Extra(train.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(1, 1))

    monkeypatch.setattr(train, "MLP", Extra)
    message = failure()
    assert "h.0.mlp.scale, h.1.mlp.scale" in message and "init_weights" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_completes_with_and_without_fast_bfloat16(dtype, small, monkeypatch, capsys):
    seen, dtypes = {}, set()

    def look(model, optimizer, batches):
        seen.update({name: p.dtype for name, p in model.named_parameters()})

    orthogonalize = train.orthogonalize
    monkeypatch.setattr(train, "orthogonalize", lambda x, dtype: (dtypes.add(dtype), orthogonalize(x, dtype))[1])
    monkeypatch.setattr(train, "compute_dtype", lambda device: dtype)
    losses = watch_steps(monkeypatch, small, before=look)
    train.main()
    output = capsys.readouterr().out
    assert float(summary_of(output)["val_bpb"]) < 8
    assert f", {str(dtype).removeprefix('torch.')}\n" in output
    assert losses[-1][0] < losses[0][0] + 0.1
    tables = {name for name in seen if name.startswith(("wte", "bigram", "value_embeds"))}
    assert tables and all(seen[name] == (dtype if name in tables else torch.float32) for name in seen)
    assert dtypes == {dtype}  # float32: no bfloat16 anywhere, which such a CPU would emulate


@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_a_cpu_computes_in_bfloat16_only_if_it_has_instructions_for_it(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert train.compute_dtype(CPU) == (torch.bfloat16 if avx512 or amx else torch.float32)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_computes_in_bfloat16_from_capability_8_on(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert train.compute_dtype(torch.device("cuda")) == dtype
    assert train.compute_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("budget, seconds", [(300, 0.05), (36_000, 6.0), (10, 0.001)])
def test_a_log_stays_under_20_kb_however_many_steps_a_run_has(budget, seconds, small, monkeypatch, capsys):
    def step(model, optimizer, batches):
        small.now += seconds
        return torch.tensor(3.0)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "set_schedules", lambda *arguments: None)
    monkeypatch.setitem(train.DEVICE_BATCH_SIZE, "cpu", 1)
    monkeypatch.setitem(train.TOTAL_BATCH_SIZE, "cpu", 32)
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", str(budget))
    prepare.active_contract.cache_clear()
    train.main()
    output = capsys.readouterr().out
    assert len(output) < 20_000 and "\r" not in output
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert all(STEP.fullmatch(line) for line in lines)
    assert lines[0].startswith("step 00001 (") and "(100.0%)" in lines[-1]
    assert int(summary_of(output)["num_steps"]) == pytest.approx(budget / seconds, abs=2)
    assert len(lines) <= 2 + budget / train.LOG_SECONDS


def test_a_log_line_has_the_form_of_the_specification():
    line = train.log_line(50, 5.123456, 25.0, 0.24, 300, 2**19, 1e12, 989e12, 1)
    assert line == ("step 00050 (8.3%) | loss: 5.123456 | lrm: 1.00 | dt: 240ms | tok/sec: 2,184,533 | mfu: 0.4% | "
                    "epoch: 1 | remaining: 275s")
    assert STEP.fullmatch(train.log_line(123_456, 0.5, 301.0, 0.01, 300, 2048, 1e12, None, 2))


# ----------------------------------------------------------------------------------------------------------------------
# In processes of their own


def demo_environment(demo_cache, **more):
    return {"AUTORESEARCH_CACHE": str(demo_cache), "AUTORESEARCH_CONTRACT": "demo", "CUDA_VISIBLE_DEVICES": ""} | more


def test_one_command_trains_scores_and_leaves_evidence(demo_cache, tmp_path):
    environment = demo_environment(demo_cache, AUTORESEARCH_TIME_BUDGET="5")
    done = run(str(ROOT / "train.py"), cwd=tmp_path, timeout=500, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    summary = summary_of(done.stdout)
    assert 2 < float(summary["val_bpb"]) < 8 and float(summary["training_seconds"]) >= 5
    assert (summary["seed"], summary["depth"]) == ("42", str(train.DEPTH["cpu"]))
    (evidence,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert f"{evidence['bpb']:.6f}" == summary["val_bpb"] and evidence["contract"] == summary["contract"]
    assert (evidence["seed"], evidence["split"], evidence["device"]) == (42, "val", summary["device"])
    assert evidence["tokens"] == (int(summary["num_steps"]) + 1) * train.TOTAL_BATCH_SIZE["cpu"]
    assert float(summary["training_seconds"]) <= evidence["seconds"] <= float(summary["total_seconds"]) + 1


# As `uv run train.py` with a smaller model, printing every real step's loss in full and interrupted after 20. Learning
# rates and weight decay follow the clock, so both processes get one that ticks alike: a tenth of a second per look
LOSSES = """
import itertools, types
import prepare, train
ticks = itertools.count(0, 0.1)
train.time = types.SimpleNamespace(monotonic=lambda: next(ticks))
sizes = {"DEPTH": 2, "BIGRAM_ROWS": 1000, "TOTAL_BATCH_SIZE": 512, "DEVICE_BATCH_SIZE": 2}
for name, value in sizes.items():
    getattr(train, name)["cpu"] = value
real, calls = train.train_step, []
def step(*arguments):
    loss = real(*arguments)
    calls.append(loss.item().hex())
    if len(calls) == train.WARMUP_STEPS + 20:
        print("losses:", *calls[train.WARMUP_STEPS:])
        raise KeyboardInterrupt
    return loss
train.train_step = step
prepare.run_main(train.main)
"""


def test_a_seed_fixes_the_losses_across_processes_and_another_changes_them_without_an_edit(demo_cache):
    losses = []
    for seed in ({}, {"SEED": "42"}, {"SEED": "43"}):
        done = run("-c", LOSSES, **demo_environment(demo_cache, OMP_NUM_THREADS="2", **seed))
        assert done.stderr == "FAIL: interrupted\n", done.stderr
        losses.append(re.search(r"losses: (.*)", done.stdout)[1].split())
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert all(a != b for a, b in zip(losses[0], losses[2]))


def test_ctrl_c_ends_in_one_line(demo_cache):
    environment = demo_environment(demo_cache, PYTHONUNBUFFERED="1")
    process = subprocess.Popen([sys.executable, "train.py"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment)
    for line in process.stdout:
        if line.startswith("model:"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, "FAIL: interrupted\n")


@pytest.mark.parametrize("script", ["train.py", "prepare.py"])
def test_a_closed_pipe_ends_quietly(script, demo_cache, tmp_path):
    """prepare.py meets it while it prepares, under the cache's lock."""
    cache = demo_cache if script == "train.py" else tmp_path
    done = subprocess.run(["bash", "-c", f"{sys.executable} {script} | head -n 1"], cwd=ROOT, capture_output=True,
                          text=True, timeout=200, env=demo_environment(cache, PATH="/usr/bin:/bin"))
    assert done.stdout.startswith("contract: demo (") and done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_a_bad_seed_is_the_last_line_of_the_output_and_exit_code_1(demo_cache):
    done = run("train.py", **demo_environment(demo_cache, SEED="abc"))
    assert done.returncode == 1
    assert done.stderr == f"FAIL: SEED is 'abc'; give a whole number from 0 to {2**63 - 1}, or unset it\n"
