"""Every layout of remote sensing data, as real files: what is read, labelled, packed, and refused."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import encoded, image_folder, picture, rows, write_tar

from priorclip.data_shards import DataConfig, RecordSet, ShardSet, ShardStream
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources import (
    ImageFile,
    Record,
    karpathy,
    load,
    precomp,
    rs5m,
    sample_key,
    stem_label,
    templates,
    webdataset,
)
from priorclip.data_shards.sources.benchmark import UCM_SCENES, UCM_WORDS
from priorclip.data_shards.sources.bigearthnet import bigearthnet
from priorclip.data_shards.sources.catalogue import SOURCES, shuffled
from priorclip.data_shards.sources.fmow import fmow
from priorclip.data_shards.sources.folder import imagefolder
from priorclip.data_shards.sources.parquet import parquet
from priorclip.data_shards.sources.record import join_sets

SHARED = Path(__file__).parents[3] / "shared/data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the benchmarks' annotation files are not in {SHARED}")


def packed(tmp_path: Path, *options: object) -> ShardSet:
    """The shards that `pack --source ...` writes with these options, in the order of the records."""
    folder = tmp_path / "shards"
    words = [str(word) for word in options]
    assert main(["pack", "--source", *words, "--output", str(folder), "--workers", "1", "--shuffle", "false"]) == 0
    return ShardSet(str(folder))


def refusal(capsys: pytest.CaptureFixture, tmp_path: Path, *options: object) -> str:
    """What `pack --source ...` says when it refuses these options."""
    assert main(["pack", "--source", *map(str, options), "--output", str(tmp_path / "refused")]) == 2
    assert not (tmp_path / "refused").exists()
    return capsys.readouterr().err


def samples(shards: ShardSet) -> dict:
    return {shards.key(i): shards.read(i) for i in range(len(shards))}


def reasons(tmp_path: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in rows(tmp_path / "shards" / "quarantine.jsonl")}


def jpeg(index: int) -> bytes:
    return encoded(picture(index, 40, 32), quality=90)


# --- the benchmarks' real annotation files


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
    for record in records:  # where a stem names the scene, the table names the same
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


# --- annotation files made here


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
    assert samples(shards)["pond_2"].image == jpeg(1)  # the list says .tif, the folder holds .jpg
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
    """The same file names in three data sets: nothing collides, each has its own images, a class one spelling."""
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
    assert "--images names 3 and --json 2" in said


def test_a_blank_caption_and_a_byte_order_mark_lose_nothing(tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "sentences": [{"raw": ""}, {"raw": "", "tokens": ["a", "pond"]}, {"raw": " x "}]},
        {"filename": "b.jpg", "sentences": [{"tokens": ["two", "ponds"]}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}), encoding="utf-8-sig")
    assert [record.captions for record in karpathy(tmp_path / "a.json", tmp_path)] == [["a pond", "x"], ["two ponds"]]
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"filename": "a.jpg", "sentences": [{"row": "x"}]}]}))
    with pytest.raises(ValueError, match="lacks 'tokens'"):
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
    """RSICD's table says Airport, RSITMD's stems airport: two classes would be negatives of each other."""
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
    assert labels == {0: 1, 1: 2, 2: 0}, "names that are given are taken as they are"


def test_links_are_followed_but_not_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path / "set", 3)
    image_folder(tmp_path / "elsewhere", 3)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere" / "beach")
    (tmp_path / "set" / "airport" / "up").symlink_to("..")
    (tmp_path / "set" / "beach" / "over").symlink_to("../airport")
    names = [record.image.name for record in imagefolder(tmp_path / "set")]
    own = ["airport/airport_0.jpg", "beach/beach_1.jpg", "denseresidential/denseresidential_2.jpg"]
    assert sorted(names) == sorted([*own, "linked/beach_1.jpg", "beach/over/airport_0.jpg"])
    assert "airport/up is a link to a folder that it lies in" in caplog.text


def test_rs5m_image_layout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "img").mkdir()
    for number in range(3):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(jpeg(number))
    pub11 = tmp_path / "RS5M_pub11_train.csv"
    pub11.write_text(
        "img_name,text,url,country,month,meta_caption\n"
        '0.jpg,"Aerial view, port",https://h/0.jpg,spain,6,a satellite image of Spain in June\n'
        "1.jpg,A lake,https://h/1.jpg,,,\n"
        "2.jpg, ,https://h/2.jpg,,,\n"
    )
    found = samples(packed(tmp_path, "rs5m", "--csv", pub11, "--images", tmp_path / "img"))
    assert {key: sample.captions for key, sample in found.items()} == {"0": ["Aerial view, port"], "1": ["A lake"]}
    assert reasons(tmp_path) == {"2": "no caption"}
    assert found["0"].info["url"] == "https://h/0.jpg"
    assert found["0"].texts("meta_caption") == ["a satellite image of Spain in June"]
    assert (found["0"].info["country"], "country" in found["1"].info) == ("spain", False)
    both = rs5m(pub11, tmp_path / "img", caption_field=["meta_caption", "text"])
    assert [len(record.captions) for record in both] == [2, 1, 0]
    said = refusal(capsys, tmp_path, "rs5m", "--csv", pub11, "--images", tmp_path, "--caption-field", "blip")
    assert "no column blip" in said
    assert "it has: img_name, text, url, country, month, meta_caption" in said


# --- tars


def rs5m_tars(folder: Path) -> str:
    """RS5M's 128 published names, two samples each; returns the pattern of all."""
    for split in ("train", "val"):
        for part in ("pub11", "rs3"):
            for shard in range(32):
                name = f"{part}-{split}-{shard:04d}"
                members = {}
                for row in range(2):
                    number = shard * 2 + row
                    members[f"{number:09d}.img_content"] = jpeg(number % 7)
                    members[f"{number:09d}.img_name"] = f"{name}_{row}.jpg".encode()
                    members[f"{number:09d}.caption"] = f"{name} row {row}".encode()
                (folder / split).mkdir(parents=True, exist_ok=True)
                write_tar(folder / split / f"{name}.tar", members)
    return str(folder / "train" / "{pub11,rs3}-train-{0000..0031}.tar")


