"""Several corpora in one epoch: exact weights, the same for any world size, resumable anywhere, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import records, write_tar

from priorclip.common.options import parse
from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.corpus import Corpus, corpora
from priorclip.data_shards.order.epoch_order import EpochOrder
from priorclip.data_shards.order.hashing import hash_integers, permutation
from priorclip.data_shards.order.mixture import Mixture, MixturePart
from priorclip.data_shards.pack.write_shards import PackPlan, pack

WORLDS = (1, 2, 3, 4, 8, 64)
WEIGHTS = st.sampled_from(["1/3", "1/2", "1", "2", "2.5", "0.7", "10"]).map(Fraction)
SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 1)
PARTS = st.lists(st.builds(MixturePart, SIZES, WEIGHTS), min_size=1, max_size=4)


def endless(part: MixturePart, number: int, start: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Yields (corpus, pass, sample), pass after pass."""
    for pass_number in itertools.count():
        order = EpochOrder(part.sizes, seed, pass_number, 4, 3)
        for place in range(len(order)):
            yield number, pass_number, start + order[place]


def slow_epochs(parts: list[MixturePart], seed: int, epochs: int) -> list[list[tuple[int, int, int]]]:
    """Returns (corpus, pass, sample) at each position, computed by counting through lists."""
    several = len(parts) > 1
    passes = [
        endless(
            part, number, sum(sum(p.sizes) for p in parts[:number]), hash_integers(seed, 5, number) if several else seed
        )
        for number, part in enumerate(parts)
    ]
    quotas = [math.floor(part.weight * sum(part.sizes) + Fraction(1, 2)) for part in parts]
    total = sum(quotas)
    largest_first = sorted(range(len(parts)), key=lambda number: (-quotas[number], number))
    turns: list[int] = []
    counts = [0] * len(parts)
    for place in range(1, total + 1):
        left, rest = place, total
        for number in largest_first:
            due = math.floor(Fraction(left * quotas[number], rest) + Fraction(1, 2))
            left, rest = left - due, rest - quotas[number]
            if due > counts[number]:
                counts[number] += 1
                turns.append(number)
        assert len(turns) == place, "one corpus and no other is due"
    found = []
    for epoch in range(epochs):
        regular = [next(passes[number]) for number in turns]
        dealt = []
        for block, start in enumerate(range(0, total, 64)):
            piece = regular[start : start + 64]
            keys = permutation(hash_integers(seed, epoch, 6, block), len(piece)) if several else range(len(piece))
            dealt += [piece[i] for i in keys]
        found.append(dealt)
    return found


@dataclass
class Lengths:
    """A source with lengths and without samples."""

    parts: list[MixturePart]
    fingerprint: str = "lengths"

    @property
    def sizes(self) -> list[int]:
        return [size for part in self.parts for size in part.sizes]

    classes = ()

    def text(self, sample: int):
        return next(iter(records(1)))

    def __len__(self) -> int:
        return sum(self.sizes)


def config(shards: object = "unused", **options: object) -> DataConfig:
    defaults: dict = {"image_size": 24, "workers": 0, "block_size": 4, "window_blocks": 3}
    return DataConfig(shards, **{**defaults, **options})  # type: ignore[arg-type]


class CountedSizes(list):
    """Sizes of shards that count how often somebody goes through all of them."""

    passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return super().__iter__()


def test_a_draw_does_not_go_through_all_shards() -> None:
    """There can be 200,000 of them, and each sample is drawn twice."""
    parts = [MixturePart(CountedSizes([7] * 50), Fraction(weight)) for weight in ("1", "2.5")]
    mixture = Mixture(parts, 3, 4, 3)
    for position in range(300):
        mixture.draw(0, position)
    before = [part.sizes.passes for part in parts]
    for position in range(300):
        mixture.draw(0, position)
        mixture.substitute(position % 2, position)
    assert [part.sizes.passes for part in parts] == before


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(0, 99))
def test_positions_are_what_walking_gives(parts: list[MixturePart], seed: int) -> None:
    mixture = Mixture(parts, seed, 4, 3)
    expected = slow_epochs(parts, seed, 3)
    assert [len(epoch) for epoch in expected] == [mixture.samples] * 3
    for epoch, position in [(e, p) for e in (2, 0, 1) for p in permutation(seed, mixture.samples)[:100]]:
        assert mixture.draw(epoch, int(position)) == expected[epoch][position]


