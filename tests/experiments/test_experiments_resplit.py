"""``resplit``: new splits of a Karpathy JSON, within each scene."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from priorclip.experiments.commands import ResplitConfig
from priorclip.experiments.resplit import deal, resplit


def test_resplit_deals_within_scenes() -> None:
    entries = [{"filename": f"{s}/{s}{n}.jpg", "split": "train"} for s in ("airport", "beach") for n in range(7)]
    one, two = deal(entries, 0.286, 0.15, seed=1), deal(entries, 0.286, 0.15, seed=2)
    for scene in ("airport", "beach"):
        splits = [entry["split"] for entry in one if entry["filename"].startswith(scene)]
        assert (splits.count("test"), splits.count("val"), splits.count("train")) == (2, 1, 4)
    assert one == deal(entries, 0.286, 0.15, seed=1) != two
    assert {entry["split"] for entry in entries} == {"train"}, "deal does not change its argument"
    turns = [deal(entries, 0.286, 0.15, seed=1, turn=turn) for turn in range(7)]
    tested = Counter(entry["filename"] for turn in turns for entry in turn if entry["split"] == "test")
    assert set(tested.values()) == {2}, "seven turns test each of the 14 images twice"
    assert len(tested) == 14
    later = [deal(entries, 0.286, 0.15, seed=1, turn=turn) for turn in range(7, 14)]
    assert Counter(entry["filename"] for turn in later for entry in turn if entry["split"] == "test") == tested
    assert later != turns, "the second cross-validation has other splits"
    few = deal(entries, 0.286, 0.15, 0.143, seed=1)
    assert Counter(entry["split"] for entry in few) == {"test": 4, "val": 2, "train": 2}
    parts = [{entry["filename"]: entry["split"] for entry in each} for each in (few, one)]
    assert parts[0].items() <= parts[1].items(), "with fewer training images the same images are tested"


def test_resplit_accepts_class_numbers_and_names_a_wrong_file(tmp_path: Path) -> None:
    path, entries = tmp_path / "set.json", [{"filename": f"{n}.tif", "label": n % 2} for n in range(9)]
    path.write_text(json.dumps({"images": [*entries, {"filename": "beach_1.tif"}]}))
    config = ResplitConfig(json=str(path), output=str(tmp_path), count=2, test=0.25)
    dealt = [json.loads(split.read_text())["images"] for split in resplit(config)]
    assert all(Counter(entry["split"] for entry in each) == {"train": 8, "test": 2} for each in dealt)
    for wrong in ({"images": 5}, {"images": [{"split": "train"}]}, {"images": [5]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"set\.json"):
            resplit(config)
