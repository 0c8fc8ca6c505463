"""Folders as sources: links, fMoW, BigEarthNet, Million-AID and images with several labels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from small_data import encoded, image_folder
from source_packs import jpeg, packed, reasons, refusal, samples

from priorclip.data_shards.sources import (
    load,
    templates,
)
from priorclip.data_shards.sources.bigearthnet import bigearthnet
from priorclip.data_shards.sources.fmow import fmow
from priorclip.data_shards.sources.folder import imagefolder


def test_links_are_followed_but_not_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(tmp_path / "set", 3)
    image_folder(tmp_path / "elsewhere", 3)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere" / "beach")
    (tmp_path / "set" / "airport" / "up").symlink_to("..")
    (tmp_path / "set" / "beach" / "over").symlink_to("../airport")
    names = [record.image.name for record in imagefolder(tmp_path / "set")]
    own = ["airport/airport_0.jpg", "beach/beach_1.jpg", "denseresidential/denseresidential_2.jpg"]
    assert sorted(names) == sorted([*own, "linked/beach_1.jpg", "beach/over/airport_0.jpg"])
    assert "airport/up is a link to a folder that contains it" in caplog.text


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
    assert Image.open(io.BytesIO(load(crops[2]).image)).size == (15, 15)  # cropped at the picture's edge
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
    assert "Is this the test set" in refusal(capsys, tmp_path, "millionaid", "--images", tmp_path, "--split", "test")


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