@settings(deadline=None, max_examples=40)
@given(PARTS, st.integers(0, 99))
def test_every_pass_has_every_sample_once(parts: list[MixturePart], seed: int) -> None:
    mixture = Mixture(parts, seed, 4, 3)
    draws = [mixture.draw(epoch, position) for epoch in range(4) for position in range(mixture.samples)]
    assert len(set(draws)) == len(draws)
    seen = Counter(draw.sample for draw in draws)
    for number, part in enumerate(parts):
        own = [seen[sample] for sample in range(mixture.starts[number], mixture.starts[number] + part.samples)]
        assert max(own) - min(own) <= 1
        assert sum(own) == 4 * mixture.quotas[number]
        assert abs(mixture.quotas[number] - part.weight * part.samples) <= Fraction(1, 2)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.builds(MixturePart, st.lists(st.integers(40, 90), min_size=1, max_size=3), WEIGHTS), min_size=2, max_size=6
    )
)
def test_a_batch_has_its_share_of_each_corpus(parts: list[MixturePart]) -> None:
    mixture = Mixture(parts, 3, 4, 3)
    corpus = [mixture.draw(1, position).corpus for position in range(mixture.samples)]
    for number, quota in enumerate(mixture.quotas):
        for start in range(0, mixture.samples - 127, 128):
            found = corpus[start : start + 128].count(number)
            assert abs(found - 128 * quota / mixture.samples) <= len(parts) + 1
        for end in range(64, mixture.samples + 1, 64):
            assert abs(corpus[:end].count(number) - end * quota / mixture.samples) <= (len(parts) + 1) / 2


def test_no_rank_sees_one_corpus_only() -> None:
    mixture = Mixture([MixturePart([5000]), MixturePart([5000])], 3, 4, 3)
    second_rank = [mixture.draw(0, position).corpus for position in range(1, 10_000, 2)]
    assert abs(sum(second_rank) - 2500) < 150


def test_one_corpus_is_what_it_was() -> None:
    """Stored indices and augmentation draws of plain shards. A difference here breaks every resume.

    The draws are older than mixtures. The indices date from the change that shuffled blocks over the whole epoch.
    """
    stream = ShardStream(Lengths([MixturePart([10, 10, 10, 10, 6])]), None, config(), global_batch=46, seed=5)
    drawn, indices = hashlib.sha256(), hashlib.sha256()
    for epoch in range(2):
        passes = {}
        for position in range(46):
            corpus, pass_number, sample = stream.fetcher.mixture.draw(epoch, position)
            assert (corpus, sample) == (0, stream.fetcher.order(epoch)[position])
            indices.update(f"{sample} ".encode())
            passes[sample] = pass_number
        for sample in range(46):
            rng = random.Random(hash_integers(5, passes[sample], 3, sample))
            drawn.update(repr((epoch, sample, rng.random(), rng.random())).encode())
    assert drawn.hexdigest()[:16] == "e1b5bcd7b634b546"
    assert indices.hexdigest()[:16] == "23a40c47e0fedf8e"


@settings(deadline=None, max_examples=40)
@given(PARTS, st.sampled_from(WORLDS), st.integers(1, 3), st.integers(0, 30), st.integers(0, 99))
def test_worlds_and_resumes_agree(parts: list[MixturePart], world: int, share: int, stop: int, seed: int) -> None:
    batch = world * share
    source = Lengths([MixturePart(list(part.sizes) * 8, part.weight, part.name) for part in parts])
    if Mixture(source.parts, 0, 4, 3).samples < batch:
        return
    whole = ShardStream(source, None, config(), global_batch=batch, seed=seed)
    expected = list(itertools.islice(whole.positions(), stop, stop + 3))
    epoch, number = divmod(stop, len(whole))
    ranks = [
        ShardStream(source, None, config(), global_batch=batch, rank=rank, world_size=world, seed=seed)
        for rank in range(world)
    ]
    for rank, stream in enumerate(ranks):
        stream.load_state_dict({"epoch": epoch, "samples_seen": number * batch})
        assert list(itertools.islice(stream.positions(), 3)) == [row[rank::world] for row in expected]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """30 samples of one corpus and 11 of another, which has one more class."""
    folder = tmp_path_factory.mktemp("two")
    made = records(41)
    for record in made[30:]:
        record.label = "farm"
    pack(made[:30], folder / "a", PackPlan(prefix="a", shard_size=7))
    pack(made[30:], folder / "b", PackPlan(prefix="b", shard_size=4))
    return {"a": folder / "a", "b": folder / "b"}


def stream_of(settings: DataConfig, batch: int = 8, **options: object) -> ShardStream:
    return ShardStream(ShardSet(settings.shards), None, settings, global_batch=batch, **{"seed": 5, **options})  # type: ignore[arg-type]


