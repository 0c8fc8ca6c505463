"""`data_shards stats`: samples per second and memory, on tiny samples with captions that follow Zipf's law.

    python benchmarks/stats.py [--samples 200000] [--words 20000] [--workers 1]

The command runs in a new process. Its memory is the peak minus the memory after the imports, without worker processes.
The figures are also scaled in proportion to RS5M's 5,070,186 samples; real memory grows more slowly, because words and
their pairs repeat.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data_shards")]

RS5M, SHARD, LENGTH = 5_070_186, 10_000, 15  # samples, samples per shard, mean words per caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=20_000, help="words in the vocabulary")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        write_shards(shards, options.samples, options.words)
        command = [sys.executable, __file__, "--measure", str(shards), "--workers", str(options.workers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
    found = json.loads(done.stdout.splitlines()[-1])
    if found["samples"] != options.samples:
        raise SystemExit(f"{found['samples']} of {options.samples} samples were counted")
    rate, grown = options.samples / found["seconds"], found["peak_mb"] - found["imports_mb"]
    scale = RS5M / options.samples
    print(f"{options.samples:,} samples, {found['vocabulary']:,} words, {found['bigrams']:,} pairs, "
          f"{options.workers} workers")  # fmt: skip
    print(f"{'samples per second':24} {rate:10,.0f}")
    print(f"{'seconds':24} {found['seconds']:10,.0f}   {RS5M:,} samples: {RS5M / rate / 60:,.0f} minutes")
    print(f"{'MB over the imports':24} {grown:10,.0f}   {RS5M:,} samples: {grown * scale:,.0f} MB")
    print(f"{'MB of the imports':24} {found['imports_mb']:10,.0f}")


def write_shards(folder: Path, samples: int, words: int) -> None:
    """Writes tars of one tiny picture with different captions, and their index."""
    from small_data import encoded, picture

    from priorclip.data_shards.__main__ import main as data_shards

    image = encoded(picture(0, 8, 8), quality=50)
    captions = texts(samples, words)
    draw = random.Random(0)
    folder.mkdir()
    for start in range(0, samples, SHARD):
        with open(folder / f"train-{start // SHARD:06d}.tar", "wb") as tar:
            for number in range(start, min(start + SHARD, samples)):
                info = {"captions": [next(captions)], "label": f"scene {number % 50}", "width": 8, "height": 8,
                        "sha256": f"{draw.getrandbits(256):064x}"}  # fmt: skip
                tar.write(member(f"{number:08d}.jpg", image) + member(f"{number:08d}.json", json.dumps(info).encode()))
            tar.write(bytes(1024))
    if data_shards(["index", str(folder), "--workers", "1"]):
        raise SystemExit("the shards could not be indexed")


def member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def texts(samples: int, words: int) -> Iterator[str]:
    """Returns captions of words whose frequency falls with their rank, count ~ 1 / rank."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    names = np.array(["".join(rng.choice(letters, size)) + f"{rank:x}" for rank, size in
                      enumerate(rng.integers(2, 8, words))])  # fmt: skip
    ends = np.cumsum(1 / np.arange(1, words + 1))
    for start in range(0, samples, SHARD):
        lengths = 1 + rng.poisson(LENGTH - 1, min(SHARD, samples - start))
        drawn = names[np.searchsorted(ends, rng.random(lengths.sum()) * ends[-1])]
        for piece in np.split(drawn, np.cumsum(lengths)[:-1]):
            yield " ".join(piece)


def measured(shards: Path, workers: int) -> dict[str, float]:
    """Returns the figures of one run of the command in this process."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    from priorclip.data_shards.commands import StatsConfig
    from priorclip.data_shards.inspect.stats import write_stats

    imports = peak_mb()
    begun = time.perf_counter()
    write_stats(StatsConfig(str(shards), output="out", workers=workers))
    seconds = time.perf_counter() - begun
    numbers = json.loads(Path("out/stats.json").read_text())
    return {"seconds": seconds, "imports_mb": imports, "peak_mb": peak_mb(),
            **{name: numbers[name] for name in ("samples", "vocabulary", "bigrams")}}  # fmt: skip


def peak_mb() -> float:
    """Returns the peak memory of this process (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
