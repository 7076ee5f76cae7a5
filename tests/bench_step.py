"""
Time the training step of train.py and of another commit's train.py, in turn, in one run; by hand.

    uv run tests/bench_step.py [REVISION]        (default: HEAD)

Each version has its own knobs, the active contract's context and vocabulary, and random tokens: no
data is needed. Prints the milliseconds of each stage, medians and range of ROUNDS rounds of STEPS
steps, and the ratio of a token's time; equal versions gave 0.97 to 1.01 on two cores that others
use (n = 6). 3c96724 and later have the names used here.
"""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import prepare  # noqa: E402

ROUNDS, STEPS, WARM = 5, 8, 3


def load(path: Path, source: str):
    """The module of a train.py; dataclasses and torch.compile want it to be a file and to be known."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stepper(train, device: torch.device, contract: prepare.Contract):
    """A function that takes one step and returns the seconds of its stages, and the step's tokens; built
    as in train.main."""
    kind, T, dtype = device.type, contract.max_seq_len, train.compute_dtype(device)
    train.choose_attention(device, train.ATTENTION)
    config, total, rows = train.sizes(kind, T, contract.vocab_size)
    compiled = train.knob("COMPILE", kind)
    if compiled:
        train.compile_parts()
    model, optimizer = train.build(config, device, dtype, compiled, 42)
    accumulation = total // (rows * T)
    tokens = torch.randint(config.vocab_size, (rows, T + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    autocast = torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def now():
        if kind != "cpu":
            getattr(torch, kind).synchronize()
        return time.perf_counter()

    def step():
        forward = backward = 0.0
        for _ in range(accumulation):
            began = now()
            with autocast:
                loss = model(x, y) / accumulation
            middle = now()
            loss.backward()
            ended = now()
            forward, backward = forward + middle - began, backward + ended - middle
        optimizer.step()
        optimized = now() - ended
        optimizer.zero_grad(set_to_none=True)
        return forward, backward, optimized

    for _ in range(WARM):
        step()
    return step, total


def main():
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    shown = subprocess.run(["git", "show", f"{revision}:./train.py"], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        sys.exit(f"no train.py at {revision!r}: {shown.stderr.strip()}")
    device, contract = prepare.default_device(), prepare.active_contract()[0]
    torch.set_float32_matmul_precision("high")
    sources = {revision: shown.stdout, "train.py": (ROOT / "train.py").read_text()}
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: stepper(load(Path(folder) / f"train_{i}.py", source), device, contract)
                 for i, (name, source) in enumerate(sources.items())}
    rounds = {name: [] for name in steps}
    for _ in range(ROUNDS):
        spent = {name: [] for name in steps}
        for i in range(STEPS):  # step by step, each the first in turn
            for name in list(steps)[:: -1 if i % 2 else 1]:
                spent[name].append(steps[name][0]())
        for name, seconds in spent.items():
            stages = [sum(stage) / STEPS * 1000 for stage in zip(*seconds)]
            rounds[name].append([*stages, sum(stages)])
    print(f"{prepare.device_name(device)}, torch {torch.__version__}, ms per step, {ROUNDS} rounds of {STEPS} steps")
    print(f"{'':12} {'forward':>10} {'backward':>10} {'optimizer':>10} {'step':>10}   range")
    for name, seen in rounds.items():
        medians, whole = map(statistics.median, zip(*seen)), [stages[-1] for stages in seen]
        print(f"{name[:12]:12} {' '.join(f'{m:10.1f}' for m in medians)}   {min(whole):.1f}-{max(whole):.1f}")
    more = steps["train.py"][1] / steps[revision][1]  # tokens in a step
    ratios = [ours[-1] / theirs[-1] / more for theirs, ours in zip(rounds[revision], rounds["train.py"])]
    print(f"a token of train.py / of {revision}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    prepare.run_main(main)
