"""
Measure how fast and in how much memory data is prepared; every ratio comes from one run. By hand:

    uv run tests/bench_data.py [PARQUET]

PARQUET: a file with a `text` column, say a downloaded shard; without it English-like text is made up, which is quicker
to tokenise than real text. Three questions, each asked REPEATS times: does tokenising a shard of about 100 MB of text
use all cores (target: 0.9 of cores x the rate of tiktoken in one thread); does the peak memory of the whole of
prepare, its processes together, stay under 2 GB and not grow with the number of shards; how long does a second run on a
complete cache take beyond the imports (target: 2 s). Cores that share a host are slower when all are busy: what as many
processes reach that only encode, side by side, is printed as well.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402

TEXT = 100e6  # characters tokenised
REPEATS = 3
CHILD = """
import sys, time
import prepare
imported = time.monotonic()
import dataclasses
contract = dataclasses.replace(prepare.CONTRACTS["climbmix"], train_files=int(sys.argv[1]), eval_tokens=8 * 2**19,
                               val=("shard_00000.parquet", 0, None), test=("shard_00000.parquet", 0, None))
prepare.CONTRACTS["climbmix"] = contract
sys.argv[1:] = ["--contract", "climbmix"]
prepare.run_main(prepare.main)
print(time.monotonic() - imported, prepare.peak_memory_mb(prepare.torch.device("cpu")) / 2**10, file=sys.stderr)
"""


def made_up(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(30_000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(50, 1500))) for _ in range(int(TEXT / 5000))]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd")


def cut(source: Path, path: Path) -> list[str]:
    """Write the first TEXT characters of a parquet file; returns its texts."""
    texts, size = [], 0
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                if size < TEXT:
                    texts.append(text)
                    size += len(text)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd")
    return texts


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} (n={len(values)}, {min(values):.2f} to {max(values):.2f})"


def tokenisation(folder: Path, texts: list[str]) -> None:
    contract = dataclasses.replace(prepare.CONTRACTS["climbmix"], tokenizer_chars=2 * 10**7)
    manifest, cores = prepare.Manifest(contract), len(os.sched_getaffinity(0))
    with contextlib.redirect_stdout(io.StringIO()):
        tokenizer = prepare._train_tokenizer(contract, contract.train(1), manifest)

    def size(texts: list[str]) -> int:
        return sum(len(text.encode()) for text in texts)

    def encode(texts: list[str]) -> None:
        for text in texts:
            tokenizer.encoding.encode_to_numpy(text, disallowed_special=())

    def encode_side_by_side() -> None:
        pids = []
        for core in range(cores):
            if not (pid := os.fork()):
                encode(texts[core::cores])
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)

    def measured(job, *arguments) -> tuple[float, float]:
        """Seconds, and CPU seconds of this process and of those that it waited for."""
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        with contextlib.redirect_stdout(io.StringIO()):
            job(*arguments)
        return time.perf_counter() - start, sum(os.times()[:4]) - cpu

    figures = {"_tokenize, MB/s": [], "tiktoken in one thread, MB/s": [],
               "_tokenize as a share of cores x one thread (target 0.9, on an idle machine)": [],
               "the same in CPU seconds": [], "processes that only encode, as such a share": []}
    for _ in range(REPEATS):
        samples = [texts[::4], texts[2::4]]  # a quarter from all over, before and after
        before = measured(encode, samples[0])
        shutil.rmtree(manifest.derived("x").parent, ignore_errors=True)
        full = measured(prepare._tokenize, tokenizer, "shard_00000.parquet", manifest)
        after = measured(encode, samples[1])
        limit = measured(encode_side_by_side)
        alone, cpu_alone = np.add(before, after) / sum(map(size, samples)) * size(texts)
        for values, value in zip(figures.values(), (size(texts) / full[0] / 1e6, size(texts) / alone / 1e6,
                                                    alone / cores / full[0], cpu_alone / full[1],
                                                    alone / cores / limit[0])):
            values.append(value)
    print(f"tokenise {size(texts) / 1e6:.0f} MB on {cores} cores:")
    for name, values in figures.items():
        print(f"  {name}: {spread(values)}; each: {', '.join(f'{value:.2f}' for value in values)}")


def memory(pid: int) -> float:
    """Proportional set size of a process and of all below it, GB; 0 where the system does not tell."""
    try:
        pss = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line[:4] == "Pss:")
        children = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (OSError, StopIteration):  # it has ended
        return 0.0
    return int(pss.split()[1]) / 2**20 + sum(map(memory, map(int, children)))


def whole(cache: Path, shards: int) -> tuple[float, float]:
    """Prepare in processes of its own; returns seconds beyond the imports, and peak memory in GB."""
    with subprocess.Popen([sys.executable, "-c", CHILD, str(shards)], cwd=ROOT, stdout=subprocess.DEVNULL, text=True,
                          stderr=subprocess.PIPE, env=os.environ | {"AUTORESEARCH_CACHE": str(cache)}) as process:
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.05)
        seconds, alone = map(float, process.stderr.read().split()[-2:])
    return seconds, max(peak, alone)  # the kernel's own peak, of the first process alone, misses no moment


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        caches = Path(temporary)
        os.environ["AUTORESEARCH_CACHE"] = str(caches / "1")
        folder = caches / "1" / "climbmix" / "parquet"
        folder.mkdir(parents=True)
        if len(sys.argv) > 1:
            source = Path(sys.argv[1])
        else:
            made_up(source := caches / "made-up.parquet")
        texts = cut(source, folder / "shard_00000.parquet")
        print(f"{source.name}: {len(texts):,} documents")
        tokenisation(folder, texts)
        del texts
        for shards in (1, 3):
            cache = caches / f"memory-{shards}"
            (cache / "climbmix" / "parquet").mkdir(parents=True)
            for number in range(shards):
                os.link(folder / "shard_00000.parquet", cache / "climbmix" / "parquet" / f"shard_{number:05d}.parquet")
            seconds, peak = whole(cache, shards)
            manifest = json.loads((cache / "climbmix" / "manifest.json").read_text())
            print(f"prepare {shards} shards of it: {seconds:.1f} s, peak {peak:.2f} GB (target 2), tokenizer trained "
                  f"on {manifest['tokenizer_chars'] / 1e6:.0f} MB")
        again = [whole(cache, shards)[0] for _ in range(REPEATS)]
        print(f"a second run on the complete cache: {spread(again)} s beyond the imports (target 2)")


if __name__ == "__main__":
    main()