def test_published_shards_stream_index_resume_and_repack(tmp_path: Path) -> None:
    from priorclip.data_shards import DataConfig, ShardStream, load_tokenizer, train_tokenizer

    train = rs5m_tars(tmp_path / "rs5m")
    val = train.replace("train", "val")
    shards = ShardSet([train, val])
    assert (len(shards.files), len(shards)) == (128, 256)
    assert shards.read(0).captions == ["pub11-train-0000 row 0"]
    assert shards.read(255).captions == ["rs3-val-0031 row 1"]
    plain = ShardSet(train)
    assert main(["index", train, "--workers", "1"]) == 0
    assert Manifest.load(tmp_path / "rs5m/train").samples == 128
    assert not ShardSet(train)._scanned, "the index was not used"

    train_tokenizer(["row 0 1 pub11 rs3 train"], tmp_path / "tokenizer", 300, 12)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), 12)
    config = DataConfig(shards=train, image_size=16, workers=0, block_size=4, window_blocks=4)

    def stream() -> ShardStream:
        return ShardStream(ShardSet(train), tokenizer, config, global_batch=16, rank=0, world_size=1, seed=5, epochs=1)

    whole = [batch["image_ids"].tolist() for batch in stream()]
    assert sorted(index for batch in whole for index in batch) == list(range(128))
    resumed = stream()
    resumed.load_state_dict({**resumed.state_dict(), "samples_seen": 48})
    assert [batch["image_ids"].tolist() for batch in resumed] == whole[3:]

    repacked = packed(tmp_path, "webdataset", "--shards", train, "--shard-size", "50")
    assert repacked.sizes == [50, 50, 28]
    for sample in (0, 77, 127):
        before, after = plain.read(sample), repacked.read(sample)
        assert (after.image, after.captions) == (before.image, before.captions)
        assert after.info["img_name"] == before.info["img_name"]
    assert {repacked.read(i).info["source"] for i in range(0, 128, 16)} == {"pub11", "rs3"}
    assert len({repacked.key(i) for i in range(128)}) == 128


