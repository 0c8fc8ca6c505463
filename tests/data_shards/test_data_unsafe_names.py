"""Names out of data files: none of them leads pack, index or verify out of the folders that the user named."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from small_data import encoded, image_folder, picture, rows, write_tar

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.pack.unfinished_folder import OPTIONS
from priorclip.data_shards.sources import RecordSet, karpathy

EVIL = {
    "above the folder": "../secret.jpg",
    "above the folder, amid": "airport/../../secret.jpg",
    "above the folder, Windows": "..\\secret.jpg",
    "absolute": "ROOT/secret.jpg",
    "absolute by way of the folder": "ROOT/images/../secret.jpg",
    "a command": "pipe:touch ROOT/executed; cat ROOT/secret.jpg",
    "a URL": "http://127.0.0.1:9/secret.jpg",
    "a file URL": "file://ROOT/secret.jpg",
    "a NUL byte": "secret.jpg\0.jpg",
    "too long": "a" * 300 + ".jpg",
}
MISSING = ("missing file", "unreadable file", "refused file name")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """images/ with one good picture, and secret.jpg beside it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "secret.jpg").write_bytes(encoded(picture(2)))
    return tmp_path


def write_karpathy(root: Path, names: list[str]) -> list[str]:
    images = [{"filename": name, "split": "test", "sentences": [{"raw": "a beach"}]} for name in names]
    (root / "data.json").write_text(json.dumps({"images": images}))
    return ["--source", "karpathy", "--json", str(root / "data.json")]


def write_filepath(root: Path, names: list[str]) -> list[str]:
    """The folder of the name stands in a field of its own."""
    images = [
        {"filepath": os.path.dirname(name), "filename": os.path.basename(name), "sentences": [{"raw": "a beach"}]}
        for name in names
    ]
    (root / "data.json").write_text(json.dumps({"images": images}))
    return ["--source", "karpathy", "--json", str(root / "data.json")]


