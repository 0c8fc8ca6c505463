"""Annotation files of the retrieval benchmarks: records, labels, splits and errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from source_packs import SHARED, jpeg, packed, real, refusal, samples

from priorclip.data_shards import DataConfig, ShardSet, ShardStream
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.sources import (
    karpathy,
    load,
    precomp,
    stem_label,
    templates,
)
from priorclip.data_shards.sources.benchmark import UCM_SCENES, UCM_WORDS


@real
@pytest.mark.parametrize(
    ("name", "split", "images", "captions", "labelled", "classes"),
    [
        ("rsicd", "train", 9828, 49140, 8973, 30),
        ("rsicd", "test", 1093, 5465, 1027, 30),
        ("rsitmd", "train", 4291, 21435, 4291, 33),  # 21,455 lines, of which 20 are blank
        ("rsitmd", "test", 452, 2260, 452, 32),
    ],
)
def test_precomp_of_real_benchmarks(
    name: str, split: str, images: int, captions: int, labelled: int, classes: int
) -> None:
    records = precomp(SHARED / name, "images", split)
    assert len(records) == len({record.key for record in records}) == images
    assert sum(len(record.captions) for record in records) == captions
    assert sum(record.label is not None for record in records) == labelled
    assert len({record.label for record in records} - {None}) == classes
    assert {record.split for record in records} == {split}
    assert {record.source for record in records} == {name}
    text = (SHARED / name / f"{split}_caps.txt").read_text().split("\n")
    assert records[0].captions == [line.strip() for line in text[:5]]
    assert records[1].captions == [line.strip() for line in text[5:10]]


@real
def test_rsicd_labels_come_from_the_table_where_stems_have_none() -> None:
    records = precomp(SHARED / "rsicd", "images", labels=SHARED / "rsicd/labels.csv")
    assert len(records) == 9828 + 1093
    counts = Counter(record.label for record in records)
    assert counts[None] == 0
    assert len(counts) == 31
    assert (counts["StorageTanks"], counts["BaseballField"], counts["RailwayStation"]) == (396, 276, 260)
    for record in records:  # if a stem names the scene, the table names the same scene
        stem = stem_label(record.key)
        assert stem is None or stem == record.label.lower()
    assert {record.label for record in precomp(SHARED / "rsicd", "images", "test", "none")} == {None}


@real
def test_sydney_and_ucm_karpathy_files() -> None:
    sydney = karpathy(SHARED / "sydney/dataset_sydney.json", "images")
    assert Counter(record.split for record in sydney) == {"train": 497, "val": 58, "test": 58}
    assert {len(record.captions) for record in sydney} == {5}
    assert {record.label for record in sydney} == {None}
    assert sydney[0].captions[0] == "A residential area with houses arranged neatly ."
    assert len(karpathy(SHARED / "sydney/dataset_sydney.json", "images", "val")) == 58
    ucm = karpathy(SHARED / "ucmerced/dataset_ucm_captions.json", SHARED / "ucmerced/images")
    assert Counter(record.split for record in ucm) == {"train": 105, "test": 42}
    assert Counter(record.label for record in ucm) == dict.fromkeys(UCM_SCENES, 7)
    assert load(ucm[0]).image == (SHARED / "ucmerced/images/agricultural/agricultural80.jpg").read_bytes()
    table = karpathy(SHARED / "ucmerced/dataset_ucm_captions.json", "i", labels=SHARED / "ucmerced/labels.csv")
    assert [record.label for record in table] == [record.label for record in ucm]


@real
def test_real_file_names_have_the_scenes_of_the_benchmarks() -> None:
    names = [record.image.name for name in ("rsicd", "rsitmd") for record in precomp(SHARED / name, "images")]
    scenes = {stem_label(name) for name in names} - {None}
    assert {"railwaystation", "baseballfield", "denseresidential", "storagetanks", "intersection", "plane"} <= scenes
    assert len(scenes) == 33
    assert all(scene.isalpha() for scene in scenes)
    assert all(templates.captions(scene, 20, 0) for scene in scenes)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"scene": "Dense Residential"}, "Dense Residential"),
        ({"label": "", "scene": "Pond"}, "Pond"),
        ({"label": "River", "scene": "Pond"}, "River"),
        ({"scene": 7}, "7"),
        ({"scene": ""}, "airport"),
        ({"scene": {"id": 3}}, "airport"),  # something else of the same name
        ({"scene": True}, "airport"),
    ],
)
def test_the_key_scene_is_a_label_if_there_is_no_label(fields: dict, label: str, tmp_path: Path) -> None:
    entry = {"filename": "airport_1.jpg", "split": "train", "sentences": [{"raw": "a"}], **fields}
    (tmp_path / "set.json").write_text(json.dumps({"images": [entry]}))
    assert [record.label for record in karpathy(tmp_path / "set.json", tmp_path)] == [label]


def test_ucm_numbers_are_labels_only_if_the_captions_agree(tmp_path: Path) -> None:
    def entries(order: tuple[str, ...]) -> list[dict]:
        return [
            {
                "filename": f"{n + 1}.tif",
                "sentences": [{"raw": f"there is a {UCM_WORDS.get(order[n // 100], 'place')}"}],
            }
            for n in range(2100)
        ]

    def labels(images: list[dict]) -> list[str | None]:
        (tmp_path / "ucm.json").write_text(json.dumps({"images": images}))
        return [record.label for record in karpathy(tmp_path / "ucm.json", tmp_path)]

    numbered = labels(entries(UCM_SCENES))
    assert [numbered[n] for n in (0, 99, 100, 1149, 2099)] == [
        "agricultural",
        "agricultural",
        "airplane",
        "intersection",
        "tenniscourt",
    ]
    assert set(labels(entries(UCM_SCENES[::-1]))) == {None}
    assert set(labels(entries(UCM_SCENES)[:-1])) == {None}


def test_precomp_in_both_forms_and_blank_lines(tmp_path: Path) -> None:
    folder = tmp_path / "made_precomp"
    folder.mkdir()
    for name in ("airport_1", "pond_2", "00815"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(1))
    (folder / "train_filename.txt").write_text("airport_1.tif\npond_2.tif\n00815.tif\n")
    (folder / "train_caps.txt").write_text("one\ntwo\n\nthree\u2028still three\nfour\nfive\n")
    (folder / "test_filename.txt").write_text("pond_2.tif\npond_2.tif\nairport_1.tif\n")
    (folder / "test_caps.txt").write_text("a\nb\nc")
    train = {record.key: (record.captions, record.label) for record in precomp(folder, tmp_path, "train")}
    assert train == {
        "airport_1": (["one", "two"], "airport"),
        "pond_2": (["three\u2028still three"], "pond"),
        "00815": (["four", "five"], None),
    }
    assert [(r.key, r.captions) for r in precomp(folder, tmp_path, "test")] == [
        ("pond_2", ["a", "b"]),
        ("airport_1", ["c"]),
    ]
    shards = packed(tmp_path, "precomp", "--precomp", folder, "--images", tmp_path, "--split", "train")
    assert samples(shards)["pond_2"].image == jpeg(1)  # the list says .tif, the folder has .jpg
    assert samples(shards)["pond_2"].info["source"] == "made"


@given(st.lists(st.lists(st.text("ab ", min_size=1, max_size=3), min_size=3, max_size=3), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_both_precomp_forms_say_the_same(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("precomp")
    lines = [text for group in texts for text in group]
    for split, repeats in (("once", 1), ("each", 3)):
        names = [f"pond_{n}.jpg" for n in range(len(texts)) for _ in range(repeats)]
        (folder / f"{split}_filename.txt").write_text("\n".join(names) + "\n")
        (folder / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    once, each = (precomp(folder, folder, split) for split in ("once", "each"))
    expected = [[text.strip() for text in group if text.strip()] for group in texts]
    assert [record.captions for record in once] == [record.captions for record in each] == expected


def test_precomp_errors_name_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "train_filename.txt").write_text("a.jpg\nb.jpg\n")
    (folder / "train_caps.txt").write_text("1\n2\n3\n")
    said = refusal(capsys, tmp_path, "precomp", "--precomp", folder, "--images", tmp_path)
    assert "train_caps.txt has 3 lines and train_filename.txt 2" in said
    said = refusal(capsys, tmp_path, "precomp", "--precomp", folder, "--images", tmp_path, "--split", "val")
    assert "no val_caps.txt" in said
    assert "splits found: train" in said
    (folder / "train_filename.txt").write_text("a.jpg\n\nb.jpg\n")
    assert "line 2: no file name" in refusal(capsys, tmp_path, "precomp", "--precomp", folder, "--images", tmp_path)


def test_a_karpathy_file_of_class_numbers_and_upper_case_files(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.TIF", format="TIFF")
    entry = {"filename": "a.tif", "split": "train", "label": 0, "sentences": [{"raw": "a"}]}
    (tmp_path / "set.json").write_text(json.dumps({"images": [entry]}))
    (record,) = karpathy(tmp_path / "set.json", tmp_path)
    assert record.label == "0"
    assert load(record).image == (tmp_path / "a.TIF").read_bytes()
    for images in (5, [{**entry, "label": ["a", "b"]}]):
        (tmp_path / "set.json").write_text(json.dumps({"images": images}))
        with pytest.raises(ValueError, match=r"set\.json"):
            karpathy(tmp_path / "set.json", tmp_path)


def test_several_karpathy_files_in_one_pack(tmp_path: Path) -> None:
    """Three data sets with equal file names: no key collides, each has its own images, and a class one spelling."""
    for number, name in enumerate(("rsicd", "rsitmd", "more")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pond_1.jpg").write_bytes(jpeg(number))
        images = [{"filename": "pond_1.jpg", "split": "train", "sentences": [{"raw": f"of {name} ."}]}]
        dataset = "rsicd" if name == "more" else name
        (tmp_path / f"{name}.json").write_text(json.dumps({"dataset": dataset, "images": images}))
    (tmp_path / "labels.csv").write_text("filename,label\npond_1.jpg,Pond\n")
    files = ",".join(str(tmp_path / f"{name}.json") for name in ("rsicd", "rsitmd", "more"))
    images = ",".join(str(tmp_path / name) for name in ("rsicd", "rsitmd", "more"))
    labels = f",{tmp_path / 'labels.csv'},none"
    found = samples(packed(tmp_path, "karpathy", "--json", files, "--images", images, "--labels", labels))
    assert {key: (sample.captions, sample.label) for key, sample in found.items()} == {
        "rsicd/pond_1": (["of rsicd ."], "Pond"),
        "rsitmd/pond_1": (["of rsitmd ."], "Pond"),
        "rsicd-2/pond_1": (["of more ."], None),
    }
    assert [sample.image for sample in found.values()] == [jpeg(0), jpeg(1), jpeg(2)]


def test_lists_from_yaml_and_numbers_of_pieces(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "b"):
        images = [{"filename": "pond_1.jpg", "sentences": [{"raw": name}]}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"dataset": name, "images": images}))
    (tmp_path / "pond_1.jpg").write_bytes(jpeg(1))
    config = tmp_path / "pack.yaml"
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    config.write_text(json.dumps({"source": "karpathy", "json": files, "images": str(tmp_path), "workers": 1}))
    assert main(["pack", "--config", str(config), "--output", str(tmp_path / "shards")]) == 0
    assert set(samples(ShardSet(str(tmp_path / "shards")))) == {"a/pond_1", "b/pond_1"}
    said = refusal(capsys, tmp_path, "karpathy", "--json", ",".join(files), "--images", "x,y,z")
    assert "--images has 3 paths, --json has 2" in said


def test_a_blank_caption_and_a_byte_order_mark_lose_nothing(tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "sentences": [{"raw": ""}, {"raw": "", "tokens": ["a", "pond"]}, {"raw": " x "}]},
        {"filename": "b.jpg", "sentences": [{"tokens": ["two", "ponds"]}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}), encoding="utf-8-sig")
    assert [record.captions for record in karpathy(tmp_path / "a.json", tmp_path)] == [["a pond", "x"], ["two ponds"]]
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"filename": "a.jpg", "sentences": [{"row": "x"}]}]}))
    with pytest.raises(ValueError, match="entry 1 of 'images', sentence 1 has no 'raw'"):
        karpathy(tmp_path / "a.json", tmp_path)


def test_one_class_has_one_spelling(tmp_path: Path) -> None:
    images = [{"filename": f"{name}.jpg", "sentences": [{"raw": "x"}]} for name in ("00815", "airport_1", "BareLand_2")]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}))
    (tmp_path / "labels.csv").write_text("filename,label\n00815.jpg,Airport\n")
    records = karpathy(tmp_path / "a.json", tmp_path, labels=tmp_path / "labels.csv")
    assert [record.label for record in records] == ["Airport", "Airport", "bareland"]
    (tmp_path / "labels.csv").write_text("filename,label\n00815.jpg,机场\nairport_1.jpg,海滩\n", encoding="utf-8")
    records = karpathy(tmp_path / "a.json", tmp_path, labels=tmp_path / "labels.csv")
    assert [record.label for record in records] == ["机场", "海滩", "bareland"], "names without a Latin letter"


def test_data_sets_that_spell_a_class_otherwise_share_it(tmp_path: Path) -> None:
    """RSICD's table says Airport, RSITMD's stems say airport. They are one class and must not be negatives."""
    for place, (folder, name) in enumerate((("rsicd", "Airport"), ("rsitmd", "airport"), ("aid", "Bare Land"))):
        path = tmp_path / folder / name / "a.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(place))
        words = ["pack", "--source", "imagefolder", "--images", str(tmp_path / folder), "--workers", "1"]
        assert main([*words, "--output", str(tmp_path / "packed" / folder)]) == 0
    shards = ShardSet([str(tmp_path / "packed" / name) for name in ("rsitmd", "rsicd", "aid")])
    assert shards.classes == ["Airport", "Bare Land"]
    stream = ShardStream(shards, None, DataConfig("x", image_size=16, workers=0), global_batch=3)
    batch = next(iter(stream))
    labels = dict(zip(batch["image_ids"].tolist(), batch["labels"].tolist(), strict=True))
    assert labels == {0: 0, 1: 0, 2: 1}
    given = DataConfig("x", image_size=16, workers=0, classes=["bareland", "airport", "Airport"])
    (batch,) = ShardStream(shards, None, given, global_batch=3, train=False, epochs=1)
    labels = dict(zip(batch["image_ids"].tolist(), batch["labels"].tolist(), strict=True))
    assert labels == {0: 1, 1: 2, 2: 0}, "given names are not changed"