def test_img2dataset_output(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    facts = {"url": "https://h/a.jpg", "key": "000000000", "status": "success", "error_message": None, "width": 1}
    facts |= {"height": 1, "original_width": 900, "original_height": 700, "exif": "{}", "sha256": "0" * 64}
    failed = {**facts, "status": "failed_to_download", "error_message": "HTTP Error 404"}
    write_tar(
        folder / "00000.tar",
        {
            "000000000.jpg": jpeg(1),
            "000000000.txt": b"a port from above",
            "000000000.json": json.dumps({**facts, "caption": "a port from above"}).encode(),
            "000000001.jpg": jpeg(2),
            "000000001.txt": b"lost",
            "000000001.json": json.dumps(failed).encode(),
            "000000002.txt": b"no picture",
            "000000003.jpg": jpeg(3),
            "000000003.txt": b"\xff\xfe",
        },
    )
    table = pyarrow.table({"url": ["a", "b", "c"], "status": ["success", "failed_to_resize", "failed_to_download"]})
    pyarrow.parquet.write_table(table, folder / "00000.parquet")
    found = samples(packed(tmp_path, "webdataset", "--shards", folder))
    assert list(found) == ["000000000"]
    info = found["000000000"].info
    assert (info["captions"], info["url"], info["source"]) == (["a port from above"], "https://h/a.jpg", "laion")
    assert (info["width"], info["height"], info["original_width"], info["exif"]) == (40, 32, 900, "{}")
    assert info["sha256"] != facts["sha256"]
    assert reasons(tmp_path) == {
        "000000001": "not downloaded",
        "000000002": "no image",
        "000000003": "text is not UTF-8",
    }
    assert "00000.parquet: 2 images were not downloaded" in caplog.text


def test_repacking_own_shards_keeps_what_they_say(tmp_path: Path) -> None:
    assert main(f"pack --source synthetic --count 4 --size 32 --workers 1 --output {tmp_path / 'drawn'}".split()) == 0
    before = samples(ShardSet(str(tmp_path / "drawn")))
    after = samples(packed(tmp_path, "webdataset", "--shards", tmp_path / "drawn", "--shard-size", "3"))
    assert {key: (s.image, s.label, s.info) for key, s in after.items()} == {
        key: (s.image, s.label, s.info) for key, s in before.items()
    }
    coarse = webdataset(str(tmp_path / "drawn"), ["coarse_captions"])
    assert [record.captions for record in coarse] == [s.texts("coarse_captions") for s in before.values()]


# --- labelled folders


def test_fmow_pictures_and_boxes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:40, 30:50] = (250, 10, 10)
    folder = tmp_path / "fmow/train/airport/airport_0"
    folder.mkdir(parents=True)
    box = {"ID": 0, "box": [30, 20, 20, 20], "category": "airport"}
    other = {"ID": 1, "box": [0, 0, 10, 10], "category": "parking_lot_or_garage"}
    for name, boxes in (("airport_0_0_rgb", [box]), ("airport_0_1_rgb", [box, other]), ("airport_0_0_msrgb", [box])):
        (folder / f"{name}.jpg").write_bytes(encoded(Image.fromarray(pixels), quality=95, subsampling=0))
        facts = {"gsd": 0.5, "country_code": "ESP", "timestamp": "2016-01-01T00:00:00Z", "bounding_boxes": boxes}
        (folder / f"{name}.json").write_text(json.dumps(facts))
    found = samples(packed(tmp_path, "fmow", "--images", tmp_path / "fmow", "--split", "train"))
    one, two = found["airport/airport_0/airport_0_0_rgb"], found["airport/airport_0/airport_0_1_rgb"]
    assert len(found) == 2
    assert (one.label, one.info["gsd"], one.info["country_code"]) == ("airport", 0.5, "ESP")
    assert (two.label, two.info["labels"]) == (None, ["airport", "parking_lot_or_garage"])
    assert "airport" in two.captions[0]
    assert "parking" in two.captions[0]
    assert len(fmow(tmp_path / "fmow", "train", "both")) == 3
    crops = fmow(tmp_path / "fmow", "train", crop_margin=0.5)
    assert [record.label for record in crops] == ["airport", "airport", "parking_lot_or_garage"]
    whole = Image.open(io.BytesIO(load(crops[0]).image))
    assert whole.size == (40, 40)  # 20 x 20, and half of 20 on each side
    tight = np.asarray(Image.open(io.BytesIO(load(fmow(tmp_path / "fmow", "train", crop_margin=0)[0]).image)))
    assert tight.shape == (20, 20, 3)
    assert np.abs(tight.astype(int) - (250, 10, 10)).max() < 12
    assert Image.open(io.BytesIO(load(crops[2]).image)).size == (15, 15)  # cut at the picture's edge
    (folder / "airport_0_1_rgb.json").unlink()
    said = refusal(capsys, tmp_path, "fmow", "--images", tmp_path / "fmow")
    assert "airport_0_1_rgb.json is missing" in said


