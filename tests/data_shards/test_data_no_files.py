"""Named pipes and devices in place of files: no source waits for one or reads it without end, and its sample is bad."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_data import encoded, picture, rows, write_tar

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest

Source = Callable[[Path], tuple[list[str], Path]]  # folder -> words of `pack`, and a path for what is no file
SECONDS = 20  # after which a reader counts as waiting for ever


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Ends what waits for a pipe, which no other process will ever write to."""

    def end(number: int, frame: object) -> None:
        raise AssertionError(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def karpathy(root: Path) -> tuple[list[str], Path]:
    names = ("good.jpg", "bad.jpg")
    images = [{"filename": name, "sentences": [{"raw": "a pond"}]} for name in names]
    (root / "set.json").write_text(json.dumps({"images": images}))
    return ["--source", "karpathy", "--json", str(root / "set.json"), "--images", str(root)], root / "bad.jpg"


def csv(root: Path) -> tuple[list[str], Path]:
    (root / "set.csv").write_text("filename,caption\ngood.jpg,a pond\nbad.jpg,a pond\n")
    return ["--source", "csv", "--csv", str(root / "set.csv"), "--images", str(root)], root / "bad.jpg"


def imagefolder(root: Path) -> tuple[list[str], Path]:
    (root / "pond").mkdir()
    return ["--source", "imagefolder", "--images", str(root)], root / "pond" / "bad.jpg"


def millionaid(root: Path) -> tuple[list[str], Path]:
    (root / "water" / "pond").mkdir(parents=True)
    (root / "good.jpg").rename(root / "water" / "pond" / "good.jpg")
    return ["--source", "millionaid", "--images", str(root)], root / "water" / "pond" / "bad.jpg"


def fmow(root: Path) -> tuple[list[str], Path]:
    box = {"box": [0, 0, 4, 4], "category": "pond"}
    for name in ("good_rgb", "bad_rgb"):
        (root / f"{name}.json").write_text(json.dumps({"bounding_boxes": [box]}))
    (root / "good.jpg").rename(root / "good_rgb.jpg")
    return ["--source", "fmow", "--images", str(root)], root / "bad_rgb.jpg"


def fmow_crop(root: Path) -> tuple[list[str], Path]:
    words, bad = fmow(root)
    return [*words, "--crop-margin", "0.1"], bad


def packed_with(source: Source, make: Callable[[Path], None], folder: Path) -> tuple[int, Path]:
    """Packs a good image beside something that is no file. Returns the exit code, and the path that is no file."""
    (folder / "images").mkdir()
    (folder / "images" / "good.jpg").write_bytes(encoded(picture(1)))
    words, bad = source(folder / "images")
    make(bad)
    return main(["pack", *words, "--output", str(folder / "out"), "--workers", "1"]), bad


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("source", [karpathy, csv, imagefolder, millionaid, fmow, fmow_crop])
def test_an_image_that_is_no_file_is_a_bad_sample(source: Source, make: Callable[[Path], None], tmp_path: Path) -> None:
    code, bad = packed_with(source, make, tmp_path)
    assert code == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest is not None
    assert manifest.samples == 1
    (row,) = rows(tmp_path / "out" / "quarantine.jsonl")
    assert row["reason"] == "unreadable file"
    assert row["detail"] == f"{bad} is no regular file"


def fmow_facts(root: Path) -> tuple[list[str], Path]:
    (root / "good.jpg").rename(root / "good_rgb.jpg")
    return ["--source", "fmow", "--images", str(root)], root / "good_rgb.json"


def bigearthnet_facts(root: Path) -> tuple[list[str], Path]:
    (root / "p").mkdir()
    return ["--source", "bigearthnet", "--images", str(root)], root / "p" / "p_labels_metadata.json"


def precomp_captions(root: Path) -> tuple[list[str], Path]:
    (root / "test_filename.txt").write_text("good.jpg\n")
    return ["--source", "precomp", "--precomp", str(root), "--images", str(root)], root / "test_caps.txt"


def tar(root: Path) -> tuple[list[str], Path]:
    write_tar(root / "good.tar", {"a.jpg": encoded(picture(1)), "a.txt": b"a pond"})
    return ["--source", "webdataset", "--shards", str(root)], root / "bad.tar"


def scene(root: Path) -> tuple[list[str], Path]:
    return ["--source", "raster", "--images", str(root)], root / "bad.tif"


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("source", [fmow_facts, bigearthnet_facts, precomp_captions, tar, scene])
def test_a_file_beside_the_images_that_is_none_is_an_error(
    source: Source, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scene that cannot be read is left out, and here none is left."""
    code, bad = packed_with(source, make, tmp_path)
    assert code == 2
    said = capsys.readouterr().err
    assert "none of 1 scenes" in said if bad.suffix == ".tif" else bad.name in said
