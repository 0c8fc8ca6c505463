"""The cost of a resume at RS5M's size: time to the first batch at 0 % and 90 % of an epoch, and memory per node.

    python benchmarks/resume.py [--samples 5070186] [--shards 128 5071] [--runs 3] [--folder /tmp/x]

The tars are sparse files of the real length with 64 samples, to which the entries of the real ``.idx`` point in turn.
Each measurement has its own process and lasts from opening the manifest to the batch of 64, with a warm file cache.
Memory is the proportional set size of 2 ranks with 2 workers each after 15 batches, minus that of the same processes on
1,000 samples. So it is the memory that the size of the data adds to a node.

WebDataset cannot seek: to resume at 90 % it reads the first 90 %. The rate is that of its tar reader without decoding,
from a tar in the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
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

from priorclip.data_shards.format.manifest import Manifest, ShardEntry
from priorclip.data_shards.format.shard_index import Member, ShardIndex

SAMPLE, SPOTS, DISTINCT = 100_000, 64, 128
RANKS, WORKERS = 2, 2

CHILD = """
import json, sys, time
import psutil
from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.config import DataConfig
folder, share, workers, batches = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def main():
    begun = time.perf_counter()
    config = DataConfig(folder, image_size=64, workers=workers)
    stream = ShardStream(ShardSet(folder), None, config, global_batch=64, seed=1)
    stream.load_state_dict({"epoch": 0, "samples_seen": int(len(stream) * share) * 64})
    rows = iter(stream)
    next(rows)
    seconds = time.perf_counter() - begun
    for _ in range(batches - 1):
        next(rows)
    me = psutil.Process()
    tree = [me, *me.children(recursive=True)]
    print(json.dumps({"seconds": seconds, "pss": sum(process.memory_full_info().pss for process in tree)}), flush=True)
    sys.stdin.read()
if __name__ == "__main__":
    main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5_070_186)
    parser.add_argument("--shards", type=int, nargs="+", default=[128, 5071])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="output folder; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        small = make(Path(name) / "small", 1000, 2)
        floor = node_memory(small)
        print(f"{'shards':>7} {'workers':>7} {'at 0 %':>8} {'at 90 %':>8} seconds (median of {options.runs})")
        for shards in options.shards:
            folder = make(Path(name) / str(shards), options.samples, shards)
            for workers in (0, WORKERS):
                first, late = ([run(folder, share, workers) for _ in range(options.runs)] for share in (0.0, 0.9))
                print(f"{shards:>7} {workers:>7} {statistics.median(first):>8.2f} {statistics.median(late):>8.2f}")
            added = node_memory(folder) - floor
            print(f"{shards:>7} {RANKS} ranks x {WORKERS} workers: {added / 1e6:.0f} MB more than with 1,000 samples")
        rate = webdataset_rate(Path(name))
        print(f"webdataset skips {rate:,.0f} samples/s a reader: {0.9 * options.samples / rate:,.0f} s to 90 %")


def make(folder: Path, samples: int, shards: int) -> Path:
    """Writes a folder of shards. More than 128 tars are hard links, so the disk has only 128 tars and indices."""
    folder.mkdir()
    sizes = [samples // shards + (number < samples % shards) for number in range(shards)]
    made: dict[int, list[str]] = {}
    entries = []
    for number, size in enumerate(sizes):
        tar = folder / f"s-{number:05d}.tar"
        alike = made.setdefault(size, [])
        if len(alike) < DISTINCT:
            write_sparse(tar, size, alike[0] if alike else None)
            alike.append(str(tar))
        else:
            os.link(alike[number % DISTINCT], tar)
            os.link(f"{alike[number % DISTINCT]}.idx", f"{tar}.idx")
        entries.append(ShardEntry(tar.name, size, tar.stat().st_size, "", ""))
    Manifest(samples, 0, 0, [], {}, [], entries).save(folder)
    return folder


def write_sparse(tar: Path, samples: int, like: str | None) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((128, 128)).save(buffer, "JPEG")
    image, text = buffer.getvalue(), b'{"captions": ["a place"]}'
    spots = min(SPOTS, samples)
    places = [samples // spots * spot * SAMPLE for spot in range(spots)]
    spot_members: list[list[Member]] = [[] for _ in places]
    with open(tar, "wb") as file:
        file.truncate(samples * SAMPLE)
        for spot, place in enumerate(places):
            file.seek(place)
            for extension, data in (("jpg", image), ("json", text)):
                header = tarfile.TarInfo(f"{spot:08d}.{extension}")
                header.size = len(data)
                file.write(header.tobuf())
                spot_members[spot].append(Member(f"{spot:08d}", extension, file.tell(), len(data)))
                file.write(data + bytes(-len(data) % 512))
    index = tar.with_name(f"{tar.name}.idx")
    if like:
        index.write_bytes(Path(f"{like}.idx").read_bytes())
        return
    members = [member for row in range(samples) for member in spot_members[row % spots]]
    ShardIndex.build(members).save(index)


def child(folder: Path, share: float, workers: int, batches: int) -> subprocess.Popen:
    script = folder.parent / "child.py"
    script.write_text(CHILD)
    words = [sys.executable, str(script), str(folder), str(share), str(workers), str(batches)]
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def answer(process: subprocess.Popen) -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a measurement failed: see its message above")
    return json.loads(line)


def run(folder: Path, share: float, workers: int) -> float:
    process = child(folder, share, workers, 1)
    seconds = answer(process)["seconds"]
    process.communicate(timeout=60)
    return seconds


def node_memory(folder: Path) -> float:
    """Returns the proportional set size of all processes of a node, in bytes."""
    ranks = [child(folder, 0.5, WORKERS, 15) for _ in range(RANKS)]
    answers = [answer(rank) for rank in ranks]  # each measures while the other runs or waits
    for rank in ranks:
        rank.communicate(timeout=60)
    return sum(given["pss"] for given in answers)


def webdataset_rate(folder: Path, samples: int = 3000) -> float:
    from webdataset import WebDataset

    path = folder / "plain.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for extension, size in (("jpg", SAMPLE), ("json", 200)):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    rates = []
    for _ in range(3):
        begun = time.perf_counter()
        count = sum(1 for _ in WebDataset(str(path), shardshuffle=False))
        rates.append(count / (time.perf_counter() - begun))
    return statistics.median(rates)


if __name__ == "__main__":
    main()
