"""
Measure how fast and in how much memory data is prepared; every ratio comes from one run. By hand:

    uv run tests/bench_data.py [PARQUET]

PARQUET: a file with a `text` column, say a downloaded shard; without it English-like text is made up, which is quicker
to tokenise than real text. Three questions, each asked REPEATS times: does tokenising a shard of about 100 MB of text
use all cores (target: 0.9 of cores x the rate of tiktoken in one thread); does the peak memory of the whole of
prepare stay under 2 GB and not grow with the number of shards; how long does a second run on a complete cache take
beyond the imports (target: 2 s).
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
import dataclasses, resource
contract = dataclasses.replace(prepare.CONTRACTS["climbmix"], train_files=int(sys.argv[1]), eval_tokens=8 * 2**19,
                               val=("shard_00000.parquet", 0, None), test=("shard_00000.parquet", 0, None))
prepare.CONTRACTS["climbmix"] = contract
sys.argv[1:] = ["--contract", "climbmix"]
prepare.run_main(prepare.main)
print(time.monotonic() - imported, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, file=sys.stderr)
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
    size, ratios, rates, alone, overhead = sum(len(text.encode()) for text in texts), [], [], [], []
    for _ in range(REPEATS):
        sample = texts[::4]  # a quarter, from all over
        bytes_ = sum(len(text.encode()) for text in sample)
        start, cpu = time.perf_counter(), time.process_time()
        for text in sample:
            tokenizer.encoding.encode_to_numpy(text, disallowed_special=())
        alone.append(bytes_ / (time.perf_counter() - start) / 1e6)
        cpu_alone = (time.process_time() - cpu) * size / bytes_
        shutil.rmtree(manifest.derived("x").parent, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            start, cpu = time.perf_counter(), time.process_time()
            prepare._tokenize(tokenizer, "shard_00000.parquet", manifest)
        rates.append(size / (time.perf_counter() - start) / 1e6)
        overhead.append(cpu_alone / (time.process_time() - cpu))
        ratios.append(rates[-1] / (cores * alone[-1]))
    print(f"tokenise {size / 1e6:.0f} MB: {spread(rates)} MB/s on {cores} cores; tiktoken in one thread "
          f"{spread(alone)} MB/s; share of cores x one thread: {spread(ratios)} (target 0.9, on an idle machine); "
          f"in CPU seconds, which others on the machine disturb less: {spread(overhead)}")


def whole(cache: Path, shards: int) -> tuple[float, float]:
    """Prepare in a process of its own; returns seconds beyond the imports, and peak memory in GB."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(shards)], cwd=ROOT, capture_output=True, text=True,
                          check=True, env=os.environ | {"AUTORESEARCH_CACHE": str(cache)})
    seconds, peak = done.stderr.split()[-2:]
    return float(seconds), float(peak)


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
