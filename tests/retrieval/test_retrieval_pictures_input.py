"""`retrieval pictures` on odd input: hostile text, unreadable images, models without a prior, wrong options."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from picture_calls import config, export
from PIL import Image
from small_galleries import TestSet, write_karpathy

from priorclip.common.files import write_bytes
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.pictures.draw import draw_pictures
from priorclip.retrieval.pictures.material import short_names
from priorclip.retrieval.pictures.plain import printable


def test_a_model_without_prior_has_no_belief_map(test_set: TestSet, tmp_path: Path, capsys) -> None:
    plain = export(test_set, tmp_path / "plain", 0, kind="clip")
    words = ["pictures", "--model", str(plain), "--data", str(test_set.shards), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "all")]) == 0
    assert f"belief is left out: the model in {plain} has no scene prior" in capsys.readouterr().out
    assert sorted(path.stem for path in (tmp_path / "all").glob("*.png")) == ["panel", "scenes", "tsne"]
    assert main([*words, "--output", str(tmp_path / "one"), "--only", "belief"]) == 2
    assert (
        one_error(capsys) == f"retrieval pictures: error: the model in {plain} has no scene prior, so it has no belief"
    )


HOSTILE = ("$\\frac{$ a_b^ {x}", "船 🚢 \u202e\u0007 \x1b[31mred", "x" * 5000, "a\nb\tc \x00", "é" * 40)


def test_hostile_captions_and_scenes_are_drawn_as_they_stand(test_set: TestSet, tmp_path: Path) -> None:
    scenes = ("_hidden$", "$\\frac{", "船 🚢", "a" * 200)
    entries = []
    for number, entry in enumerate(test_set.entries()[:24]):
        name = f"{scenes[number % 4]}/{number}.png"
        write_bytes_under(tmp_path / "images" / name, (test_set.images / entry["filename"]).read_bytes())
        sentences = [{"raw": HOSTILE[(number + n) % len(HOSTILE)]} for n in range(2)]
        entries.append({"filename": name, "split": "test", "sentences": sentences, "label": scenes[number % 4]})
    data = str(write_karpathy(tmp_path / "hostile.json", entries))
    report = draw_pictures(config(test_set, tmp_path / "out", data=data, images=str(tmp_path / "images")))
    assert {row["scene"] for row in report["pictures"]["scenes"]["scenes"]} == set(scenes)
    for name in ("tsne", "panel", "belief", "scenes"):
        assert Image.open(tmp_path / "out" / f"{name}.png").size[0] < 3000, name


def write_bytes_under(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


@pytest.mark.parametrize("text", [*HOSTILE, "half \ud83d of a pair", "", "\u2028 \u0085"])
def test_printable_text_is_one_line_that_fonts_take(text: str) -> None:
    shown = printable(text)
    assert len(shown) <= 300
    assert all(letter.isprintable() for letter in shown)
    shown.encode("utf-8")
    for word in ("船", "🚢", "half", "of a pair", "red", "$\\frac{$"):
        assert (word in text) <= (word in shown)


def test_an_unreadable_image_is_no_query(test_set: TestSet, tmp_path: Path, capsys) -> None:
    shutil.copytree(test_set.images, tmp_path / "images")
    for number in range(1, 24, 4):
        (tmp_path / "images" / "river" / f"river_{number}.png").write_bytes(b"no image")
    asked = config(test_set, tmp_path / "out", images=str(tmp_path / "images"), count=24, only="panel,belief")
    found = draw_pictures(asked)["pictures"]
    for rows in (found["panel"]["queries"], found["belief"]["images"]):
        assert len({row["image"] for row in rows}) == 18
        assert not [row["image"] for row in rows if row["image"].startswith("river")]
    for only in ("panel", "belief"):
        words = ["--images", str(tmp_path / "images"), "--only", only, "--queries", "river/river_1", "--device", "cpu"]
        words += ["--model", str(test_set.export), "--data", str(test_set.json), "--output", str(tmp_path / "bad")]
        assert main(["pictures", *words]) == 2
        assert "river" in one_error(capsys), only


def one_error(capsys) -> str:
    """The only line of stderr that begins with the command."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retrieval pictures: ")]
    return line


def test_bad_input_is_one_line_and_exit_code_2(test_set: TestSet, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    flat = [entry | {"filename": f"{number}.png"} for number, entry in enumerate(test_set.entries()[:4])]
    for entry, full in zip(flat, test_set.entries(), strict=False):
        write_bytes_under(tmp_path / "flat" / entry["filename"], (test_set.images / full["filename"]).read_bytes())
    no_scene = str(write_karpathy(tmp_path / "flat.json", flat))
    cases = [
        (("--output", str(tmp_path / "file")), ("--output", "is a file")),
        (("--model", str(tmp_path)), ("no export folder",)),
        (("--other", str(tmp_path / "none"), "--only", "scenes"), ("none",)),
        (("--data", str(tmp_path / "none.json")), ("none.json", "does not exist")),
        (("--only", "panel", "--queries", "river/river_99"), ("--queries river/river_99", "no image has this key")),
        (("--only", "belief", "--k", "5"), ("--k 5", "has 4 visual tokens")),
        (("--only", "tsne", "--limit", "2"), ("at least 3 images", "has 2")),
        (("--only", "scenes", "--data", no_scene, "--images", str(tmp_path / "flat")), ("has a scene",)),
    ]
    usual = {
        "--model": str(test_set.export), "--data": str(test_set.json), "--images": str(test_set.images),
        "--output": str(tmp_path / "out"), "--device": "cpu",
    }  # fmt: skip
    for words, expected in cases:
        options = usual | dict(zip(words[::2], words[1::2], strict=True))
        assert main(["pictures", *(word for pair in options.items() for word in pair)]) == 2, words
        message = one_error(capsys)
        assert "error: " in message
        for part in expected:
            assert part in message, (words, message)
    for option, value, part in (
        ("--only", "tsne,maps", "'maps' is no picture; the pictures are tsne, panel, belief, scenes"),
        ("--only", ",", "--only is empty"),
        ("--sample", "2", "--sample must be between 3"),
        ("--count", "0", "--count must be between 1"),
        ("--seed", "-1", "--seed must be between 0"),
        ("--k", "0", "--k must be between 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["pictures", *(word for pair in (usual | {option: value}).items() for word in pair)])
        assert part in capsys.readouterr().err


def test_names_of_models_differ() -> None:
    assert short_names(["/a/soft/export"]) == ["soft/export"]
    assert short_names(["/a/soft/run/export", "/a/hard/run/export"]) == ["soft/run/export", "hard/run/export"]
    assert short_names(["/a/export", "/a/export"]) == ["/a/export", "/a/export"]
