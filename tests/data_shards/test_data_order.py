"""Properties of the order: each sample once, the same for any world size, resumable anywhere."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorclip.data_shards import ShardStream
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.sample import Sample
from priorclip.data_shards.order.epoch_order import EpochOrder
from priorclip.data_shards.order.hashing import hash_integers, hash_range, permutation

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
WORLDS = (1, 2, 3, 4, 8, 64)


class Sizes:
    """A source with lengths and without samples, which is enough for positions."""

    classes: list[str] = []  # noqa: RUF012
    fingerprint = "sizes"

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def text(self, sample: int) -> Sample:
        return Sample("", b"", [], None)

    def __len__(self) -> int:
        return sum(self.sizes)


def slow_order(sizes: list[int], seed: int, epoch: int, block_size: int, window_blocks: int) -> list[int]:
    """The order of epoch_order.py's docstring, computed with plain lists."""
    starts = [sum(sizes[:shard]) for shard in range(len(sizes))]
    samples = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    cut = [shard[i : i + block_size] for shard in samples for i in range(0, len(shard), block_size)]
    blocks = [cut[i] for i in sorted(range(len(cut)), key=lambda block: slow_mix(hash_integers(seed, epoch, 1), block))]
    order = []
    for number, start in enumerate(range(0, len(blocks), window_blocks)):
        window = [sample for block in blocks[start : start + window_blocks] for sample in block]
        key = hash_integers(hash_integers(seed, epoch, 2), number)
        order += [window[i] for i in sorted(range(len(window)), key=lambda i: slow_mix(key, i))]
    return order


def slow_mix(key: int, i: int) -> int:
    """SplitMix64 with Python's integers."""
    z = (i * 0x9E3779B97F4A7C15 + key) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def order_of(stream: ShardStream, batches: int) -> list[list[int]]:
    """Returns the sample indices of the next batches of one rank."""
    positions = stream.positions()
    return [[stream.fetcher.order(e)[p] for e, p in next(positions)] for _ in range(batches)]


def config(block_size: int = 4, window_blocks: int = 3) -> DataConfig:
    return DataConfig("unused", workers=0, block_size=block_size, window_blocks=window_blocks)


def test_splitmix64_is_the_published_one() -> None:
    # First outputs of SplitMix64 seeded with 1234567 (Rosetta Code, from Vigna's splitmix64.c); element i here is
    # output i of the generator after its state has advanced once.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(hash_range(1234567 + 0x9E3779B97F4A7C15, 4)) == expected


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 50), st.integers(1, 10))
def test_order_is_what_the_docstring_says(sizes: list[int], seed: int, epoch: int, block: int, window: int) -> None:
    order = EpochOrder(sizes, seed, epoch, block, window)
    assert [order[i] for i in range(len(order))] == slow_order(sizes, seed, epoch, block, window)
    assert sorted(order[i] for i in range(len(order))) == list(range(sum(sizes)))


@settings(deadline=None)
@given(SIZES, st.integers(0, 99))
def test_random_access_agrees_with_walking(sizes: list[int], seed: int) -> None:
    walk, jump = EpochOrder(sizes, seed, 0, 3, 2), EpochOrder(sizes, seed, 0, 3, 2)
    walked = [walk[i] for i in range(len(walk))]
    for position in permutation(seed, len(walk)):
        assert jump[int(position)] == walked[position]


