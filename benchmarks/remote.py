"""Remote shards: images per second with and without read-ahead, compared with webdataset's sequential streaming.

    python benchmarks/remote.py --latency 0.03 --samples 512

One HTTP server on this machine answers each request ``latency`` seconds late and serves the same tars to all. The
measured time is that of reading encoded images: batches in shuffled order for us, whole tars for webdataset (with its
``pipe:curl`` if curl exists). It prints one line each and the ratios; ``--json FILE`` stores them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data_shards")]

import webdataset  # noqa: E402
from remote_server import serving  # noqa: E402

from priorclip.data_shards import ShardSet  # noqa: E402
from priorclip.data_shards.order.epoch_order import EpochOrder  # noqa: E402
from priorclip.data_shards.pack.write_shards import PackPlan, pack  # noqa: E402
from priorclip.data_shards.sources import synthetic  # noqa: E402

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.03, help="delay of each answer in seconds")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pack(synthetic(options.samples, 0, 128), root / "served" / "train", PackPlan(prefix="train", shard_size=128))
        with serving(root / "served") as server:
            server.behaviour.latency = options.latency
            url = f"{server.url}/train/"
            for depth in (0, 16):
                access = {"cache": str(root / f"cache-{depth}"), "cache_limit": 0, "read_ahead": depth}
                shards = ShardSet(url, **access)
                rates[f"ranges, read_ahead {depth}"] = rate(options.samples, lambda s=shards: ours(s))
            shards = ShardSet(url, cache=str(root / "cache"))
            rates["cache, first epoch"] = rate(options.samples, lambda: ours(shards))
            rates["cache, second epoch"] = rate(options.samples, lambda: ours(shards))
            tars = [f"{url}{file.name}" for file in shards.files]
            if shutil.which("curl"):
                rates["webdataset, sequential"] = rate(options.samples, lambda: peer(tars))
    for name, value in rates.items():
        print(f"{name:26} {value:8.0f} images/s")
    ratios = {"reading ahead": rates["ranges, read_ahead 16"] / rates["ranges, read_ahead 0"]}
    if "webdataset, sequential" in rates:
        ratios["against webdataset"] = rates["ranges, read_ahead 16"] / rates["webdataset, sequential"]
    for name, value in ratios.items():
        print(f"{name:26} {value:8.2f} times")
    if options.json:
        options.json.write_text(json.dumps({"latency": options.latency, "rates": rates, "ratios": ratios}, indent=1))


def rate(samples: int, work: Callable[[], int]) -> float:
    started = time.perf_counter()
    found = work()
    if found != samples:
        raise SystemExit(f"{found} of {samples} samples were read")
    return samples / (time.perf_counter() - started)


def ours(shards: ShardSet) -> int:
    """Reads batches in shuffled order, each announced before it is read."""
    order = EpochOrder(shards.sizes, 0, 0, 16, 8)
    positions = [order[position] for position in range(len(shards))]
    for start in range(0, len(shards), BATCH):
        batch = positions[start : start + BATCH]
        shards.prefetch(batch)
        for sample in batch:
            shards.read(sample)
    return len(shards)


def peer(tars: list[str]) -> int:
    return sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False))


if __name__ == "__main__":
    main()
