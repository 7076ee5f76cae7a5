"""
Time the training step of train.py and of another commit's train.py, in turn, in one run; by hand.

    uv run tests/bench_step.py [REVISION]        (default: HEAD)

Each version has its own knobs, the active contract's context and vocabulary, and random tokens: no
data is needed. Prints the milliseconds of a step, median and range of ROUNDS rounds of STEPS steps,
and the ratio of a token's time; equal versions gave 0.97 to 1.01 on two cores that others
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
    """A function that takes a step and returns its seconds, and its tokens; built as in train.main."""
    kind, T, dtype = device.type, contract.max_seq_len, train.compute_dtype(device)
    train.choose_attention(device, train.ATTENTION)
    config, total, rows = train.sizes(kind, T, contract.vocab_size)
    compiled = train.knob("COMPILE", kind)
    if compiled:
        train.compile_parts()
    model, optimizer = train.build(config, device, dtype, compiled, 42)
    tokens = torch.randint(config.vocab_size, (rows, T + 1), device=device)
    batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())] * (total // (rows * T))
    autocast = torch.autocast(kind, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step():
        began = time.perf_counter()
        with autocast:
            train.train_step(model, optimizer, batches)
        getattr(torch, kind).synchronize()
        return time.perf_counter() - began

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
            rounds[name].append(sum(seconds) / STEPS * 1000)
    print(f"{prepare.device_name(device)}, torch {torch.__version__}, ms per step, {ROUNDS} rounds of {STEPS} steps")
    for name, seen in rounds.items():
        print(f"{name[:12]:12} {statistics.median(seen):10.1f} ({min(seen):.1f}-{max(seen):.1f})")
    more = steps["train.py"][1] / steps[revision][1]  # tokens in a step
    ratios = [ours / theirs / more for theirs, ours in zip(rounds[revision], rounds["train.py"])]
    print(f"a token of train.py / of {revision}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    prepare.run_main(main)