def take(stream: ShardStream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def test_real_shards_resume_with_other_workers_and_worlds(two: dict[str, Path]) -> None:
    """30 + 2.5 * 11 samples in an epoch, which are 7 batches of 8. Stops before and at the end of an epoch."""
    shards = {str(two["a"]): 1, str(two["b"]): 2.5}
    expected = take(stream_of(config(shards)), 16)
    assert [batch["epoch"] for batch in expected] == [0] * 7 + [1] * 7 + [2] * 2
    first = stream_of(config(shards))
    for stop, workers, world in ((5, 2, 2), (7, 1, 4), (13, 0, 8)):
        first.load_state_dict({"epoch": 0, "samples_seen": 0})
        take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        rank = stop % world
        resumed = stream_of(config(shards, workers=workers), rank=rank, world_size=world)
        resumed.load_state_dict(state)
        for found, whole in zip(take(resumed, 3), expected[stop : stop + 3], strict=True):
            for name in ("images", "labels", "image_ids"):
                assert torch.equal(found[name], whole[name][rank::world])


def test_labels_share_one_numbering_and_a_second_sight_is_another_crop(two: dict[str, Path]) -> None:
    stream = stream_of(config([{"shards": str(two["a"])}, {"shards": str(two["b"]), "weight": 2}]), batch=52)
    (batch,) = take(stream, 1)
    assert stream.classes == ["airport", "beach", "denseresidential", "farm"]
    seen: dict[int, list[torch.Tensor]] = {}
    for sample, label, image in zip(batch["image_ids"].tolist(), batch["labels"].tolist(), batch["images"]):
        seen.setdefault(sample, []).append(image)
        assert (label == 3) == (sample >= 30)
    assert {len(images) for sample, images in seen.items() if sample < 30} == {1}
    assert {len(images) for sample, images in seen.items() if sample >= 30} == {2}
    assert not any(torch.equal(*images) for images in seen.values() if len(images) == 2)


def test_bad_samples_are_replaced_from_their_corpus(two: dict[str, Path], tmp_path: Path) -> None:
    members = {f"x{i}.jpg": b"" if i % 2 else ShardSet(str(two["a"])).read(i).image for i in range(10)}
    write_tar(tmp_path / "bad.tar", members)
    shards = [{"shards": str(two["a"])}, {"shards": str(tmp_path / "bad.tar"), "weight": 3}]
    stream = stream_of(config(shards, max_bad_share=1.0), batch=6, epochs=1)
    ids = [sample for batch in stream for sample in batch["image_ids"].tolist()]
    assert len(ids) == 60
    assert stream.skipped["empty image"] >= 15
    assert sum(sample >= 30 for sample in ids) == 30


def test_shares_are_logged_and_weights_are_in_the_fingerprint(
    two: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        stream = stream_of(config({str(two["a"]): 1, str(two["b"]): "5/2"}))
    assert "weight 5/2, 11 samples, 28 (48.3 %) of the 58 samples of an epoch" in caplog.text
    assert len(stream) == 7
    other = stream_of(config({str(two["a"]): 1, str(two["b"]): 2}))
    with pytest.raises(ValueError, match="shards or their weights have changed"):
        other.load_state_dict(stream.state_dict())
    plain = ShardSet([str(two["a"]), str(two["b"])])
    assert ShardSet([{"shards": [str(two["a"]), str(two["b"])], "weight": 1}]).fingerprint == plain.fingerprint
    state = stream.state_dict()
    for options in ({"seed": 6}, {"block": 5}):
        shards = config({str(two["a"]): 1, str(two["b"]): "5/2"}, block_size=options.get("block", 4))
        with pytest.raises(ValueError, match="samples would repeat"):
            stream_of(shards, seed=options.get("seed", 5)).load_state_dict(state)


def test_mistakes_are_named(two: dict[str, Path], tmp_path: Path) -> None:
    a, b = str(two["a"]), str(two["b"])
    with pytest.raises(ValueError, match=r"unknown key 'wieght'.*did you mean 'weight'"):
        config([{"shards": a, "wieght": 2}])
    for weight in (0, -1, "many", "1/0", True, "nan", 1e9):
        with pytest.raises(ValueError, match=f"weight of {a}"):
            config({a: weight})
    with pytest.raises(ValueError, match="needs 'shards'"):
        config([{"weight": 2}])
    with pytest.raises(ValueError, match=r"a-000000\.tar is named twice"):
        ShardSet({a: 1, f"{a}/a-000000.tar": 2})
    with pytest.raises(ValueError, match="gives no sample in an epoch"):
        stream_of(config({a: 1, b: "1/1000"}))
    write_tar(tmp_path / "nothing.tar", {})
    with pytest.raises(ValueError, match=r"no sample in .*nothing\.tar"):
        ShardSet({a: 1, str(tmp_path / "nothing.tar"): 1})


@dataclass
class Command:
    """A command.

    Args:
        data: shards
    """

    data: DataConfig


def test_the_command_line_takes_a_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [Corpus(["a"], Fraction(1)), Corpus(["b-{0..3}.tar"], Fraction(5, 2))]
    listed = [{"shards": "a"}, {"shards": "b-{0..3}.tar", "weight": 2.5}]
    for text in (json.dumps(listed), '{"a": 1, "b-{0..3}.tar": 2.5}'):
        chosen = parse(Command, ["--data.shards", text], prog="test").data
        assert corpora(chosen.shards) == expected
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps({"data": {"shards": chosen.shards}}))
        assert parse(Command, ["--config", str(file)], prog="test").data == chosen
    for plain in ("{pub11,rs3}-train-{0000..0031}.tar", "{a,b}", "data/x"):
        assert parse(Command, ["--data.shards", plain], prog="test").data.shards == plain
    with pytest.raises(SystemExit):
        parse(Command, ["--data.shards", '[{"shards": "a", "wieght": 2}]'], prog="test")
    assert "did you mean 'weight'" in capsys.readouterr().err
