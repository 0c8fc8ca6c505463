"""data.balance: scenes: each scene as often as any other, for all worlds, workers and resumes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import SCENES, records
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.order.balanced_scenes import BalancedScenes
from priorclip.data_shards.order.mixture import Mixture
from priorclip.data_shards.pack.write_shards import PackPlan, pack

SIZES = (20, 5, 2)  # images of the three scenes


@pytest.fixture(scope="module")
def tailed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 images of three scenes of 20, 5 and 2, in 4 shards that mix them."""
    folder = tmp_path_factory.mktemp("tailed") / "shards"
    labels = [scene for scene, size in zip(SCENES, SIZES, strict=True) for _ in range(size)]
    made = [replace(record, label=labels[index * 10 % 27]) for index, record in enumerate(records(27))]
    pack(made, folder, PackPlan(prefix="train", shard_size=7))
    return folder


def seen(batches: list[dict]) -> list[int]:
    return [sample for batch in batches for sample in batch["image_ids"].tolist()]


def test_each_scene_has_a_third_of_an_epoch(tailed: Path) -> None:
    shards = ShardSet(str(tailed))
    stream = stream_of(config(tailed, balance="scenes"), batch=9)
    assert len(stream) == 3
    assert Counter(shards.read(n).label for n in range(27)) == dict(zip(SCENES, SIZES, strict=True))
    every: Counter[int] = Counter()
    for _ in range(4):
        samples = seen(take(stream, 3))
        assert Counter(shards.read(sample).label for sample in samples) == dict.fromkeys(SCENES, 9)
        every.update(samples)
    for scene in SCENES:
        times = [every[n] for n in range(27) if shards.read(n).label == scene]
        assert max(times) - min(times) <= 1  # 36 draws of the scene, among its images alike


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_process(tailed: Path, world: int) -> None:
    settings_of = config(tailed, balance="scenes")
    whole = [set(seen([batch])) for batch in take(stream_of(settings_of, batch=6), 9)]
    parts = [take(stream_of(settings_of, batch=6, rank=rank, world_size=world), 9) for rank in range(world)]
    assert [set(seen([rank[place] for rank in parts])) for place in range(9)] == whole


def test_a_resumed_stream_goes_on(tailed: Path) -> None:
    settings_of = config(tailed, balance="scenes")
    first = stream_of(settings_of, batch=6)
    take(first, 5)
    state = first.state_dict()
    rest = take(first, 6)
    again = stream_of(settings_of, batch=6)
    again.load_state_dict(state)
    assert_same(take(again, 6), rest)
    with pytest.raises(ValueError, match="scenes alike"):
        stream_of(config(tailed), batch=6).load_state_dict(state)


def test_a_corpus_with_a_weight_is_balanced_too(tailed: Path) -> None:
    source = ShardSet({str(tailed): 2})
    options = DataConfig(str(tailed), image_size=24, workers=0, balance="scenes")
    stream = ShardStream(source, None, options, global_batch=54, seed=1)
    samples = seen(take(stream, 1))
    assert Counter(source.read(sample).label for sample in samples) == dict.fromkeys(SCENES, 18)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 3), st.integers(0, 3))
def test_the_order_is_fair_to_scenes_and_to_their_samples(scenes: list[int], passes: int, epoch: int) -> None:
    """Checked against a count of all draws."""
    balanced = BalancedScenes(scenes, ["a", "b", "c", "d", "e"])
    mixture = Mixture(balanced.parts(Fraction(passes)), 3, 4, 2)
    share = Fraction(passes * len(scenes), len(set(scenes)))
    drawn: Counter[int] = Counter()
    for number in range(epoch + 1):
        samples = [balanced.locate(mixture.draw(number, place).sample) for place in range(mixture.samples)]
        by_scene = Counter(scenes[sample] for sample in samples)
        assert all(abs(by_scene[scene] - share) <= Fraction(1, 2) for scene in set(scenes))
        drawn.update(samples)
    for scene in set(scenes):
        times = [drawn[sample] for sample in range(len(scenes)) if scenes[sample] == scene]
        assert max(times) - min(times) <= 1


def test_what_cannot_be_balanced_is_refused(tailed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.balance must be none or scenes, not 'images'"):
        config(tailed, balance="images")
    with pytest.raises(ValueError, match=r"needs data\.captions: one"):
        config(tailed, balance="scenes", captions="all")
    options = DataConfig(str(tailed), image_size=24, workers=0, balance="scenes")
    pack([replace(record, label=None) for record in records(9)], tmp_path / "bare", PackPlan(prefix="bare"))
    both = ShardSet({str(tailed): 1, str(tmp_path / "bare"): 1})
    with pytest.raises(ValueError, match="list their shards as one corpus"):
        ShardStream(both, None, options, global_batch=4)
    with pytest.raises(ValueError, match=r"area/00000 of .*bare.* has no scene: pack it with its label"):
        ShardStream(ShardSet(str(tmp_path / "bare")), None, options, global_batch=4)
