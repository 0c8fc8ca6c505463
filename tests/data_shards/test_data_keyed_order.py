"""The order without memory: each sample once, as its docstring says, resumable, as well shuffled as the stored one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_order import Sizes, order_of, pairs

from priorclip.data_shards import ShardStream
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.order.hashing import hash_integers
from priorclip.data_shards.order.keyed_order import BLOCKS, WINDOW, KeyedOrder
from priorclip.data_shards.order.keyed_permutation import KeyedPermutation
from priorclip.data_shards.stream import batch_fetcher
from priorclip.data_shards.stream.batch_fetcher import BatchFetcher


def config(order: str, **options: object) -> DataConfig:
    return DataConfig("unused", workers=0, block_size=4, window_blocks=3, order=order, **options)  # type: ignore[arg-type]


def slow_order(samples: int, seed: int, epoch: int, block_size: int, window_blocks: int) -> list[int]:
    """The order of keyed_order.py's docstring, with plain lists."""
    blocks = [list(range(i, min(i + block_size, samples))) for i in range(0, samples, block_size)]
    of_blocks = KeyedPermutation(hash_integers(seed, epoch, BLOCKS), len(blocks))
    blocks = [blocks[of_blocks.sample(place)] for place in range(len(blocks))]
    order = []
    for number, start in enumerate(range(0, len(blocks), window_blocks)):
        window = [sample for block in blocks[start : start + window_blocks] for sample in block]
        inside = KeyedPermutation(hash_integers(hash_integers(seed, epoch, WINDOW), number), len(window))
        order += [window[inside.sample(place)] for place in range(len(window))]
    return order


@settings(deadline=None)
@given(
    st.integers(1, 300),
    st.integers(0, 2**40),
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(1, 10),
    st.randoms(use_true_random=False),
)
def test_the_order_is_what_the_docstring_says(samples, seed, epoch, block, window, random) -> None:
    order = KeyedOrder(samples, seed, epoch, block, window)
    expected = slow_order(samples, seed, epoch, block, window)
    assert sorted(expected) == list(range(samples))
    positions = np.array(random.sample(range(samples), samples))
    assert order.samples(positions).tolist() == [expected[position] for position in positions]
    assert [order[position] for position in positions[:5]] == [expected[position] for position in positions[:5]]
    for outside in (-1, samples):
        with pytest.raises(IndexError, match="outside"):
            order[outside]


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_many_at_once_are_each_one(count: int, key: int) -> None:
    order = KeyedPermutation(key, count)
    places = np.arange(min(count, 200))
    assert order.samples(places).tolist() == [order.sample(int(place)) for place in places]


def test_it_stays_the_order_that_it_was() -> None:
    """A difference here breaks the resume of every run of a large corpus."""
    text = " ".join(str(KeyedOrder(1_000_003, 5, 2, 32, 64)[position]) for position in range(0, 1_000_003, 10_007))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "0db46d3a0f2d22ef"


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 120), st.integers(1, 4), st.sampled_from((1, 2, 4)), st.integers(0, 9), st.integers(0, 99))
def test_any_world_and_any_resume(samples: int, share: int, world: int, stop: int, seed: int) -> None:
    batch = share * world
    source = Sizes([samples // 2, samples - samples // 2])

    def stream(rank: int = 0, ranks: int = 1) -> ShardStream:
        return ShardStream(source, None, config("keyed"), global_batch=batch, rank=rank, world_size=ranks, seed=seed)

    one = stream()
    count = len(one) + 2
    whole = order_of(one, count)
    assert set(Counter(sample for row in whole[: len(one)] for sample in row).values()) == {1}
    rank = seed % world
    resumed = stream(rank, world)
    number = stop % len(one)
    resumed.load_state_dict({**one.state_dict(), "epoch": 0, "samples_seen": number * batch})
    assert order_of(resumed, count - number) == [row[rank::world] for row in whole[number:]]


def test_a_run_keeps_the_order_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` changes with the number of samples and with the version; a run does not."""
    source = Sizes([60, 40])

    def stream(order: str) -> ShardStream:
        return ShardStream(source, None, config(order), global_batch=8, seed=3)

    stored, keyed = stream("stored"), stream("keyed")
    assert order_of(stream("auto"), 12) == order_of(stored, 12)
    monkeypatch.setattr(batch_fetcher, "STORED", 99)
    assert order_of(stream("auto"), 12) == order_of(keyed, 12) != order_of(stored, 12)
    for begun in (stored, keyed):
        resumed = stream("auto")
        resumed.load_state_dict(begun.state_dict())
        assert order_of(resumed, 12) == order_of(begun, 12)
        assert resumed.state_dict() == begun.state_dict()
    with pytest.raises(ValueError, match=r"keyed order.*data\.order"):
        stored.load_state_dict(keyed.state_dict())
    with pytest.raises(ValueError, match="auto, stored or keyed, not 'other'"):
        config("other")


def test_what_would_not_fit_in_memory_is_refused_at_the_start() -> None:
    class Many(Sizes):
        files: list[object] = []  # noqa: RUF012

        def captions(self, sample: int, field: str) -> list[str]:
            raise AssertionError("no sample is read")

    source = Many([1 << 20] * 2000)
    stream = ShardStream(source, None, config("auto"), global_batch=8)
    assert len({sample for row in order_of(stream, 4) for sample in row}) == 32
    with pytest.raises(
        ValueError, match=r"order: stored would take 12\.6 GB .* for 2097152000 samples: set data.order"
    ):
        ShardStream(source, None, config("stored"), global_batch=8)
    for options in ({"captions": "all"}, {"balance": "scenes"}):
        with pytest.raises(
            ValueError, match=r"at most 100000000 samples, and there are 2097152000\. Leave out data\.[cb]a"
        ):
            BatchFetcher(source, object(), config("auto", **options), 0, True)  # type: ignore[arg-type]


def test_it_shuffles_nearly_as_a_full_permutation_does() -> None:
    """RS5M at a tenth of its size, in shards of 4,000: the figures that affect training, as of the stored order."""
    samples = 512_000
    place = np.arange(samples)
    order = KeyedOrder(samples, 7, 0, DataConfig.block_size, DataConfig.window_blocks).samples(place)
    assert abs(np.corrcoef(order, place)[0, 1]) < 0.03
    assert abs(np.abs(order - place).mean() / (samples / 3) - 1) < 0.03
    assert pairs(order, place // 4_000, 512) < 1.1
    assert pairs(order, place // 512, 512) < 1.6


def test_each_sample_comes_first_as_often_as_any_other() -> None:
    first = np.bincount([KeyedOrder(50, 7, epoch, 4, 5)[0] for epoch in range(1000)], minlength=50)
    assert ((first - 20) ** 2 / 20).sum() < 97  # chi-squared with 49 degrees of freedom: less in 99.995 % of cases


def test_two_billion_samples_need_no_memory() -> None:
    code = (
        # ru_maxrss begins with that of the parent
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "from priorclip.data_shards.order.mixture import Mixture, MixturePart\n"
        "part = MixturePart([10_000] * 200_000)\n"
        "mixture = Mixture([part], 1, 32, 2048, keyed=True)\n"
        "before = peak()\n"
        "draws = mixture.draws([(3, 1_800_000_000 + row * 96) for row in range(512)])\n"
        "print(len({draw.sample for draw in draws}), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    different, kilobytes = map(int, done.stdout.split())
    assert different == 512
    assert kilobytes < 4_000
