"""Speed of the scene generator: images per minute at each size, whole command, median of several runs.

    python benchmarks/scenes.py [--runs 3] [--count 1000]

It is compared with the simplest replacement: one process writes the same number of JPEGs of random noise of the same
size into one tar. On a noisy machine the ratios of rows are reliable, single times are not.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.count} images, median of {options.runs} runs")
    print(f"{'size':>5} {'images/minute':>14} {'noise JPEGs/minute':>19} {'ratio':>6}")
    for size in (96, 128, 256):
        drawn = median_rate(options, lambda folder, size=size: pack(folder, options.count, size))
        noise = median_rate(options, lambda folder, size=size: write_noise(folder, options.count, size))
        print(f"{size:>5} {drawn:>14,.0f} {noise:>19,.0f} {drawn / noise:>6.2f}", flush=True)


def median_rate(options: argparse.Namespace, work) -> float:
    rates = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            work(Path(folder))
            rates.append(60 * options.count / (time.perf_counter() - begun))
    return statistics.median(rates)


def pack(folder: Path, count: int, size: int) -> None:
    words = ["--count", str(count), "--size", str(size), "--shard-size", "250", "--output", str(folder / "shards")]
    command = [sys.executable, "-m", "data_shards", "pack", "--source", "synthetic", *words]
    subprocess.run(command, check=True, capture_output=True)


def write_noise(folder: Path, count: int, size: int) -> None:
    random = np.random.default_rng(0)
    with tarfile.open(folder / "noise.tar", "w") as tar:
        for index in range(count):
            data = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(data, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{index}.jpg")
            member.size = data.tell()
            data.seek(0)
            tar.addfile(member, data)


if __name__ == "__main__":
    main()
