"""Quality of the shuffle of an epoch, compared with a full permutation and with WebDataset's shuffle buffer.

    python benchmarks/shuffle.py [--samples 5070186] [--shards 128 5071] [--batches 512 8192] [--classes 1000]

For each order of an epoch, relative to the expectation of a full permutation (1.00 is equal):

    travel     mean |place in the epoch - place in the manifest| over its expectation N/3
    rank corr. Spearman's correlation of the two places; 0 for a permutation
    shard      pairs of one shard in a global batch
    class      pairs of one class in a global batch, if the shards are sorted by class; after packing 1.00
    overlap    largest number of samples that a batch shares with any batch of the next epoch

Orders: ``blocks`` is the order of data_shards; ``buffer`` is shards in random order through webdataset's shuffle of
5,000 samples (1,000 at the start), read by one or several loaders, from which a batch takes samples in turn;
``permutation`` is numpy's and shows the noise of the figures.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.order.epoch_order import EpochOrder

Order = Callable[[int], NDArray[np.int64]]  # epoch -> sample at each position


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5_070_186)
    parser.add_argument("--shards", type=int, nargs="+", default=[128, 5071])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--blocks", nargs="+", default=[f"{DataConfig.block_size}x{DataConfig.window_blocks}"],
                        help="BLOCK_SIZExWINDOW_BLOCKS to measure")  # fmt: skip
    parser.add_argument("--loaders", type=int, nargs="*", default=[1, 16], help="loaders of the buffer")
    options = parser.parse_args()
    for shards in options.shards:
        sizes = np.full(shards, options.samples // shards)
        sizes[: options.samples % shards] += 1
        print(f"\n{options.samples:,} samples in {shards:,} shards, {options.classes} classes")
        columns = "".join(f"{f'shard @{b}':>12} {f'class @{b}':>12} {f'overlap @{b}':>14}" for b in options.batches)
        print(f"{'order':<22} {'travel':>7} {'rank corr.':>10} {columns} {'seconds':>8}")
        for name, order in orders(sizes, options).items():
            begun = time.perf_counter()
            first, second = order(0), order(1)
            seconds = (time.perf_counter() - begun) / 2
            scenes = classes(len(first), options.classes)
            cells = "".join(
                f"{pairs(first, owners(sizes), batch):>12.2f} {pairs(first, scenes, batch):>12.2f} "
                f"{overlap(first, second, batch):>14.1f}"
                for batch in options.batches
            )
            print(f"{name:<22} {travel(first):>7.3f} {correlation(first):>10.4f} {cells} {seconds:>8.1f}", flush=True)


def orders(sizes: NDArray[np.int64], options: argparse.Namespace) -> dict[str, Order]:
    found: dict[str, Order] = {}
    for text in options.blocks:
        block, window = map(int, text.split("x"))
        found[f"blocks {text}"] = lambda epoch, block=block, window=window: whole(
            EpochOrder(sizes, 1, epoch, block, window)
        )
    for loaders in options.loaders:
        found[f"buffer, {loaders} loaders"] = lambda epoch, loaders=loaders: buffered(sizes, epoch, loaders)
    found["permutation"] = lambda epoch: np.random.default_rng(epoch).permutation(int(sizes.sum()))
    return found


def whole(order: EpochOrder) -> NDArray[np.int64]:
    """Returns all positions of an epoch."""
    return np.concatenate([order.window(number) for number in range(order.windows)])


def buffered(sizes: NDArray[np.int64], epoch: int, loaders: int) -> NDArray[np.int64]:
    """WebDataset's order: each loader has some shuffled shards and a shuffle buffer; samples are taken in turn."""
    from webdataset.filters import _shuffle  # type: ignore[attr-defined]

    starts = np.cumsum(sizes) - sizes
    shards = np.random.default_rng(epoch).permutation(len(sizes))

    def samples(mine: NDArray[np.int64]) -> Iterator[int]:
        for shard in mine:
            yield from range(int(starts[shard]), int(starts[shard] + sizes[shard]))

    streams = [
        np.fromiter(_shuffle(samples(shards[loader::loaders]), 5000, 1000, random.Random(epoch * 1000 + loader)), int)
        for loader in range(loaders)
    ]
    turn = np.concatenate([np.arange(len(stream)) * loaders + place for place, stream in enumerate(streams)])
    return np.concatenate(streams)[np.argsort(turn, kind="stable")]


def owners(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the shard of each sample."""
    return np.repeat(np.arange(len(sizes)), sizes)


def classes(samples: int, number: int) -> NDArray[np.int64]:
    """Returns the class of each sample, for a manifest sorted by class."""
    return np.arange(samples) * number // samples


def travel(order: NDArray[np.int64]) -> float:
    return float(np.abs(order - np.arange(len(order))).mean() / (len(order) / 3))


def correlation(order: NDArray[np.int64]) -> float:
    return float(np.corrcoef(order, np.arange(len(order)))[0, 1])


def pairs(order: NDArray[np.int64], group: NDArray[np.int64], batch: int) -> float:
    """Returns mean pairs of one group per batch, divided by the expectation of a full permutation."""
    batches = len(order) // batch
    groups = group[order[: batches * batch]]
    number = int(group.max()) + 1
    cells = np.repeat(np.arange(batches), batch) * number + groups
    counts = np.unique(cells, return_counts=True)[1].astype(float)
    found = (counts * (counts - 1)).sum() / batches
    sizes = np.bincount(group).astype(float)
    total = float(len(order))
    expected = batch * (batch - 1) * (sizes * (sizes - 1)).sum() / (total * (total - 1))
    return float(found / expected)


def overlap(first: NDArray[np.int64], second: NDArray[np.int64], batch: int) -> float:
    """Returns the mean number of samples that a batch shares with the most similar batch of the next epoch."""
    batches = len(first) // batch
    place = np.empty(len(second), np.int64)
    place[second] = np.arange(len(second)) // batch
    cells = np.repeat(np.arange(batches), batch) * (batches + 1) + place[first[: batches * batch]]
    found, counts = np.unique(cells, return_counts=True)
    largest = np.zeros(batches, np.int64)
    np.maximum.at(largest, found // (batches + 1), counts)
    return float(largest.mean())


if __name__ == "__main__":
    main()