def band(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


def test_bigearthnet_composes_rgb_and_words_several_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = np.random.default_rng(1).integers(0, 3000, (3, 12, 12))
    labels = {"S2A_x_1_1": ["Mixed forest", "Water bodies"], "S2A_x_1_2": ["Pastures"], "S2A_x_1_3": ["Pastures"]}
    root = tmp_path / "v1"
    for patch, names in labels.items():
        for number, name in enumerate(("B04", "B03", "B02")):
            band(root / patch / f"{patch}_{name}.tif", values[number])
        text = json.dumps({"labels": names, "acquisition_date": "2017-06-13 10:10:31"})
        (root / patch / f"{patch}_labels_metadata.json").write_text(text)
    (root / "S2A_x_1_3/S2A_x_1_3_B03.tif").unlink()
    found = samples(packed(tmp_path, "bigearthnet", "--images", root))
    assert reasons(tmp_path) == {"S2A_x_1_3": "missing file"}
    several, single = found["S2A_x_1_1"], found["S2A_x_1_2"]
    assert (several.label, several.info["labels"]) == (None, ["Mixed forest", "Water bodies"])
    assert "a mixed forest and water bodies" in several.captions[0]
    assert (single.label, "labels" in single.info) == ("Pastures", False)
    assert single.info["acquisition_date"] == "2017-06-13 10:10:31"
    pixels = np.asarray(Image.open(io.BytesIO(several.image)))
    reference = np.minimum(255, np.floor(values.transpose(1, 2, 0) * 255 / 2000 + 0.5))
    np.testing.assert_array_equal(pixels, reference)
    dark = load(bigearthnet(root, reflectance_max=4095)[0]).image
    assert np.asarray(Image.open(io.BytesIO(dark))).mean() < 0.6 * pixels.mean()
    assert "no splits" in refusal(capsys, tmp_path, "bigearthnet", "--images", root, "--split", "train")


def test_bigearthnet_version_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tile = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP"
    for patch in (f"{tile}_26_57", f"{tile}_26_58"):
        for name in ("B04", "B03", "B02"):
            band(tmp_path / "BigEarthNet-S2" / tile / patch / f"{patch}_{name}.tif", np.full((8, 8), 1000))
    table = {
        "patch_id": [f"{tile}_26_57", f"{tile}_26_58"],
        "labels": [["Arable land", "Urban fabric"], ["Inland waters"]],
        "split": ["test", "train"],
        "country": ["Austria", "Austria"],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "metadata.parquet")
    found = samples(packed(tmp_path, "bigearthnet", "--images", tmp_path, "--split", "test"))
    assert list(found) == [f"{tile}_26_57"]
    assert found[f"{tile}_26_57"].info["labels"] == ["Arable land", "Urban fabric"]
    assert found[f"{tile}_26_57"].info["country"] == "Austria"
    said = refusal(capsys, tmp_path, "bigearthnet", "--images", tmp_path, "--split", "val")
    assert "it has: test, train" in said


def test_millionaid_hierarchy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("agriculture_land/arable_land/dry_field/P1.jpg", "water_area/lake/P2.jpg", "P3.jpg", "._P4.jpg"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(jpeg(1))
    found = samples(packed(tmp_path, "millionaid", "--images", tmp_path, "--split", "train"))
    assert {key: (sample.label, sample.info["hierarchy"]) for key, sample in found.items()} == {
        "agriculture_land/arable_land/dry_field/P1": ("dry_field", ["agriculture_land", "arable_land", "dry_field"]),
        "water_area/lake/P2": ("lake", ["water_area", "lake"]),
    }
    assert reasons(tmp_path) == {"P3": "no caption"}
    (tmp_path / "test").mkdir()
    (tmp_path / "test/P5.jpg").write_bytes(jpeg(1))
    assert "is it the test set" in refusal(capsys, tmp_path, "millionaid", "--images", tmp_path, "--split", "test")


def test_multi_label_images_are_chosen_and_relabelled(tmp_path: Path) -> None:
    for patch, names in {"a": ["Mixed forest", "Pastures"], "b": ["Pastures"], "c": ["Inland waters"]}.items():
        for name in ("B04", "B03", "B02"):
            band(tmp_path / "ben" / patch / f"{patch}_{name}.tif", np.full((8, 8), 1000))
        (tmp_path / "ben" / patch / f"{patch}_labels_metadata.json").write_text(json.dumps({"labels": names}))
    found = packed(tmp_path, "bigearthnet", "--images", tmp_path / "ben", "--classes", "[Pastures]")
    assert set(samples(found)) == {"a", "b"}


def test_captions_of_several_classes() -> None:
    labels = ["Mixed forest", "Sea and ocean", "Urban fabric"]
    texts = templates.captions(labels, 30, seed=1)
    assert len(set(texts)) == 30
    assert all("a mixed forest, " in text and " and " in text for text in texts)
    assert texts == templates.captions(labels, 30, seed=1) != templates.captions(labels, 30, seed=2)
    many = [f"kind{letter} place" for letter in "abcdefgh"]
    named = [sum(name in text for name in many) for text in templates.captions(many, 5, seed=3)]
    assert named == [templates.NAMED_TOGETHER] * 5
    one = templates.captions("airport", 5, seed=17)
    assert templates.captions(["airport"], 5, seed=17) == one


# --- Parquet


def hugging_face(path: Path, count: int, group: int, labels: list[str]) -> None:
    """A file as `datasets` writes it: struct<bytes, path>, list of captions, class label with names."""
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": labels, "_type": "ClassLabel"}}
    table = pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(count)], struct),
            "captions": [[f"caption {i}", f"second {i}", " "] for i in range(count)],
            "label": [i % (len(labels) + 1) - 1 for i in range(count)],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def test_parquet_as_hugging_face_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    hugging_face(data / "train-00000-of-00002.parquet", 7, 3, ["harbor", "lake"])
    hugging_face(data / "train-00001-of-00002.parquet", 2, 3, ["harbor", "lake"])
    hugging_face(data / "test-00000-of-00001.parquet", 1, 3, ["harbor", "lake"])
    found = samples(packed(tmp_path, "parquet", "--parquet", data, "--split", "train"))
    assert len(found) == 9
    assert found["train-00000-of-00002/00000004"].image == jpeg(4)
    assert found["train-00000-of-00002/00000004"].captions == ["caption 4", "second 4"]
    assert [sample.label for sample in found.values()][:3] == [None, "harbor", "lake"]
    said = refusal(capsys, tmp_path, "parquet", "--parquet", data, "--caption-field", "text")
    assert "no column 'text'; it has: image, captions, label" in said
    assert "no row of the split 'val'" in refusal(capsys, tmp_path, "parquet", "--parquet", data, "--split", "val")
    (data / "train-00002.parquet").write_bytes(b"not parquet")
    assert "train-00002.parquet is not a Parquet file" in refusal(capsys, tmp_path, "parquet", "--parquet", data)


