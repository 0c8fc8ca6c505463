"""The figures of stats compared with plain dictionaries, for any number of workers, and the page of plots."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from remote_server import serving
from small_data import encoded, picture, write_tar

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.inspect.counters import CountOptions, ValueCounts, count_samples, is_concept
from priorclip.data_shards.inspect.stats import fit_slope, measure_balance, quantiles

CAPTIONS = ["a red roof beside the river", "the river", "many trees", "Many trees", "a red roof", "2 planes"]


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 30 samples with six captions and three sizes; 20 images have one of three hashes."""
    members: dict[str, bytes] = {}
    for index in range(30):
        info = {"captions": [CAPTIONS[index % 6]], "label": "town" if index < 20 else "wood", "width": 40 + index % 3,
                "height": 30}  # fmt: skip
        members[f"{index:02d}.jpg"] = b"not looked at"
        info |= {"sha256": f"{index % 3:064x}"[::-1]} if index < 20 else {}
        members[f"{index:02d}.json"] = json.dumps(info).encode()
    return write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members)


@pytest.fixture(scope="module")
def out(tar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs stats on the tar with one process, which counts it in five parts."""
    folder = tmp_path_factory.mktemp("stats") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("priorclip.data_shards.inspect.stats.CHUNK", 7)
        assert main(["stats", str(tar), "--output", str(folder), "--images", "2", "--workers", "1"]) == 0
    return folder


def figures(folder: Path) -> dict:
    return json.loads((folder / "stats.json").read_text())


def test_figures_are_those_of_plain_dictionaries(out: Path) -> None:
    found = figures(out)
    words = Counter(word for caption in CAPTIONS * 5 for word in caption.lower().split())
    split = [caption.lower().split() for caption in CAPTIONS * 5]
    pairs = Counter(f"{a} {b}" for row in split for a, b in pairwise(row) if is_concept(a) and is_concept(b))
    assert found["top_words"] == dict(words)
    assert found["top_bigrams"] == dict(pairs) == {"red roof": 10}
    assert (found["vocabulary"], found["unique_captions"], found["captions"]) == (len(words), 6, 30)
    assert found["top_concepts"] == {"river": 10, "red": 10, "roof": 10, "trees": 10, "planes": 5}
    assert found["image_sizes"] == {"40 x 30": 10, "41 x 30": 10, "42 x 30": 10}
    assert found["image_sides"] == {"32": 30}
    assert (found["exact_duplicates"], found["duplicate_groups"], found["largest_duplicate_group"]) == (17, 3, 7)
    assert found["images_with_a_hash"] == 20
    assert found["captions_naming_a_top_concept"] == {"top_10": 1.0, "top_100": 1.0, "top_1000": 1.0}
    assert found["label_balance"]["imbalance_ratio"] == pytest.approx(2)
    entropy = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert found["label_balance"]["entropy_bits"] == pytest.approx(entropy)


def test_workers_change_nothing(tar: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("priorclip.data_shards.inspect.stats.CHUNK", 9)
    assert main(["stats", str(tar), "--output", str(tmp_path), "--images", "2", "--workers", "2"]) == 0
    for name in ("stats.json", "stats.txt", "stats.png", "contact_sheet.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_a_limit_draws_samples_and_says_so(tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["stats", str(tar), "--output", str(tmp_path / "out"), "--limit", "9", "--workers", "1"]) == 0
    assert figures(tmp_path / "out")["samples"] == 9
    assert "9 (drawn from 30)" in capsys.readouterr().out
    assert main(["stats", str(tar), "--output", str(tmp_path / "out"), "--limit", "0"]) == 2
    assert "--limit must be at least 1" in capsys.readouterr().err


def test_remote_shards_are_counted_as_local_ones(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest of the folder gives the shards; the same samples are drawn and the figures are equal."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the cache
    words = ["--images", "3", "--workers", "1", "--limit", "9"]
    assert main(["stats", str(packed), "--output", str(tmp_path / "local"), *words]) == 0
    with serving(packed) as server:
        assert main(["stats", f"{server.url}/", "--output", str(tmp_path / "remote"), *words]) == 0
        asked = server.of(r"\.tar$")
    assert asked
    assert figures(tmp_path / "remote") == figures(tmp_path / "local")
    assert figures(tmp_path / "remote")["samples"] == 9
    for name in ("stats.png", "contact_sheet.png"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


def test_a_remote_set_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with serving(tmp_path) as server:
        assert main(["stats", f"{server.url}/a.tar", "--output", str(tmp_path / "out")]) == 2
    assert "/a.tar" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokens_are_counted_whole(packed: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    from priorclip.data_shards import load_tokenizer

    options = ["--output", str(tmp_path), "--tokenizer", str(tokenizer_folder), "--workers", "1"]
    assert main(["stats", str(packed), *options]) == 0
    words = load_tokenizer(str(tokenizer_folder), 12)
    shards = ShardSet(str(packed))
    texts = [text for number in range(len(shards)) for text in shards.captions(number)]
    lengths = [len(words(text)["input_ids"]) for text in texts]
    assert figures(tmp_path)["caption_tokens"]["mean"] == pytest.approx(np.mean(lengths))


def test_odd_sizes_and_hashes_are_not_believed(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, (width, sha256) in enumerate([("9", 3), (-1, ["x"]), (None, "short"), (1 << 40, "z" * 64), (True, {})]):
        members[f"{number}.png"] = encoded(picture(number, 40, 30), "PNG")
        members[f"{number}.json"] = json.dumps({"captions": ["x"], "width": width, "sha256": sha256}).encode()
    shards = ShardSet(str(write_tar(tmp_path / "a.tar", members)))
    found = count_samples(shards, range(5), CountOptions()).join()
    assert found.sizes.values.tolist() == [40 << 32 | 30]
    assert not len(found.images.values)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=30), max_size=8))
def test_counts_are_a_counter(parts: list[list[int]]) -> None:
    total = ValueCounts()
    for part in parts:
        counts = ValueCounts()
        counts.add(part)
        total.merge(counts)
    total.join()
    expected = Counter(value for part in parts for value in part)
    assert dict(zip(total.values.tolist(), total.counts.tolist(), strict=True)) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=60))
def test_quantiles_are_numpys(lengths: list[int]) -> None:
    found = quantiles(Counter(lengths))
    assert found["mean"] == pytest.approx(np.mean(lengths))
    for share in (0, 5, 50, 95, 100):
        assert found[f"p{share}"] == pytest.approx(np.percentile(lengths, share)), share


def test_zipfs_law_has_its_slope_and_equal_classes_are_even() -> None:
    counts = ValueCounts()
    counts.add(range(3000), [1_000_000 // (rank + 1) for rank in range(3000)])
    counts.join()
    assert fit_slope(counts) == pytest.approx(-1, abs=0.01)
    assert measure_balance(Counter(a=5, b=5, c=5)) == {"entropy_bits": pytest.approx(math.log2(3)), "evenness": 1.0,
                                                "imbalance_ratio": 1.0}  # fmt: skip


def test_the_page_is_drawn(out: Path) -> None:
    page = np.asarray(Image.open(out / "stats.png").convert("L"))
    assert page.shape == (1100, 1500)
    for row in (slice(0, 550), slice(550, 1100)):
        for column in (slice(0, 500), slice(500, 1000), slice(1000, 1500)):
            assert (page[row, column] < 200).mean() > 0.005  # no panel is blank
