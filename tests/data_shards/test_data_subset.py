"""`pack --limit, --scenes, --zipf, --captions-kept`: the training sets of scaling studies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import encoded, picture

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.pack.subset import scenes_in_order, zipf_sizes
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.sources import Record

SCENES = ("airport", "beach", "bridge", "desert", "forest")
Content = dict[str, tuple[str | None, list[str]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 5 scenes with 12 each and 5 captions each."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    made = [
        Record(
            f"{number:02d}", encoded(picture(number, 24, 24)), [f"{number} {k}" for k in range(5)], SCENES[number % 5]
        )
        for number in range(60)
    ]
    pack(made, folder, PackPlan(shard_size=25))
    return folder


def words_of(whole: Path, output: Path, *options: object) -> list[str]:
    words = ["pack", "--source", "webdataset", "--shards", str(whole), "--workers", "1", "--output", str(output)]
    return [*words, *map(str, options)]


def subset(whole: Path, output: Path, *options: object) -> Content:
    assert main(words_of(whole, output, *options)) == 0
    shards = ShardSet(str(output))
    return {shards.key(n): (shards.read(n).label, shards.read(n).captions) for n in range(len(shards))}


def refusal(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture, *options: object) -> str:
    assert main(words_of(whole, tmp_path / "refused", *options)) == 2
    assert not (tmp_path / "refused").exists()
    return capsys.readouterr().err


def test_a_smaller_number_of_images_lies_in_a_larger_one(whole: Path, tmp_path: Path) -> None:
    few, more, other = (
        subset(whole, tmp_path / name, "--limit", limit, "--seed", seed)
        for name, limit, seed in (("a", 10, 1), ("b", 25, 1), ("c", 10, 2))
    )
    assert (len(few), len(more)) == (10, 25)
    assert few.items() <= more.items()
    assert few.keys() != other.keys()


def test_scenes_at_equal_size(whole: Path, tmp_path: Path) -> None:
    sizes = {}
    for count in (2, 3, 5):
        found = subset(whole, tmp_path / str(count), "--scenes", count, "--limit", 20, "--seed", 4)
        sizes[count] = Counter(label for label, _ in found.values())
    assert [sorted(each.values()) for each in sizes.values()] == [[10, 10], [6, 7, 7], [4, 4, 4, 4, 4]]
    assert sizes[2].keys() < sizes[3].keys() < sizes[5].keys()
    every = subset(whole, tmp_path / "all", "--scenes", 2, "--seed", 4)
    assert Counter(label for label, _ in every.values()) == dict.fromkeys(sizes[2], 12)


def test_the_seed_draws_the_scenes() -> None:
    records = [Record(str(number), b"", [], name) for number, name in enumerate(SCENES)]
    assert {scenes_in_order(records, seed)[0] for seed in range(40)} == set(SCENES)


def test_a_long_tail_at_equal_size(whole: Path, tmp_path: Path) -> None:
    flat, mild, steep = (
        Counter(label for label, _ in subset(whole, tmp_path / str(s), "--zipf", s, "--limit", 20).values())
        for s in (0, 0.5, 1)
    )
    assert sorted(flat.values()) == [4] * 5
    assert sorted(mild.values(), reverse=True) == zipf_sizes(20, 5, 0.5) == [6, 4, 4, 3, 3]
    assert sorted(steep.values(), reverse=True) == zipf_sizes(20, 5, 1) == [9, 4, 3, 2, 2]
    assert mild.most_common(1)[0][0] == steep.most_common(1)[0][0]


@given(st.integers(1, 400), st.integers(1, 40), st.floats(0, 3))
def test_sizes_follow_the_law_and_have_the_sum(total: int, scenes: int, exponent: float) -> None:
    sizes = zipf_sizes(total, scenes, exponent)
    law = [rank**-exponent for rank in range(1, scenes + 1)]
    assert sum(sizes) == total
    assert sizes == sorted(sizes, reverse=True)
    assert all(abs(size - total * part / sum(law)) < 1 for size, part in zip(sizes, law, strict=True))


def test_fewer_captions_are_some_of_the_own(whole: Path, tmp_path: Path) -> None:
    found = {count: subset(whole, tmp_path / str(count), "--captions-kept", count) for count in (1, 2, 5, 9)}
    for key in found[1]:
        texts = {count: each[key][1] for count, each in found.items()}
        assert texts[5] == texts[9] == [f"{int(key)} {k}" for k in range(5)]
        assert [len(texts[count]) for count in (1, 2)] == [1, 2]
        assert set(texts[1]) <= set(texts[2]) <= set(texts[5])
        assert texts[2] == sorted(texts[2])
    drawn = Counter(texts[0].split()[1] for _, texts in found[1].values())
    assert len(drawn) == 5  # not always the same one


def test_the_same_command_writes_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    options = ("--zipf", 1, "--limit", 20, "--captions-kept", 2, "--seed", 3)
    for name in ("a", "b"):
        subset(whole, tmp_path / name, *options)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second


def test_impossible_subsets_are_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*options: object) -> str:
        return refusal(whole, tmp_path, capsys, *options)

    assert "--scenes must be between 1 and 5, the number of scenes, not 6" in said("--scenes", 6)
    assert "--zipf 1.0 needs --limit" in said("--zipf", 1)
    assert "gives the scene" in (text := said("--zipf", 3, "--limit", 40))
    assert "34 images, and it has 12" in text
    assert "--captions-kept must be at least 1, not 0" in said("--captions-kept", 0)
    words = ["pack", "--source", "synthetic", "--count", "30", "--output", str(tmp_path / "drawn"), "--workers", "1"]
    for option in (["--scenes", "2"], ["--captions-kept", "2"]):
        assert main([*words, *option]) == 2
        assert "pack the images first" in capsys.readouterr().err
