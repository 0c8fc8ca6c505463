"""Packing: each source, repeatable byte for byte, restartable, and careful with existing files."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import webdataset
from PIL import Image
from small_data import encoded, image_folder, picture, records, rows

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.sources import Record


def contents(folder: Path) -> dict[str, str]:
    """Returns the hash of each file, also of hidden ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_disk_that_is_full_while_packing(tmp_path: Path) -> None:
    """The error names the tar, the unfinished file is removed to free space, and the same command finishes the pack."""
    made, plan = records(12), PackPlan(shard_size=6)
    whole = contents_of_pack(made, tmp_path / "whole", plan)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*full/shard-000000.tar'"):
            pack(records(12), tmp_path / "full", plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".pack"]
    assert contents_of_pack(records(12), tmp_path / "full", plan) == whole


def contents_of_pack(made: list[Record], folder: Path, plan: PackPlan) -> dict[str, str]:
    pack(made, folder, plan)
    return contents(folder)


def test_imagefolder_round_trip(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", 12)
    shards = tmp_path / "shards"
    assert (
        main(f"pack --source imagefolder --images {images} --output {shards} --shard-size 5 --workers 1".split()) == 0
    )
    opened = ShardSet(str(shards))
    assert len(opened) == 12
    assert opened.sizes == [5, 5, 2]
    assert opened.classes == ["airport", "beach", "denseresidential"]
    for index in range(12):
        sample = opened.read(index)
        original = images / f"{sample.key}.jpg"
        assert sample.image == original.read_bytes()  # without --quality nothing is re-encoded
        assert sample.label == original.parent.name
        assert len(sample.captions) == 1
        assert sample.info["sha256"] == hashlib.sha256(sample.image).hexdigest()
        assert (sample.info["width"], sample.info["height"]) == (72, 64)


def test_csv_rows_of_one_file_are_its_captions(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", 3)
    table = tmp_path / "captions.csv"
    table.write_text(
        "filename,caption,label,split\n"
        'airport/airport_0.jpg,"planes, parked",airport,train\n'
        "airport/airport_0.jpg,a runway,airport,train\n"
        "beach/beach_1.jpg,sand,beach,test\n"
        "denseresidential/denseresidential_2.jpg,,denseresidential,train\n"
    )
    shards = tmp_path / "shards"
    command = f"pack --source csv --csv {table} --images {images} --split train --output {shards} --workers 1"
    assert main([*command.split(), "--captions-per-image", "4"]) == 0
    opened = ShardSet(str(shards))
    samples = {opened.key(i): opened.read(i) for i in range(len(opened))}
    assert set(samples) == {"airport/airport_0", "denseresidential/denseresidential_2"}
    assert samples["airport/airport_0"].captions == ["planes, parked", "a runway"]
    templated = samples["denseresidential/denseresidential_2"].captions
    assert len(set(templated)) == 4
    assert all("resident" in text or "house" in text for text in templated)


def test_karpathy_split_and_labels(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", 3)
    entries = [
        {"filename": "airport/airport_0.jpg", "split": "test", "sentences": [{"raw": "one ."}, {"raw": "two ."}]},
        {
            "filename": "beach/beach_1.jpg",
            "split": "test",
            "label": "shore",
            "sentences": [{"tokens": ["white", "sand"]}],
        },
        {"filename": "denseresidential/denseresidential_2.jpg", "split": "train", "sentences": [{"raw": "houses"}]},
    ]
    annotation = tmp_path / "dataset.json"
    annotation.write_text(json.dumps({"dataset": "made", "images": entries}))
    command = f"pack --source karpathy --json {annotation} --images {images} --split test --workers 1 --output"
    assert main([*command.split(), str(tmp_path / "shards")]) == 0
    opened = ShardSet(str(tmp_path / "shards"))
    samples = {opened.key(i): opened.read(i) for i in range(len(opened))}
    assert {key: sample.label for key, sample in samples.items()} == {
        "airport/airport_0": "airport",
        "beach/beach_1": "shore",
    }
    assert samples["airport/airport_0"].captions == ["one .", "two ."]
    assert samples["beach/beach_1"].captions == ["white sand"]
    assert samples["beach/beach_1"].info["source"] == "made"
    table = tmp_path / "labels.csv"
    table.write_text("filename,label\nairport_0.jpg,Airfield\nbeach_1.jpg,Coast\n")
    assert main([*command.split(), str(tmp_path / "labelled"), "--labels", str(table)]) == 0
    assert ShardSet(str(tmp_path / "labelled")).classes == ["Airfield", "Coast"]


def test_synthetic_both_wordings(tmp_path: Path) -> None:
    command = (
        "pack --source synthetic --count 6 --size 64 --seed 3 --first-index 100 --shard-size 4 --workers 1 --output"
    )
    assert main([*command.split(), str(tmp_path / "shards")]) == 0
    from priorclip.data_shards.synthetic import draw_scene

    opened = ShardSet(str(tmp_path / "shards"))
    assert len(opened) == 6
    for index in range(6):
        scene, sample = draw_scene(3, 100 + index, 64), opened.read(index)
        assert (sample.label, sample.captions) == (scene.label, list(scene.fine))
        assert sample.texts("coarse_captions") == list(scene.coarse)


def test_bytes_do_not_depend_on_workers(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images", 14)
    command = f"pack --source imagefolder --images {images} --shard-size 4 --max-side 48 --output"
    for workers in (1, 2):
        assert main([*command.split(), str(tmp_path / str(workers)), "--workers", str(workers)]) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert {"shard-000003.tar", "shard-000003.tar.idx", "manifest.json"} <= set(contents(tmp_path / "1"))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_half_way_it_finishes_with_the_same_bytes(tmp_path: Path, workers: int) -> None:
    images = image_folder(tmp_path / "images", 90)
    options = f"pack --source imagefolder --images {images} --shard-size 3 --max-side 60 --workers {workers}"
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "data_shards", *options.split(), "--output", str(killed)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(killed.glob(".pack/shard-*.json"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists(), "it finished before it could be killed"
    done = [killed / f"{part.stem}.tar" for part in (killed / ".pack").glob("shard-*.json")]
    assert done, "it was killed before its first shard was done"
    with pytest.raises(ValueError, match="half packed"):
        ShardSet(str(killed))
    written = [path.stat().st_mtime_ns for path in done]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [path.stat().st_mtime_ns for path in done] == written, "a finished shard was packed again"
    assert main([*options.split(), "--output", str(tmp_path / "whole")]) == 0
    assert contents(killed) == contents(tmp_path / "whole")


def test_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = image_folder(tmp_path / "images", 4)
    shards = tmp_path / "shards"
    command = f"pack --source imagefolder --images {images} --output {shards} --workers 1".split()
    assert main(command) == 0
    before = contents(shards)
    assert main(command) == 2
    assert main([*command, "--shard-size", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(shards) == before
    (shards / "notes.md").write_text("mine")
    assert main([*command, "--shard-size", "2", "--overwrite"]) == 0
    assert Manifest.load(shards).samples == 4
    assert sorted(path.name for path in shards.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert (shards / "notes.md").read_text() == "mine"


def test_refuses_another_half_finished_pack_and_foreign_folders(tmp_path: Path) -> None:
    half = tmp_path / "half"
    (half / ".pack").mkdir(parents=True)
    (half / ".pack" / "options.json").write_text('{"fingerprint": "of something else"}')
    with pytest.raises(FileExistsError, match="other options"):
        pack(records(3), half, PackPlan())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="not empty"):
        pack(records(3), foreign, PackPlan())
    with pytest.raises(FileExistsError, match="not empty"):
        pack(records(3), foreign, PackPlan(), overwrite=True)


def test_bad_images_are_counted_and_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = image_folder(tmp_path / "images", 6)
    whole = (images / "beach" / "beach_1.jpg").read_bytes()
    (images / "beach" / "beach_1.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "airport" / "airport_0.jpg").write_bytes(b"")
    (images / "airport" / "airport_3.jpg").write_bytes(b"<html>not found</html>")
    shards = tmp_path / "shards"
    assert main(f"pack --source imagefolder --images {images} --output {shards} --workers 1".split()) == 0
    found = {row["key"]: row["reason"] for row in rows(shards / "quarantine.jsonl")}
    assert found == {
        "airport/airport_0": "empty image",
        "airport/airport_3": "not an image",
        "beach/beach_1": "unreadable image",
    }
    manifest = Manifest.load(shards)
    assert manifest.samples == 3
    assert manifest.skipped == {"empty image": 1, "not an image": 1, "unreadable image": 1}
    assert "left out: 1 x not an image" in capsys.readouterr().out


def test_nothing_to_pack_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = tmp_path / "images"
    (images / "beach").mkdir(parents=True)
    (images / "beach" / "a.jpg").write_bytes(b"no")
    assert main(f"pack --source imagefolder --images {images} --output {tmp_path / 'o'} --workers 1".split()) == 2
    error = capsys.readouterr().err
    assert "none of 1 records could be packed; the first, beach/a: not an image (cannot identify image file)" in error


def test_reencodes_on_request_and_foreign_formats(tmp_path: Path) -> None:
    images = tmp_path / "images" / "beach"
    images.mkdir(parents=True)
    picture(1, 200, 100).save(images / "a.tif")
    picture(2, 200, 100).save(images / "b.png")
    picture(3, 30, 20).save(images / "c.webp", lossless=True)
    command = f"pack --source imagefolder --images {images.parent} --workers 1 --output"
    assert main([*command.split(), str(tmp_path / "kept")]) == 0
    opened = ShardSet(str(tmp_path / "kept"))
    kept = {opened.key(i): opened.read(i) for i in range(3)}
    assert kept["beach/b"].image == (images / "b.png").read_bytes()
    assert kept["beach/c"].image == (images / "c.webp").read_bytes()
    assert kept["beach/a"].image[:3] == b"\xff\xd8\xff"
    with tarfile.open(tmp_path / "kept" / "shard-000000.tar") as tar:
        assert {name.split(".")[1] for name in tar.getnames()} == {"jpg", "png", "webp", "json", "txt"}
    assert main([*command.split(), str(tmp_path / "small"), "--max-side", "50"]) == 0
    opened = ShardSet(str(tmp_path / "small"))
    sizes = {opened.key(i): (opened.read(i).info["width"], opened.read(i).info["height"]) for i in range(3)}
    assert sizes == {"beach/a": (50, 25), "beach/b": (50, 25), "beach/c": (30, 20)}


def test_exif_rotation_is_applied_when_reencoding(tmp_path: Path) -> None:
    images = tmp_path / "images" / "beach"
    images.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    (images / "a.jpg").write_bytes(encoded(picture(1, 80, 40), exif=exif))
    command = f"pack --source imagefolder --images {images.parent} --workers 1 --quality 90 --output {tmp_path / 's'}"
    assert main(command.split()) == 0
    info = ShardSet(str(tmp_path / "s")).read(0).info
    assert (info["width"], info["height"]) == (40, 80)


def test_webdataset_and_tarfile_read_the_shards(packed: Path) -> None:
    pattern = str(packed / "train-{000000..000004}.tar")
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(pattern, shardshuffle=False)}
    ours = ShardSet(pattern)
    assert len(read) == len(ours) == 46
    for index in (0, 17, 45):
        sample = ours.read(index)
        assert read[sample.key]["jpg"] == sample.image
        assert json.loads(read[sample.key]["json"])["captions"] == sample.captions
    with tarfile.open(packed / "train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)


def test_keys_with_dots_unicode_and_doubles(tmp_path: Path) -> None:
    made = records(4)
    made[0].key = made[1].key = "scène/éé"
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "v1.2.final.jpg").write_bytes(made[0].image)
    from priorclip.data_shards.sources import imagefolder

    made += imagefolder(folder)
    pack(made, tmp_path / "shards", PackPlan())
    read = webdataset.WebDataset(str(tmp_path / "shards" / "shard-000000.tar"), shardshuffle=False)
    keys = [sample["__key__"] for sample in read]
    assert keys == ["scène/éé", "scène/éé-2", "area/00002", "area/00003", "v1_2_final"]
    assert [ShardSet(str(tmp_path / "shards")).key(i) for i in range(5)] == keys


def test_missing_options_and_columns_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["pack", "--source", "csv", "--output", str(tmp_path / "o")]) == 2
    assert "needs --csv" in capsys.readouterr().err
    table = tmp_path / "t.csv"
    table.write_text("name,words\na.jpg,b\n")
    assert main(f"pack --source csv --csv {table} --images {tmp_path} --output {tmp_path / 'o'}".split()) == 2
    assert "it has: name, words" in capsys.readouterr().err
    table.write_text("filename,caption,split\na.jpg,b,train\n")
    assert (
        main(f"pack --source csv --csv {table} --images {tmp_path} --split val --output {tmp_path / 'o'}".split()) == 2
    )
    assert "it has: train" in capsys.readouterr().err


def test_every_class_has_many_template_captions() -> None:
    from priorclip.data_shards.sources import templates

    for name in (*templates.SCENES, "SolarFarm", "wind_turbines", "dry grass"):
        texts = templates.captions(name, 20, seed=1)
        assert len(set(texts)) == 20
        assert templates.captions(name, 20, seed=1) == texts
        assert templates.captions(name, 20, seed=2) != texts
    assert templates.scene_phrases("SolarFarm") == ("a solar farm",)
    assert templates.scene_phrases("ice_rink") == ("an ice rink",)
    assert templates.scene_phrases("wind_turbines") == ("wind turbines",)
    assert templates.scene_phrases("dry grass") == ("dry grass",)