def test_parquet_with_binary_paths_and_failed_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = {
        "jpg": [jpeg(0), None, jpeg(2)],
        "caption": ["a", "b", None],
        "scene": ["lake", "lake", "river"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
        "url": ["https://h/0", None, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    found = samples(packed(tmp_path, "parquet", "--parquet", tmp_path / "00000.parquet"))
    assert found["00000/00000000"].image == jpeg(0)
    assert found["00000/00000000"].info["url"] == "https://h/0"
    assert "river" in found["00000/00000002"].captions[0]  # from a template
    assert reasons(tmp_path) == {"00000/00000001": "not downloaded"}

    (tmp_path / "img/lake").mkdir(parents=True)
    (tmp_path / "img/lake/1.jpg").write_bytes(jpeg(5))
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["lake/1.jpg"], "text": ["x"]}), tmp_path / "p.parquet")
    assert "--images" in refusal(capsys, tmp_path, "parquet", "--parquet", tmp_path / "p.parquet")
    record = parquet(tmp_path / "p.parquet", tmp_path / "img")[0]
    assert (record.key, record.captions, load(record).image) == ("lake/1", ["x"], jpeg(5))
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""], "label": [3], "text": ["x"]}), tmp_path / "n.parquet")
    assert "do not name the classes" in refusal(capsys, tmp_path, "parquet", "--parquet", tmp_path / "n.parquet")


def test_parquet_reads_each_row_group_about_once_when_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from priorclip.data_shards.sources import parquet as module

    hugging_face(tmp_path / "a.parquet", 60, 10, ["harbor"])
    records = shuffled(parquet(tmp_path / "a.parquet"), seed=3)
    assert sorted(record.key for record in records) == [f"a/{n:08d}" for n in range(60)]
    assert [record.key for record in records] != sorted(record.key for record in records)
    opened: list[str] = []
    real_open = module._open
    monkeypatch.setattr(module, "_open", lambda file: (opened.append(str(file)), real_open(file))[1])
    module._images.cache_clear()
    assert {load(record).image == jpeg(int(record.key[2:])) for record in records} == {True}
    assert len(opened) == 6


