"""Time and memory of the search for near-duplicate images, by number of images.

    python benchmarks/near_duplicates.py [--images 100000 300000 1000000] [--distances 6 8] [--target 5070186]

The hashes are random 64-bit numbers with planted copies in which up to DISTANCE bits are flipped. The search must find
all copies, plus about the number of pairs that are near by chance. ``within`` is ``--near-duplicates`` (all images with
each other), ``against`` is ``--exclude`` (all images with the eight orientations of ``--evaluated`` images). Each row
has its own process and shows the CPU seconds of one core, peak memory above that of the hashes, and the CPU seconds of
comparing all pairs, estimated from a part. The last rows are a fit a N + b N^2 with a, b >= 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from priorclip.data_shards.dedupe.image_hashes import SYMMETRIES
from priorclip.data_shards.dedupe.near_hashes import BLOCK, near_pairs

BRUTE = 1 << 27  # comparisons from which the time of all is estimated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--distances", type=int, nargs="+", default=[6, 8])
    parser.add_argument("--target", type=int, default=5_070_186, help="number of images of the extrapolation")
    parser.add_argument("--planted", type=int, default=1000)
    parser.add_argument("--evaluated", type=int, default=1500, help="number of evaluation images")
    options = parser.parse_args()
    print(f"{'':<8} {'distance':>8} {'images':>10} {'planted':>8} {'found':>6} {'others':>8} {'expected':>9} "
          f"{'CPU s':>8} {'MiB':>6} {'brute s':>9}")  # fmt: skip
    for against in (0, options.evaluated * len(SYMMETRIES)):
        for distance in options.distances:
            seconds = []
            for images in options.images:
                seconds.append(row(images, distance, options.planted, against))
            total = extrapolated(options.images, seconds, options.target)
            print(f"{kind(against):<8} {distance:>8} {options.target:>10,} {'extrapolated':>34} {total:>8.1f}")


def row(images: int, distance: int, planted: int, against: int) -> float:
    """Measures in a new process and prints a line. Returns the seconds."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found, others, seconds, memory, brute = pool.submit(measured, images, distance, planted, against).result()
    pairs = images * against if against else images * (images - 1) / 2
    chance = pairs * sum(comb(64, bits) for bits in range(distance + 1)) / 2**64
    print(f"{kind(against):<8} {distance:>8} {images:>10,} {planted:>8,} {found:>6,} {others:>8,} {chance:>9.1f} "
          f"{seconds:>8.1f} {memory:>6.0f} {brute:>9.0f}", flush=True)  # fmt: skip
    if found != planted:
        raise SystemExit(f"{planted - found} planted copies were not found")
    return seconds


def kind(against: int) -> str:
    return "against" if against else "within"


def measured(images: int, distance: int, planted: int, against: int) -> tuple[int, int, float, float, float]:
    """Returns (planted pairs found, other pairs, CPU seconds, MiB above the hashes, CPU seconds of all pairs)."""
    rng = np.random.default_rng(images + distance)
    hashes = rng.integers(0, 2**64, images, dtype=np.uint64)
    evaluated = rng.integers(0, 2**64, against, dtype=np.uint64) if against else None
    originals = hashes if evaluated is None else evaluated
    source = rng.choice(len(originals) - planted, planted, replace=False)
    for copy, original in enumerate(source.tolist()):
        bits = rng.choice(64, copy % (distance + 1), replace=False)
        hashes[images - planted + copy] = originals[original] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    wanted = set(zip(source.tolist(), range(images - planted, images), strict=True))
    before, begun = peak(), time.process_time()
    left, right = (hashes, None) if evaluated is None else (evaluated, hashes)
    found = {pair for i, j, _ in near_pairs(left, right, distance) for pair in zip(i.tolist(), j.tolist(), strict=True)}
    seconds, memory = time.process_time() - begun, peak() - before
    pairs = len(left) * images / (1 if against else 2)
    return len(found & wanted), len(found - wanted), seconds, memory, pairs * brute(left, hashes, distance)


def brute(left: NDArray[np.uint64], right: NDArray[np.uint64], distance: int) -> float:
    """Returns CPU seconds per comparison of all pairs, in blocks that fit into the cache."""
    done, begun = 0, time.process_time()
    columns = right[: min(len(right), BLOCK // 8)]
    while done < BRUTE:
        np.flatnonzero(np.bitwise_count(left[:8, None] ^ columns) <= distance)
        done += 8 * len(columns)
    return (time.process_time() - begun) / done


def extrapolated(images: list[int], seconds: list[float], target: int) -> float:
    """Returns the seconds for ``target`` images: a N + b N^2 with the smallest relative error of the measurements."""
    sizes = np.array(images, float)
    terms = np.stack([sizes, sizes**2], axis=1)
    measured = np.array(seconds)
    parts, _ = nnls(terms / measured[:, None], np.ones(len(sizes)))
    return float(parts @ [target, float(target) ** 2])


def peak() -> float:
    """Returns the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