def write_csv(root: Path, names: list[str]) -> list[str]:
    with open(root / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([["filename", "caption"], *([name, "a beach"] for name in names)])
    return ["--source", "csv", "--csv", str(root / "data.csv")]


def write_rs5m(root: Path, names: list[str]) -> list[str]:
    with open(root / "data.csv", "w", newline="") as file:
        csv.writer(file).writerows([["img_name", "text"], *([name, "a beach"] for name in names)])
    return ["--source", "rs5m", "--csv", str(root / "data.csv")]


def write_precomp(root: Path, names: list[str]) -> list[str]:
    (root / "text").mkdir()
    (root / "text" / "test_filename.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "text" / "test_caps.txt").write_text("a beach\n" * len(names))
    return ["--source", "precomp", "--precomp", str(root / "text")]


def write_parquet(root: Path, names: list[str]) -> list[str]:
    table = pyarrow.table({"file_name": names, "caption": ["a beach"] * len(names)})
    pyarrow.parquet.write_table(table, root / "data.parquet")
    return ["--source", "parquet", "--parquet", str(root / "data.parquet")]


SOURCES = (write_karpathy, write_filepath, write_csv, write_rs5m, write_precomp, write_parquet)


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL.keys())
@pytest.mark.parametrize("write", SOURCES)
def test_evil_image_names_are_bad_records(write: Callable[[Path, list[str]], list[str]], name: str, root: Path) -> None:
    """They are counted and listed as missing files are; the good image is packed, nothing is read or executed."""
    name = name.replace("ROOT", str(root))
    options = write(root, ["good.jpg", name])
    output = root / "out"
    assert main(["pack", *options, "--images", str(root / "images"), "--output", str(output), "--workers", "1"]) == 0
    manifest = Manifest.load(output)
    assert manifest is not None
    assert manifest.samples == 1
    (bad,) = rows(output / "quarantine.jsonl")
    assert bad["reason"] in MISSING
    assert not (root / "executed").exists()


IMPOSSIBLE = {
    "a surrogate": "\ud800.jpg",
    "a byte that is no UTF-8": "\udcff.jpg",
    "9,000 characters": "a/" * 3000 + "b.jpg",
    "slashes": "/" * 50,
    "a file as folder": "good.jpg/x.jpg",
    "escapes": "\x1b[2J\n.jpg",
    "a wildcard": "*.jpg",
    "blank": " ",
}


@pytest.mark.parametrize("name", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
@pytest.mark.parametrize("field", ["filename", "filepath", "label", "split", "url", "raw"])
def test_one_impossible_text_costs_at_most_its_record(name: str, field: str, root: Path) -> None:
    """In packing, and in an evaluation that reads the annotation itself."""
    good = {"filename": "good.jpg", "split": "test", "sentences": [{"raw": "a beach"}], "label": "beach"}
    bad = {**good, "sentences": [{"raw": name}]} if field == "raw" else {**good, field: name}
    (root / "data.json").write_text(json.dumps({"images": [good, bad]}))
    words = ["--source", "karpathy", "--json", str(root / "data.json"), "--images", str(root / "images")]
    assert main(["pack", *words, "--output", str(root / "out"), "--workers", "1"]) == 0
    manifest = Manifest.load(root / "out")
    assert manifest is not None
    assert manifest.samples + (root / "out" / "quarantine.jsonl").read_bytes().count(b"\n") == 2
    assert manifest.samples >= 1
    records = RecordSet(karpathy(root / "data.json", root / "images"))
    assert records.read(0).captions == ["a beach"]
    with contextlib.suppress(BadSample):
        records.read(1)
    assert len(records.fingerprint) == 16


def test_a_refusal_says_which_name_and_why(root: Path) -> None:
    options = write_csv(root, ["good.jpg", "../secret.jpg"])
    assert main(["pack", *options, "--images", str(root / "images"), "--output", str(root / "out")]) == 0
    (bad,) = rows(root / "out" / "quarantine.jsonl")
    assert bad["reason"] == "refused file name"
    assert "'../secret.jpg' is refused because it leaves the folder" in bad["detail"]


def test_absolute_names_under_the_folder_are_read(root: Path) -> None:
    options = write_csv(root, [str(root / "images" / "good.jpg")])
    assert main(["pack", *options, "--images", str(root / "images"), "--output", str(root / "out")]) == 0
    assert not rows(root / "out" / "quarantine.jsonl")


def test_names_of_windows_are_read(root: Path) -> None:
    (root / "images" / "train").mkdir()
    (root / "images" / "train" / "beach_1.jpg").write_bytes(encoded(picture(3)))
    options = write_csv(root, ["train\\beach_1.jpg"])
    assert main(["pack", *options, "--images", str(root / "images"), "--output", str(root / "out")]) == 0
    assert not rows(root / "out" / "quarantine.jsonl")


@pytest.mark.parametrize("patch", ["../../secret_1_2", "ROOT/secret_1_2", "pipe:touch ROOT/executed_1_2"])
def test_evil_patches_of_bigearthnet_are_bad_records(patch: str, root: Path) -> None:
    patch = patch.replace("ROOT", str(root))
    band = Image.fromarray(np.full((8, 8), 900, np.uint16))
    for place in (root / "images" / "tile" / "tile_1_2", root / "secret_1_2"):
        place.mkdir(parents=True)
        for name in ("B04", "B03", "B02"):
            band.save(place / f"{place.name}_{name}.tif")
    table = pyarrow.table({"patch_id": ["tile_1_2", patch], "labels": [["Pastures"]] * 2})
    pyarrow.parquet.write_table(table, root / "metadata.parquet")
    words = ["--images", str(root / "images"), "--parquet", str(root / "metadata.parquet"), "--output", str(root / "o")]
    assert main(["pack", "--source", "bigearthnet", *words, "--workers", "1"]) == 0
    (bad,) = rows(root / "o" / "quarantine.jsonl")
    assert bad["reason"] == "refused file name"
    assert not (root / "executed").exists()


def test_evil_evaluation_images_are_unreadable(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image that cannot be compared ends the command, as a missing one does."""
    write_karpathy(root, ["good.jpg", "../secret.jpg"])
    words = ["--images", str(root / "images"), "--output", str(root / "out")]
    exclude = ["--exclude", str(root / "data.json"), "--exclude-images", str(root / "images")]
    assert main(["pack", "--source", "imagefolder", *words, *exclude]) == 2
    assert "1 of the 2 evaluation images" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["../../secret", "/ROOT/secret", "a/../../secret", "C:\\secret"])
def test_keys_of_tars_lead_nobody_out_of_a_folder(key: str, root: Path) -> None:
    """Somebody may unpack the tars that pack writes."""
    key = key.replace("/ROOT", str(root))
    write_tar(root / "in.tar", {f"{key}.jpg": encoded(picture(1)), f"{key}.txt": b"a beach"})
    words = ["--shards", str(root / "in.tar"), "--output", str(root / "out"), "--workers", "1"]
    assert main(["pack", "--source", "webdataset", *words]) == 0
    with tarfile.open(root / "out" / "shard-000000.tar") as tar:
        for name in tar.getnames():
            assert ".." not in name.split("/")
            assert not name.startswith(("/", "C:\\"))


# What pack, index and verify do in a folder of shards that somebody else made.

SYNTHETIC = ["pack", "--source", "synthetic", "--count", "4", "--size", "32", "--workers", "1"]
SHARDS = {
    "above": "../precious.tar",
    "far above": "../../precious.txt",
    "absolute": "ROOT/precious.tar",
    "the folder itself": ".",
    "a command": "pipe:touch ROOT/executed",
    "a URL": "http://127.0.0.1:9/a.tar",
    "no text": 7,
}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """home/data/theirs is a packed folder; precious files lie in the folders above."""
    theirs = tmp_path / "home" / "theirs"
    theirs.parent.mkdir()
    assert main([*SYNTHETIC, "--output", str(theirs)]) == 0
    for path in (tmp_path / "precious.txt", tmp_path / "precious.tar", tmp_path / "home" / "precious.tar"):
        path.write_text("precious")
    return theirs


def add_shard(folder: Path, **fields: object) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"].append({**content["shards"][0], **fields})
    path.write_text(json.dumps(content))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize(
    "words",
    [
        [*SYNTHETIC, "--overwrite", "--output", "THEIRS"],
        ["index", "THEIRS", "--overwrite"],
        ["verify", "THEIRS"],
        ["verify", "THEIRS", "--sizes"],
        ["stats", "THEIRS", "--output", "THEIRS/stats"],
        ["leakage", "THEIRS", "--exclude", "THEIRS"],
        ["pack", "--source", "webdataset", "--shards", "THEIRS", "--output", "THEIRS/out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_evil_shard_names_are_refused(
    words: list[str], name: object, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is read, written or removed, inside the folder or outside."""
    name = name.replace("ROOT", str(tmp_path)) if isinstance(name, str) else name
    add_shard(theirs, name=name)
    before = files_of(tmp_path)
    assert main([word.replace("THEIRS", str(theirs)) for word in words]) != 0
    assert files_of(tmp_path) == before
    assert "manifest.json" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["linked/precious.tar", "notes.txt", ".bashrc"])
def test_overwrite_removes_tars_of_the_folder_alone(name: str, theirs: Path, tmp_path: Path) -> None:
    (theirs / "linked").symlink_to(tmp_path)
    (theirs / "notes.txt").write_text("precious")
    (theirs / ".bashrc").write_text("precious")
    add_shard(theirs, name=name)
    before = files_of(tmp_path)
    assert main([*SYNTHETIC, "--overwrite", "--output", str(theirs)]) == 2
    assert files_of(tmp_path) == before


def test_overwrite_removes_a_link_and_not_what_it_names(theirs: Path, tmp_path: Path) -> None:
    for name in ("shard-000000.tar", "shard-000000.tar.idx", "quarantine.jsonl"):
        (theirs / name).unlink()
        (theirs / name).symlink_to(tmp_path / "precious.txt")
    assert main([*SYNTHETIC, "--overwrite", "--output", str(theirs)]) == 0
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert main(["verify", str(theirs)]) == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("link", [".pack", ".pack/prints"])
def test_pack_writes_through_no_link(
    link: str, overwrite: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = image_folder(tmp_path / "images", 4)
    words = ["pack", "--source", "imagefolder", "--images", str(images), "--duplicates", "drop", "--workers", "1"]
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "shard-000000.json").write_text("precious")
    (victim / "000000.npy").write_text("precious")
    place = tmp_path / "out" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(victim)
    before = files_of(victim)
    assert main([*words, "--output", str(tmp_path / "out"), *overwrite]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert files_of(victim) == before


@pytest.fixture
def half_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose only shard is done and whose manifest is not written yet."""
    folder = tmp_path / "half"
    with monkeypatch.context() as patch:
        patch.setattr("priorclip.data_shards.pack.unfinished_folder.Manifest.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*SYNTHETIC, "--output", str(folder)])
    return folder


def name_another_tar(text: str) -> str:
    return text.replace("shard-000000.tar", "../../precious.tar")


def cut_short(text: str) -> str:
    return text[:-5]


def of_another_type(text: str) -> str:
    return "[1, 2]"


def too_deep(text: str) -> str:
    return "[" * 100_000


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-000000.json", name_another_tar),
        *(
            (name, damage)
            for name in ("shard-000000.json", OPTIONS)
            for damage in (cut_short, of_another_type, too_deep)
        ),
    ],
)
def test_damaged_records_of_a_half_packed_folder_are_refused(
    name: str, damage: Callable[[str], str], half_packed: Path, capsys: pytest.CaptureFixture
) -> None:
    path = half_packed / ".pack" / name
    path.write_text(damage(path.read_text()))
    assert main([*SYNTHETIC, "--output", str(half_packed)]) == 2
    assert f"{name} is damaged" in capsys.readouterr().err
    assert not (half_packed / "manifest.json").exists()
    assert main([*SYNTHETIC, "--output", str(half_packed), "--overwrite"]) == 0


def test_overwrite_keeps_what_options_json_does_not_name(half_packed: Path) -> None:
    """``options.json`` in .pack is no shard: a tar of this name is the user's."""
    (half_packed / "options.tar").write_text("precious")
    assert main([*SYNTHETIC, "--output", str(half_packed), "--overwrite"]) == 0
    assert (half_packed / "options.tar").read_text() == "precious"


def test_hashes_of_images_are_never_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = image_folder(tmp_path / "images", 4)
    words = ["pack", "--source", "imagefolder", "--images", str(images), "--duplicates", "drop", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    fingerprint = json.loads((tmp_path / "out" / "manifest.json").read_text())["fingerprint"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out" / ".pack" / "prints").mkdir(parents=True)
    (tmp_path / "out" / ".pack" / OPTIONS).write_text(json.dumps({"fingerprint": fingerprint}))

    class Command:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = np.array([Command()], dtype=object)
    np.save(tmp_path / "out" / ".pack" / "prints" / "000000.npy", evil, allow_pickle=True)
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["stats.txt", "stats.json", "stats.png", "contact_sheet.png"])
def test_stats_writes_through_no_link(name: str, theirs: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / name).symlink_to(tmp_path / "precious.txt")
    assert main(["stats", str(theirs), "--output", str(output), "--workers", "1"]) == 0
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert not (output / name).is_symlink()
