"""Duplicates in one pack: kept, dropped or merged, and their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from duplicate_images import photograph
from small_data import encoded, picture, rows

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.dedupe.duplicates import Duplicate, find_duplicates, merge_duplicates
from priorclip.data_shards.dedupe.hash_columns import HashColumns
from priorclip.data_shards.dedupe.image_hashes import PERCEPTUAL
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import Sample
from priorclip.data_shards.pack.write_shards import PackPlan, hash_of_records, pack
from priorclip.data_shards.sources import Record, load, synthetic


def test_first_record_stays_and_a_chain_is_not_followed() -> None:
    """b is near a, and c is near b but not near a: a stays, b is dropped, c stays."""
    thumb = np.arange(256, dtype=np.uint8).reshape(16, 16)
    table = np.zeros(5, PERCEPTUAL)
    table["readable"] = table["textured"] = True
    table["thumb"] = thumb
    table["sha256"] = np.arange(5)[:, None]
    table["sha256"][4] = table["sha256"][1]
    table["hash"] = [0b0, 0b1111, 0b11111111, 2**63 + 2**62 + 2**61 + 2**60 + 2**59, 0b1111]
    found = find_duplicates(HashColumns.of_rows(table), 4, np.ones(5, bool))
    assert [(item.image, item.kept, item.kind, item.distance) for item in found] == [
        (1, 0, "near", 4),
        (4, 0, "near", 4),
    ]
    exact = find_duplicates(HashColumns.of_rows(table), None, np.ones(5, bool))
    assert [(item.image, item.kept, item.kind) for item in exact] == [(4, 1, "exact")]
    without = find_duplicates(HashColumns.of_rows(table), 4, np.array([False, True, True, True, True]))
    assert [(item.image, item.kept) for item in without] == [(2, 1), (4, 1)]


def dock_records() -> list[Record]:
    """Returns two pictures, an exact copy of the first, and a re-encoded copy with another label."""
    dock, field = photograph(1), photograph(2)
    return [
        Record("dock", encoded(dock), ["a dock"], None, extra={"coarse_captions": ["water"]}),
        Record("field", encoded(field), ["a field"], "farmland"),
        Record("copy", encoded(dock), ["boats", "a dock"], "port", extra={"coarse_captions": ["boats"]}),
        Record("worse", encoded(dock, quality=40), ["a pier"], "harbour"),
    ]


def test_keep_drop_and_merge(tmp_path: Path) -> None:
    def packed(name: str, **options: object) -> tuple[dict, Manifest]:
        manifest = pack(dock_records(), tmp_path / name, PackPlan(**options))  # type: ignore[arg-type]
        shards = ShardSet(str(tmp_path / name))
        return {shards.key(place): shards.read(place) for place in range(len(shards))}, manifest

    kept, manifest = packed("keep")
    assert list(kept) == ["dock", "field", "copy", "worse"]
    assert manifest.duplicates == {}
    assert not (tmp_path / "keep" / "duplicates.jsonl").exists()

    dropped, manifest = packed("drop", duplicates="drop")
    assert list(dropped) == ["dock", "field", "worse"]
    assert dropped["dock"].captions == ["a dock"]
    assert manifest.duplicates == {"exact": 1, "label_conflicts": 0}

    merged, manifest = packed("merge", duplicates="merge", near_duplicates=6)
    assert list(merged) == ["dock", "field"]
    assert merged["dock"].captions == ["a dock", "boats", "a pier"]
    assert merged["dock"].texts("coarse_captions") == ["water", "boats"]
    assert merged["dock"].label == "port"
    assert manifest.duplicates == {"exact": 1, "label_conflicts": 1, "near": 1}, "the labels of the two differ"
    found = rows(tmp_path / "merge" / "duplicates.jsonl")
    assert [(row["key"], row["kept"], row["kind"]) for row in found] == [
        ("copy", "dock", "exact"),
        ("worse", "dock", "near"),
    ]


def test_contradicting_labels_are_reported(tmp_path: Path) -> None:
    made = dock_records()
    made[0].label = "harbour"
    manifest = pack(made, tmp_path / "o", PackPlan(duplicates="merge"))
    assert manifest.duplicates == {"exact": 1, "label_conflicts": 1}
    assert rows(tmp_path / "o" / "duplicates.jsonl") == [
        {"key": "copy", "kept": "dock", "kind": "exact", "distance": 0, "label": "port", "kept_label": "harbour"}
    ]


def test_contradicting_sets_of_labels_are_reported(tmp_path: Path) -> None:
    made = dock_records()[::2]
    made[0].extra = {"labels": ["harbour", "sea"]}
    made[1].label, made[1].extra = None, {"labels": ["sea", "harbour"]}
    assert pack(made, tmp_path / "same", PackPlan(duplicates="drop")).duplicates["label_conflicts"] == 0
    made[1].extra = {"labels": ["sea", "beach"]}
    assert pack(made, tmp_path / "other", PackPlan(duplicates="drop")).duplicates["label_conflicts"] == 1
    made[1].label, made[1].extra = "port", {}
    assert pack(made, tmp_path / "one", PackPlan(duplicates="merge")).duplicates["label_conflicts"] == 1
    assert rows(tmp_path / "one" / "duplicates.jsonl")[0] | {"key": ""} == {
        "key": "", "kept": "dock", "kind": "exact", "distance": 0,
        "labels": ["port"], "kept_labels": ["harbour", "sea"],
    }  # fmt: skip
    packed = ShardSet(str(tmp_path / "one")).read(0)
    assert (packed.label, packed.info["labels"]) == (None, ["harbour", "sea"]), (
        "one label is not added to a set of labels"
    )


def test_labels_come_with_a_merge(tmp_path: Path) -> None:
    made = dock_records()[::2]
    made[1].label, made[1].extra = None, {"labels": ["sea", "beach"]}
    pack(made, tmp_path / "o", PackPlan(duplicates="merge"))
    packed = ShardSet(str(tmp_path / "o")).read(0)
    assert packed.info["labels"] == ["sea", "beach"]
    assert made[0].captions == ["a dock"], "the merge changed the caller's records"


def repacked(folder: Path, *inputs: Path) -> Sample:
    """Packs these shards again and returns their only picture."""
    words = f"pack --source webdataset --output {folder} --duplicates merge --workers 1 --shuffle=false"
    assert main([*words.split(), f"--shards=[{','.join(map(str, inputs))}]"]) == 0
    shards = ShardSet(str(folder))
    assert len(shards) == 1
    return shards.read(0)


def test_merge_survives_reading_a_tar(tmp_path: Path) -> None:
    """Other fields of a tar are known only when the record is read. The merge keeps those of both records."""
    first, _, second, _ = dock_records()
    second.extra["labels"] = ["port", "sea"]
    second.label = None
    for name, record in (("a", first), ("b", second)):
        pack([record], tmp_path / name, PackPlan())
    sample = repacked(tmp_path / "o", tmp_path / "a", tmp_path / "b")
    assert sample.captions == ["a dock", "boats"]
    assert sample.texts("coarse_captions") == ["water", "boats"]
    assert sample.info["labels"] == ["port", "sea"]


def test_conflicts_of_label_sets_in_tars_are_reported(tmp_path: Path) -> None:
    first, _, second, _ = dock_records()
    first.extra["labels"], second.extra["labels"], second.label = ["port", "sea"], ["port", "beach"], None
    for name, record in (("a", first), ("b", second)):
        pack([record], tmp_path / name, PackPlan())
    repacked(tmp_path / "o", tmp_path / "a", tmp_path / "b")
    assert Manifest.load(tmp_path / "o").duplicates == {"exact": 1, "label_conflicts": 1}


def test_merge_survives_drawing(tmp_path: Path) -> None:
    """Drawing a scene gives its captions and label."""
    drawing = synthetic(1, 3, 64)[0]
    drawn = load(drawing)
    copy = Record("copy", drawn.image, ["my own words"], "another", extra={"coarse_captions": ["in short"]})
    for name, made in (("first", [drawing, copy]), ("last", [copy, drawing])):
        manifest = pack(made, tmp_path / name, PackPlan(duplicates="merge"))
        sample = ShardSet(str(tmp_path / name)).read(0)
        assert manifest.samples == 1
        assert set(sample.captions) == {*drawn.captions, "my own words"}
        assert set(sample.texts("coarse_captions")) == {*drawn.extra["coarse_captions"], "in short"}
        assert sample.label == (drawn.label if name == "first" else "another")


def test_what_a_merged_record_says_is_kept_where_it_can_be_read_no_more(tmp_path: Path) -> None:
    first, _, second, _ = dock_records()
    path = tmp_path / "copy.jpg"
    path.write_bytes(second.image)
    second.image = path
    merged = merge_duplicates([first, second], [Duplicate(1, 0, "exact", 0)])[0]
    path.unlink()
    found = load(merged)
    assert (found.image, found.captions, found.label) == (first.image, ["a dock", "boats"], "port")


def test_anything_that_is_packed_of_a_record_changes_the_digest() -> None:
    def digest(**changes: object) -> bytes:
        whole = {
            "key": "a",
            "image": b"x",
            "captions": ["y"],
            "extra": {"coarse_captions": ["z"], "labels": ["p", "q"]},
        }
        return hash_of_records([Record(**whole | changes)])  # type: ignore[arg-type]

    changes: list[dict[str, object]] = [
        {}, {"key": "b"}, {"image": b"y"}, {"captions": ["y", "y"]}, {"label": "p"}, {"split": "test"},
        {"source": "s"}, {"url": "u"}, {"extra": {}}, {"extra": {"coarse_captions": ["z"], "labels": ["p"]}},
        {"extra": {"coarse_captions": ["w"], "labels": ["p", "q"]}},
        {"extra": {"coarse_captions": ["z"], "labels": ["p", "q"], "gsd": 0.5}},
    ]  # fmt: skip
    assert len({digest(**change) for change in changes}) == len(changes)
    assert digest() == digest(extra={"labels": ["p", "q"], "coarse_captions": ["z"]}), "the order changed the digest"


def test_other_options_are_another_pack(tmp_path: Path) -> None:
    half = tmp_path / "half"
    with pytest.raises(ValueError, match="none of 1 records"):
        pack([Record("a", b"no image", ["x"])], half, PackPlan())
    with pytest.raises(FileExistsError, match="other options"):
        pack([Record("a", b"no image", ["x"])], half, PackPlan(duplicates="drop"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--duplicates some", "--duplicates must be one of keep, drop, merge"),
        ("--near-duplicates 4", "needs --duplicates drop or merge"),
        ("--duplicates drop --near-duplicates 20", "0 to 16, not 20"),
        ("--exclude test.json", "needs --exclude-images"),
        ("--exclude here --exclude-distance -1", "0 to 16, not -1"),
        ("--exclude nowhere", "nowhere does not exist"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str) -> None:
    folder = tmp_path / "images" / "dock"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encoded(picture(1)))
    command = f"pack --source imagefolder --images {folder.parent} --output {tmp_path / 'o'} --workers 1 {options}"
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
