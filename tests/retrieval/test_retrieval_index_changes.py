"""`retrieval add` and `remove`: the index that results is the one that would be made of the same images."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_galleries import TestSet, export_model

from priorclip.data_shards.__main__ import main as data_shards
from priorclip.retrieval import EmbeddingIndex, embedding_index
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.embedding_index import check_entry, write_folder
from priorclip.retrieval.places import PlaceColumns

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str | Path) -> int:
    return main([str(word) for word in words])


def make(test_set: TestSet, output: Path, *more: str | Path) -> Path:
    assert run("index", "--model", test_set.export, "--device", "cpu", "--output", output, *of(test_set), *more) == 0
    return output


def of(test_set: TestSet) -> list[str | Path]:
    return ["--data", test_set.json, "--images", test_set.images, "--batch_size", "4"]


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(test_set, tmp_path_factory.mktemp("whole") / "index")


def test_adding_the_rest_gives_the_whole_index(
    test_set: TestSet, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is not encoded again. An index that is open goes on with its own images."""
    index = make(test_set, tmp_path / "index", "--limit", "5")
    opened = EmbeddingIndex.load(index)
    old = opened.embeddings.clone()
    total = len(entries(whole))
    assert run("add", "--index", index, "--device", "cpu", *of(test_set)) == 0
    assert f"{index}: {total - 5} images added, 5 were there already" in capsys.readouterr().out
    assert entries(index) == entries(whole)
    found, expected = EmbeddingIndex.load(index), EmbeddingIndex.load(whole)
    assert torch.equal(found.embeddings[:5], old)
    torch.testing.assert_close(found.embeddings.float(), expected.embeddings.float(), atol=2e-3, rtol=0)
    assert len(opened) == 5
    assert torch.equal(opened.embeddings, old)
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    assert run("add", "--index", index, "--device", "cpu", *of(test_set)) == 0
    assert f"0 images added, {total} were there already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before