def test_epochs_and_seeds_differ() -> None:
    def listed(seed: int, epoch: int) -> list[int]:
        order = EpochOrder([30] * 10, seed, epoch, 8, 4)
        return [order[i] for i in range(len(order))]

    assert len({tuple(listed(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert listed(1, 2) == listed(1, 2)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 6), st.integers(0, 99), st.sampled_from(WORLDS))
def test_global_batches_do_not_depend_on_the_world(sizes: list[int], share: int, seed: int, world: int) -> None:
    batch = world * share
    source = Sizes(sizes * 20)
    if len(source) < batch:
        return
    one = ShardStream(source, None, config(), global_batch=batch, seed=seed)
    count = len(one) + 2  # into the second epoch
    ranks = [
        order_of(ShardStream(source, None, config(), global_batch=batch, rank=r, world_size=world, seed=seed), count)
        for r in range(world)
    ]
    for number, whole in enumerate(order_of(one, count)):
        dealt = [ranks[position % world][number][position // world] for position in range(batch)]
        assert dealt == whole


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 16), st.integers(0, 99))
def test_every_sample_at_most_once_and_only_the_tail_dropped(sizes: list[int], batch: int, seed: int) -> None:
    source = Sizes(sizes)
    if len(source) < batch:
        return
    stream = ShardStream(source, None, config(), global_batch=batch, seed=seed)
    seen = Counter(sample for row in order_of(stream, len(stream)) for sample in row)
    assert set(seen.values()) == {1}
    assert len(seen) == len(source) - len(source) % batch


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(0, 99), st.integers(0, 40), st.sampled_from(WORLDS), st.data())
def test_resume_continues_the_sequence(
    sizes: list[int], share: int, seed: int, stop: int, world: int, data: st.DataObject
) -> None:
    """Stops after any batch of any epoch and continues with another world size."""
    batch = share * world
    source = Sizes(sizes * 10)
    if len(source) < batch:
        return
    whole = ShardStream(source, None, config(), global_batch=batch, seed=seed)
    expected = order_of(whole, stop + 3)[stop:]
    epoch, number = divmod(stop, len(whole))
    rank = data.draw(st.integers(0, world - 1))
    resumed = ShardStream(source, None, config(), global_batch=batch, rank=rank, world_size=world, seed=seed)
    resumed.load_state_dict({"epoch": epoch, "samples_seen": number * batch})
    assert order_of(resumed, 3) == [row[rank::world] for row in expected]


def test_a_world_that_does_not_divide_and_too_few_samples_are_errors() -> None:
    with pytest.raises(ValueError, match=r"world size 3 must divide the global batch 8.*use 6"):
        ShardStream(Sizes([100]), None, config(), global_batch=8, world_size=3)
    with pytest.raises(ValueError, match="5 samples are fewer than one global batch of 8"):
        ShardStream(Sizes([5]), None, config(), global_batch=8)
    with pytest.raises(ValueError, match="out of range"):
        ShardStream(Sizes([50]), None, config(), global_batch=8, rank=2, world_size=2)


def test_changed_shards_and_impossible_states_are_refused() -> None:
    stream = ShardStream(Sizes([50]), None, config(), global_batch=8)
    with pytest.raises(ValueError, match="shards or their weights have changed"):
        stream.load_state_dict({"epoch": 0, "samples_seen": 8, "data": "others"})
    with pytest.raises(ValueError, match="outside"):
        stream.load_state_dict({"epoch": 0, "samples_seen": 51})


def whole(order: EpochOrder) -> np.ndarray:
    return np.concatenate([order.window(number) for number in range(order.windows)])


def pairs(order: np.ndarray, groups: np.ndarray, batch: int) -> float:
    """Returns the pairs of one group in a batch, relative to the number that a full permutation gives."""
    found = expected = 0.0
    for rows in np.array_split(groups[order], len(order) // batch):
        counts = np.bincount(rows)
        found += (counts * (counts - 1)).sum()
    sizes = np.bincount(groups)
    expected = batch * (batch - 1) * (sizes * (sizes - 1.0)).sum() / (len(order) * (len(order) - 1.0))
    return found / (len(order) // batch) / expected


def test_the_default_shuffles_nearly_as_a_full_permutation_does() -> None:
    """RS5M at a tenth of its size, in shards of 4,000: the figures of benchmarks/shuffle.py that affect training."""
    sizes = [4_000] * 128
    order = whole(EpochOrder(sizes, 7, 0, DataConfig.block_size, DataConfig.window_blocks))
    place = np.arange(len(order))
    assert abs(np.corrcoef(order, place)[0, 1]) < 0.03
    assert abs(np.abs(order - place).mean() / (len(order) / 3) - 1) < 0.03
    shard = np.repeat(np.arange(128), 4_000)
    assert pairs(order, shard, 512) < 1.1
    sorted_classes = place // 512  # 1,000 classes, one after the other
    assert pairs(order, sorted_classes, 512) < 1.6
    assert pairs(np.random.default_rng(0).permutation(len(order)), sorted_classes, 512) == pytest.approx(1, abs=0.02)
    assert pairs(place, sorted_classes, 512) > 100  # the measure detects an order that is not shuffled


def test_batches_of_two_epochs_are_not_alike() -> None:
    first, second = (whole(EpochOrder([4_000] * 32, 7, epoch, 32, 2048)) for epoch in (0, 1))
    batch_of = np.empty(len(second), np.int64)
    batch_of[second] = np.arange(len(second)) // 512
    shared = [np.bincount(batch_of[first[i : i + 512]]).max() for i in range(0, len(first) - 511, 512)]
    assert np.mean(shared) < 10  # the mean is 512 / 250 batches, and 7 for the largest


def test_what_is_dropped_differs_from_epoch_to_epoch() -> None:
    """Each epoch drops 7 of 55 samples: over many epochs, each sample occurs about equally often."""
    stream = ShardStream(Sizes([20, 1, 34]), None, config(), global_batch=8, seed=3)
    epochs = 400
    seen = Counter(sample for row in order_of(stream, len(stream) * epochs) for sample in row)
    missed = np.array([epochs - seen[sample] for sample in range(55)])
    assert missed.sum() == 7 * epochs
    expected, deviation = epochs * 7 / 55, np.sqrt(epochs * 7 / 55 * 48 / 55)
    assert np.abs(missed - expected).max() < 5 * deviation


def test_five_million_samples_resume_in_no_time_and_little_memory() -> None:
    code = (
        "import time\n"
        # ru_maxrss begins with that of the parent
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "from priorclip.data_shards.order.epoch_order import EpochOrder\n"
        "before = peak()\n"
        "start = time.process_time()\n"
        "order = EpochOrder([1000] * 5070, 1, 3, 32, 2048)\n"
        "sample = order[len(order) * 9 // 10]\n"
        "print(time.process_time() - start, peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 2, "the contract of a resume"
    assert kilobytes < 30_000