# --- what all have in common


def test_options_of_another_source_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, tmp_path, "imagefolder", "--images", tmp_path, "--labels", "x.csv", "--count", "3")
    assert "--source imagefolder does not take --count, --labels; it takes: --images, --split" in said
    assert "--source rs5m needs --csv" in refusal(capsys, tmp_path, "rs5m", "--images", tmp_path)
    assert "karpathy, precomp, webdataset" in refusal(capsys, tmp_path, "laion")


def test_help_explains_every_source(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    text = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert name in text
        for option in source.needs + source.takes:
            assert f"--{option}" in text.replace("-", "_").replace("__", "--")


def test_records_stay_small_and_plan_without_touching_images(tmp_path: Path) -> None:
    """Five million records are held while packing: an RS5M-like row may cost 700 bytes of Python at most."""
    table, count = tmp_path / "pub11.csv", 4000
    with open(table, "w") as file:
        file.write("img_name,text,url\n")
        for number in range(count):
            words = "aerial photograph of a harbour with ships and a long pier"
            file.write(f"pub11_{number:07d}.jpg,{words} {number},https://images.example.org/{number:07d}.jpg\n")
    tracemalloc.start()
    records = rs5m(table, "/no/such/folder")
    size = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert len(records) == count
    assert size < 700, f"{size:.0f} bytes a record"
    with pytest.raises(BadSample, match="missing file"):
        load(records[0])


def test_record_sets_read_every_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(1), "k.txt": b"one"})
    hugging_face(tmp_path / "b.parquet", 2, 1, ["harbor"])
    image_folder(tmp_path / "c", 2)
    records = [*webdataset(str(tmp_path / "a.tar")), *parquet(tmp_path / "b.parquet"), *imagefolder(tmp_path / "c")]
    source = RecordSet(records)
    assert [source.read(i).image[:2] for i in range(5)] == [b"\xff\xd8"] * 5
    assert source.captions(0) == ["one"]
    assert source.captions(2) == ["caption 1", "second 1"]
    assert source.classes == ["airport", "beach", "harbor"]


def test_places_travel_to_worker_processes(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", 9, 2, ["harbor"])
    write_tar(
        tmp_path / "a.tar", {f"{i}.{end}": data for i in range(9) for end, data in (("jpg", jpeg(i)), ("txt", b"x"))}
    )
    for name, option in (("parquet", "a.parquet"), ("webdataset", "a.tar")):
        flag = "--parquet" if name == "parquet" else "--shards"
        packs = []
        for workers in ("1", "2"):
            out = tmp_path / f"{name}{workers}"
            words = ["--source", name, flag, str(tmp_path / option), "--output", str(out), "--workers", workers]
            assert main(["pack", *words, "--shard-size", "4"]) == 0
            packs.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
        assert packs[0] == packs[1]
        assert len(packs[0]) == 3


def test_places_are_named_without_their_folder() -> None:
    """``repr`` goes into the fingerprint of a pack: moving a data set must not change it."""
    assert repr(ImageFile("/here", "a/b.jpg")) == repr(ImageFile("/there", "a/b.jpg"))
    assert repr(ImageFile("/here", "a/b.jpg")) != repr(ImageFile("/here", "a/c.jpg"))


@given(st.lists(st.text("ab./\\ _", max_size=12), min_size=1, max_size=8))
def test_keys_stay_in_the_tar_and_sets_apart(names: list[str]) -> None:
    for name in names:
        key = sample_key(name)
        assert key
        assert ".." not in key.split("/")
        assert "." not in key.rsplit("/", 1)[-1]
        assert not key.startswith("/")
    random.Random(1).shuffle(names)
    groups = [
        [Record(sample_key(name), b"x", source=source) for name in dict.fromkeys(names)] for source in ("a", "a", "b")
    ]
    keys = [record.key.split("/")[0] for record in join_sets(groups)]
    assert Counter(keys) == dict.fromkeys(("a", "a-2", "b"), len(dict.fromkeys(names)))


def test_tars_with_dots_in_keys_and_folders_repack(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.b/c.jpg", jpeg(1)), ("a.b/c.txt", b"deep")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert list(samples(packed(tmp_path, "webdataset", "--shards", path))) == ["a.b/c"]
