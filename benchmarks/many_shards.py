"""What a set of many shards costs before and between its samples: opening, workers, the order of an epoch, draws.

    python -m benchmarks.many_shards [--shards 125 10000 200000] [--samples 10000]

The shards are files with holes, of the sizes that their manifest says, so 2 billion samples take 50 MB of disk. Times
are processor time. Each figure comes from a process of its own. ``stored`` and ``keyed`` are the values of data.order.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.manifest import Manifest, ShardEntry
from priorclip.data_shards.order.mixture import Mixture, MixturePart
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.stream.batch_fetcher import BatchFetcher

BATCH = 128
BYTES = 2048  # of a sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[125, 10_000, 200_000])
    parser.add_argument("--samples", type=int, default=10_000, help="of a shard")
    parser.add_argument("--folder", type=Path, default=None, help="where the shards are made")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        MEASUREMENTS[options.measure](str(options.folder))
        return
    for shards in options.shards:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            make_set(Path(folder), shards, options.samples)
            print(f"\n{shards:,} shards, {shards * options.samples:,} samples", flush=True)
            for name in MEASUREMENTS:
                command = [sys.executable, "-m", "benchmarks.many_shards", "--folder", folder, "--measure", name]
                subprocess.run(command, check=True)


def make_set(folder: Path, shards: int, samples: int) -> None:
    """Writes files with holes and their manifest."""
    entries = []
    for number in range(shards):
        name = f"train-{number:06d}.tar"
        for path, size in ((folder / name, samples * BYTES), (folder / f"{name}.idx", samples * 40)):
            with path.open("wb") as file:
                file.truncate(size)
        entries.append(ShardEntry(name, samples, samples * BYTES, "0" * 64, "0" * 64))
    total = shards * samples
    Manifest(total, total, total * BYTES, [], {}, ["captions"], entries, fingerprint="0" * 16).save(folder)


def measure_opening(folder: str) -> None:
    """Opening the set, and the copy of it that each decoding process gets."""
    before, begun = peak(), time.process_time()
    shards = ShardSet(folder)
    print(f"  open          {time.process_time() - begun:8.2f} s   {peak() - before:8.0f} MB at the peak")
    fetcher = BatchFetcher(shards, None, DataConfig(folder, order="keyed"), 0, True)
    begun = time.process_time()
    copied = pickle.dumps(fetcher)
    packing = time.process_time() - begun
    code = (
        "import pickle, sys, time\n"
        "from benchmarks.many_shards import peak\n"
        "import priorclip.data_shards.shards, priorclip.data_shards.stream.batch_fetcher\n"
        "data = sys.stdin.buffer.read()\n"
        "before, begun = peak(), time.process_time()\n"
        "fetcher = pickle.loads(data)\n"
        "fetcher.mixture.draws([(0, 0)])\n"
        "print(time.process_time() - begun, peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=copied, capture_output=True, check=True)
    unpacking, memory = map(float, done.stdout.split())
    print(
        f"  for a worker  {packing + unpacking:8.2f} s   {memory:8.0f} MB in each   {len(copied) / 1e6:.1f} MB to send",
        flush=True,
    )


def measure_order(folder: str, keyed: bool) -> None:
    """The first batch of an epoch at 90 % of it, and the draws of a batch."""
    manifest = Manifest.load(Path(folder))
    assert manifest is not None
    mixture = Mixture([MixturePart([entry.samples for entry in manifest.shards])], 0, 32, 2048, keyed)
    before, begun = peak(), time.process_time()
    start = mixture.samples * 9 // 10
    mixture.draws([(0, start + row) for row in range(BATCH)])
    first = time.process_time() - begun
    times = []
    for number in range(1, 40):
        rows = [(0, start + number * BATCH + row) for row in range(BATCH)]
        begun = time.process_time()
        mixture.draws(rows)
        times.append((time.process_time() - begun) / BATCH)
    name = "keyed " if keyed else "stored"
    each = 1e6 * statistics.median(times)
    print(f"  order {name}  {first:8.3f} s   {peak() - before:8.0f} MB in each   {each:.1f} us a sample", flush=True)


def peak() -> float:
    """Returns the largest resident memory of this process until now, MB. ru_maxrss begins with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


MEASUREMENTS = {
    "opening": measure_opening,
    "stored": lambda folder: measure_order(folder, keyed=False),
    "keyed": lambda folder: measure_order(folder, keyed=True),
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