def test_removing_leaves_the_others_as_they_are(
    whole: Path, test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = make(test_set, tmp_path / "index")
    keys = [entry["key"] for entry in entries(index)]
    assert run("remove", "--index", index, "--image_keys", keys[1], keys[4]) == 0
    assert f"{index}: 2 images removed" in capsys.readouterr().out
    kept = [row for row in range(len(keys)) if row not in (1, 4)]
    assert entries(index) == [entries(whole)[row] for row in kept]
    assert torch.equal(EmbeddingIndex.load(index).embeddings, EmbeddingIndex.load(whole).embeddings[kept])


def test_places_are_added_and_removed(placed_index: Path, test_set: TestSet, tmp_path: Path) -> None:
    """An index of pictures without places gets tiles with places, and loses those of a scene."""
    index = make(test_set, tmp_path / "index")
    pictures = entries(index)
    assert run("add", "--index", index, "--device", "cpu", "--data", placed_index.parent / "tiles") == 0
    assert entries(index) == pictures + entries(placed_index)
    columns = EmbeddingIndex.load(index).columns
    alone = EmbeddingIndex.load(placed_index).columns
    assert columns is not None
    assert alone is not None
    assert columns.names == alone.names
    assert (columns.scene == [-1] * len(pictures) + alone.scene.tolist()).all()
    assert run("remove", "--index", index, "--scene", "fiji*", "--image_keys", "*") == 0
    assert entries(index) == pictures + [each for each in entries(placed_index) if each["place"]["scene"] != "fiji.tif"]
    assert "fiji.tif" not in EmbeddingIndex.load(index).columns.names  # type: ignore[union-attr]


def test_bad_images_are_left_out_and_listed(test_set: TestSet, tmp_path: Path) -> None:
    index = make(test_set, tmp_path / "index", "--limit", "3")
    good = Path(entries(index)[0]["path"])
    folder = tmp_path / "more" / "river"
    folder.mkdir(parents=True)
    (folder / "good.jpg").write_bytes(good.read_bytes())
    (folder / "bad.jpg").write_bytes(good.read_bytes()[:200])
    assert run("add", "--index", index, "--device", "cpu", "--data", tmp_path / "more") == 0
    about = json.loads((index / "index.json").read_text())
    assert [key for keys in about["skipped"].values() for key in keys] == ["river/bad"]
    assert about["images"] == 4
    assert about["data"] == f"{test_set.json}, {tmp_path / 'more'}"


def test_what_cannot_be_is_refused(
    whole: Path, test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = export_model(tmp_path / "other", ["a river", "a harbour"], seed=1)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    remove, add = ["remove", "--index", whole], ["add", "--index", whole, "--device", "cpu", *of(test_set)]
    cases: list[tuple[list[str | Path], str]] = [
        ([*remove, "--image_keys", "nobody"], "no image of the index"),
        ([*remove, "--image_keys", "*"], "are meant: remove the folder instead"),
        ([*remove, "--scene", "x"], "this index has no places"),
        (["remove", "--index", tmp_path / "none", "--image_keys", "a"], "is no image index"),
        ([*add, "--model", other], "other weights"),
        (["add", "--index", tmp_path / "none", *of(test_set)], "is no image index"),
    ]
    for words, message in cases:
        assert run(*words) == 2
        assert message in capsys.readouterr().err
    with open(whole.with_name(f".{whole.name}.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_again = ["index", "--model", test_set.export, "--output", whole, "--overwrite", "true", *of(test_set)]
        for words in ([*remove, "--image_keys", entries(whole)[0]["key"]], add, make_again):
            assert run(*words) == 2
            assert "another command changes the index" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("remove", "--index", whole)
    assert "say which images: by --image_keys, --shards, --bbox, --time or --scene" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_reader_gets_the_old_index_or_the_new_one(whole: Path, tmp_path: Path) -> None:
    """The index changes between 24 and 6 images as often as it can, while another process opens it."""
    index, count = tmp_path / "index", len(entries(whole))
    shutil.copytree(whole, index)
    look = f"""
import os, sys
from priorclip.retrieval import EmbeddingIndex
print(flush=True)
found = []
while not os.path.exists({str(tmp_path / "end")!r}):
    found.append(len(EmbeddingIndex.load({str(index)!r})))
print(len(found), *sorted(set(found)))
"""
    opened = EmbeddingIndex.load(whole)
    with subprocess.Popen(
        [sys.executable, "-c", look], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        for turn in range(60):
            size = (6, count)[turn % 2]
            about = opened.about | {"images": size}
            write_folder(index, about, opened.embeddings[:size], (opened.entry(row) for row in range(size)))
        (tmp_path / "end").touch()
        out, error = reader.communicate(timeout=60)
    assert reader.returncode == 0, error.decode()
    looks, *sizes = map(int, out.split())
    assert sizes == [6, count]
    assert looks > 10


def test_packed_shards_are_known_by_tar_and_row(test_set: TestSet, tmp_path: Path) -> None:
    index = make(test_set, tmp_path / "index", "--limit", "2")
    shards = tmp_path / "shards"
    words = ["pack", "--source", "karpathy", "--json", test_set.json, "--images", test_set.images, "--workers", "1"]
    assert data_shards([str(word) for word in [*words, "--output", shards]]) == 0
    for _ in range(2):  # the second time, all are there
        assert run("add", "--index", index, "--device", "cpu", "--data", shards) == 0
    places = [(each["shard"], each["sample"]) for each in entries(index)[2:]]
    assert len(places) == len(set(places)) > 2


def test_shards_are_removed_by_name(test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By file name, path or pattern, together with other conditions; images of files belong to no shard."""
    index = tmp_path / "index"
    data = ["--model", test_set.export, "--device", "cpu", "--data", test_set.shards]
    assert run("index", "--output", index, *data) == 0
    assert run("add", "--index", index, "--device", "cpu", "--limit", "2", *of(test_set)) == 0
    before = entries(index)
    assert run("remove", "--index", index, "--shards", "nothing.tar") == 2
    assert "no image of the index" in capsys.readouterr().err
    assert run("remove", "--index", index, "--shards", "*-000001.tar", test_set.shards / "test-000002.tar") == 0
    left = [each for each in before if not each.get("shard", "").endswith(("1.tar", "2.tar"))]
    assert entries(index) == left
    assert len(left) == 12
    assert run("remove", "--index", index, "--shards", "*", "--image_keys", left[0]["key"]) == 0
    assert entries(index) == left[1:]  # the same key of a file is still there
    assert any(each["key"] == left[0]["key"] for each in left[1:])


def test_lines_are_read_once_when_images_are_added_and_copied_when_some_are_removed(
    placed_index: Path, test_set: TestSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places are those that the lines say, in an index of pictures, tiles and pictures."""
    index = make(test_set, tmp_path / "index", "--limit", "3")
    assert run("add", "--index", index, "--device", "cpu", "--data", placed_index.parent / "tiles") == 0
    read: list[bytes] = []

    def counting(line: bytes, source: str) -> dict:
        read.append(line)
        return check_entry(line, source)

    monkeypatch.setattr(embedding_index, "check_entry", counting)
    assert run("add", "--index", index, "--device", "cpu", *of(test_set)) == 0
    assert len(read) == 15
    read.clear()
    assert run("remove", "--index", index, "--scene", "scene-000.tif") == 0
    assert not read
    columns = EmbeddingIndex.load(index).columns
    expected = PlaceColumns.of([each.get("place", {}) for each in entries(index)])
    assert columns is not None
    assert expected is not None
    assert columns.names == expected.names
    assert sorted(columns.names) == ["fiji.tif", "lost.tif", "scene-001.tif"]
    for name in ("bounds", "time", "scene"):
        np.testing.assert_array_equal(getattr(columns, name), getattr(expected, name))
        assert getattr(columns, name).dtype == getattr(expected, name).dtype


@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=5), max_size=4))
def test_joined_places_are_those_of_all_images(parts: list[list[str]]) -> None:
    places = [[{"scene": name, "acquired": "2024-06-02"} if name else {} for name in part] for part in parts]
    joined = PlaceColumns.joined([(PlaceColumns.of(part), len(part)) for part in places])
    expected = PlaceColumns.of([place for part in places for place in part])
    if expected is None or joined is None:
        assert joined is expected
        return
    assert joined.names == expected.names
    for name in ("bounds", "time", "scene"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(expected, name))
    rows = np.arange(len(expected.scene))[::2]
    picked = [place for part in places for place in part][::2]
    again = expected.part(rows)
    want = PlaceColumns.of(picked)
    found = PlaceColumns.joined([(again, len(rows))])
    assert (found is None) == (want is None)
    if found is not None and want is not None:
        assert found.names == want.names
        np.testing.assert_array_equal(found.scene, want.scene)
