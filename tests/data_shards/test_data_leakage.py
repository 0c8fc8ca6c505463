"""Evaluation images in the training data: excluded, reported, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from duplicate_images import photograph
from PIL import Image
from small_data import encoded, rows

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Writes training images. Two are of an annotation's test split; one of these is turned and re-encoded."""
    train, test = tmp_path / "train" / "any", tmp_path / "test"
    train.mkdir(parents=True)
    test.mkdir()
    for seed in range(6):
        (train / f"t{seed}.jpg").write_bytes(encoded(photograph(seed)))
    for seed in (10, 11, 12):
        (test / f"e{seed}.jpg").write_bytes(encoded(photograph(seed), quality=90))
    (train / "same.jpg").write_bytes((test / "e10.jpg").read_bytes())
    turned = photograph(11).transpose(Image.Transpose.ROTATE_90).resize((140, 140))
    (train / "turned.jpg").write_bytes(encoded(turned, quality=50))
    (train / "trained.jpg").write_bytes((test / "e12.jpg").read_bytes())
    entries = [
        {"filename": f"e{seed}.jpg", "split": "train" if seed == 12 else "test", "sentences": [{"raw": "x"}]}
        for seed in (10, 11, 12)
    ]
    (tmp_path / "test.json").write_text(json.dumps({"dataset": "made", "images": entries}))
    return tmp_path


def test_exclude_leaves_out_and_reports(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    source = f"pack --source imagefolder --images {corpus / 'train'} --no-shuffle --workers 1".replace(
        "--no-shuffle", "--shuffle=false"
    )
    exclude = f"--exclude {corpus / 'test.json'} --exclude-images {corpus / 'test'}"
    leaking, clean = corpus / "leaking", corpus / "clean"
    assert main(f"{source} --output {leaking}".split()) == 0
    assert main(f"{source} --output {clean} {exclude}".split()) == 0
    printed = capsys.readouterr().out
    assert "excluded as images of the evaluation: 1 x exact, 1 x near" in printed
    found = rows(clean / "excluded.jsonl")
    assert [(row["key"], row["evaluation"], row["kind"], row["transformation"]) for row in found] == [
        ("any/same", "e10", "exact", "none"),
        ("any/turned", "e11", "near", "rotated by 90 degrees"),
    ]
    assert Manifest.load(clean).excluded == {"exact": 1, "near": 1}
    shards = ShardSet(str(clean))
    assert [shards.key(place) for place in range(len(shards))] == [f"any/t{n}" for n in range(6)] + ["any/trained"]

    before = {path: path.read_bytes() for path in leaking.iterdir()}
    assert main(f"leakage {leaking} {exclude} --workers 1".split()) == 1
    printed = capsys.readouterr().out
    assert [json.loads(line[5:])["key"] for line in printed.splitlines() if line.startswith("LEAK ")] == [
        "any/same",
        "any/turned",
    ]
    assert {path: path.read_bytes() for path in leaking.iterdir()} == before
    assert main(f"leakage {clean} {exclude} --workers 1".split()) == 0
    assert main(f"leakage {clean} {exclude} --exclude-split all --workers 1".split()) == 1
    assert main(f"leakage {leaking} {exclude} --exclude-distance null --workers 1".split()) == 1
    assert "any/turned" not in capsys.readouterr().out.splitlines()[-2]


def test_several_sets_are_a_list_or_stand_between_commas(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder whose name has a comma is one set."""
    (corpus / "test").rename(corpus / "a, b")
    nothing = corpus / "nothing"
    nothing.mkdir()
    shutil.copy(corpus / "train" / "any" / "t0.jpg", nothing / "x.jpg")
    source = f"pack --source imagefolder --images {corpus / 'train'} --workers 1 --output".split()
    for output, words in {
        "list": ["--exclude", json.dumps([str(corpus / "a, b"), str(nothing)])],
        "one": ["--exclude", str(corpus / "a, b")],
        "commas": ["--exclude", f"{nothing},{nothing}"],
    }.items():
        assert main([*source, str(corpus / output), *words]) == 0
        found = {row["key"] for row in rows(corpus / output / "excluded.jsonl")}
        others = {"any/same", "any/turned", "any/trained"} if output != "commas" else set()
        assert found == others | ({"any/t0"} if output != "one" else set())
    capsys.readouterr()
    assert main(["leakage", str(corpus / "list"), "--exclude", json.dumps([str(nothing), str(corpus / "a, b")])]) == 0
    assert f"0 show images of {nothing}, {corpus / 'a, b'}" in capsys.readouterr().out


def test_packed_shards_and_folders_are_evaluation_sets(corpus: Path) -> None:
    evaluated = corpus / "evaluated"
    assert main(f"pack --source imagefolder --images {corpus / 'test'} --output {evaluated} --workers 1".split()) == 0
    for name, output in ((evaluated, "a"), (corpus / "test", "b")):
        command = f"pack --source imagefolder --images {corpus / 'train'} --exclude {name} --output {corpus / output}"
        assert main([*command.split(), "--workers", "1"]) == 0
        found = {row["key"]: row["evaluation"] for row in rows(corpus / output / "excluded.jsonl")}
        assert found == {"any/same": "e10", "any/turned": "e11", "any/trained": "e12"}


def test_unreadable_evaluation_images_are_an_error(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    source = f"pack --source imagefolder --images {corpus / 'train'} --output {corpus / 'o'} --workers 1"
    exclude = f"--exclude {corpus / 'test.json'} --exclude-images {corpus / 'test'}"
    (corpus / "test" / "e11.jpg").unlink()
    assert main(f"{source} {exclude}".split()) == 2
    assert "1 of the 2 evaluation images" in (said := capsys.readouterr().err)
    assert "e11" in said
    assert main(f"{source} {exclude} --exclude-split val".split()) == 2
    assert "--exclude-split to one of test, train" in capsys.readouterr().err
    assert not (corpus / "o").exists()


def test_everything_excluded_is_an_error(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    train = corpus / "train"
    command = f"pack --source imagefolder --images {train} --exclude {train} --output {corpus / 'o'} --workers 1"
    assert main(command.split()) == 2
    assert "all show evaluation images" in capsys.readouterr().err
