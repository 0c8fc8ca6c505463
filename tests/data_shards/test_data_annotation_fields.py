"""Values of the wrong kind, and files of other programs: read, or an error that names file, entry and field."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import fuzz, replaced
from small_data import encoded, picture

from priorclip.data_shards.sources import csv, karpathy
from priorclip.data_shards.sources.bigearthnet import METADATA, bigearthnet
from priorclip.data_shards.sources.fmow import fmow
from priorclip.data_shards.sources.record import Record

PYTHON = re.compile(
    r"indices must be|unsupported operand|NoneType|has no attribute|not iterable|not subscriptable|unpack|Error\("
    r"|could not convert|not supported between|unhashable|object is not|keyword argument"
)
ENTRY = {
    "filename": "a.png",
    "split": "train",
    "sentences": [{"raw": "a pond", "tokens": ["a", "pond"]}],
    "label": "pond",
}


def readable(read: Callable[[], list[Record]], path: Path) -> list[Record]:
    """Returns the records, or [] after an error that names the file and has no phrase of Python's."""
    try:
        return read()
    except ValueError as error:
        said = str(error)
    assert said.startswith(str(path))
    assert not PYTHON.search(said)
    return []


@fuzz
@given(draw=st.data())
def test_any_value_in_a_karpathy_json_is_read_or_named(tmp_path: Path, draw: st.DataObject) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(replaced(draw, {"images": [ENTRY, ENTRY], "dataset": "x"})))
    for record in readable(lambda: karpathy(path, tmp_path), path):
        assert all(isinstance(text, str) and text for text in record.captions)
        assert isinstance(record.label, str | None)


@fuzz
@given(draw=st.data())
def test_any_value_in_an_fmow_json_is_read_or_named(tmp_path: Path, draw: st.DataObject) -> None:
    (tmp_path / "a_rgb.jpg").touch()
    path = tmp_path / "a_rgb.json"
    box = {"ID": 3, "box": [1, 2, 3.5, 4], "category": "pond"}
    path.write_text(json.dumps(replaced(draw, {"bounding_boxes": [box, box], "gsd": 0.5})))
    for record in readable(lambda: fmow(tmp_path, crop_margin=0.1), path):
        assert all(isinstance(side, float) for side in record.image.box)  # type: ignore[union-attr]


@fuzz
@given(draw=st.data())
def test_any_value_in_a_bigearthnet_json_is_read_or_named(tmp_path: Path, draw: st.DataObject) -> None:
    path = tmp_path / "p" / f"p{METADATA}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(replaced(draw, {"labels": ["pond", "field"], "tile_source": "x"})))
    for record in readable(lambda: bigearthnet(tmp_path), path):
        assert all(isinstance(label, str) for label in record.scenes)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": ' + "[" * 100_000, '{"images": [1e', "\udcff", ""])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"set\.json is not JSON"):
        karpathy(path, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"filename": 815}, "entry 2 of 'images': 'filename' must be text, not 815"),
        ({"sentences": "a pond"}, "entry 2 of 'images': 'sentences' must be a list, not \"a pond\""),
        ({"sentences": [{"raw": ["a"]}]}, "entry 2 of 'images', sentence 1: 'raw' must be text, not [\"a\"]"),
        ({"sentences": [3]}, "entry 2 of 'images', sentence 1 must be an object with 'raw', not 3"),
        ({"label": ["a", "b"]}, "entry 2 of 'images': 'label' must be text, not [\"a\", \"b\"]"),
    ],
)
def test_the_message_has_entry_and_field(tmp_path: Path, change: dict, said: str) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"images": [ENTRY, {**ENTRY, **change}]}))
    with pytest.raises(ValueError, match=re.escape(said)):
        karpathy(path, tmp_path)


@pytest.mark.parametrize("sentences", [["a pond", {"raw": "water"}], [{"tokens": ["a", "pond"]}, {"raw": " water "}]])
def test_sentences_may_be_texts_or_tokens(tmp_path: Path, sentences: list) -> None:
    (tmp_path / "set.json").write_text(json.dumps({"images": [{**ENTRY, "sentences": sentences}]}))
    assert karpathy(tmp_path / "set.json", tmp_path)[0].captions == ["a pond", "water"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tables_of_other_programs_are_read(tmp_path: Path, encoding: str, separator: str, newline: str) -> None:
    """Captions may hold every other separator; the separator of the file needs quotation marks."""
    texts = ["a pier, with ships; and more | \tmore", "Häuser"]
    lines = [["filepath", "title"], ["a_0.png", f'"{texts[0]}"'], ["a_1.png", texts[1]]]
    data = newline.join(separator.join(line) for line in lines).encode(encoding)
    assert encoding != "utf-16" or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    (tmp_path / "a.csv").write_bytes(data)
    found = csv(tmp_path / "a.csv", tmp_path)
    assert [(record.key, record.captions) for record in found] == [("a_0", [texts[0]]), ("a_1", [texts[1]])]


@pytest.mark.parametrize("end", [b"x", b"\x00\xd8\n\x00"])
def test_a_damaged_table_in_utf_16_is_named(end: bytes, tmp_path: Path) -> None:
    """Cut amid a letter, and half of a surrogate pair."""
    path = tmp_path / "a.csv"
    path.write_bytes("filename,caption\na.png,a pond\nb.png,".encode("utf-16") + end)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged: .*Save it as UTF-8"):
        csv(path, tmp_path)


def test_a_named_column_decides_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("filepath;words, all of them\na.png;a pond\n")
    assert csv(tmp_path / "a.csv", tmp_path, caption_field=["words, all of them"])[0].captions == ["a pond"]


def test_unknown_columns_are_listed_with_the_separators(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("place:words\na.png:a pond\n")
    with pytest.raises(ValueError, match=r"it has: place:words\. A comma, a tab, a semicolon or a bar"):
        csv(tmp_path / "a.csv", tmp_path)


def test_a_long_caption_costs_nothing_and_a_missing_quotation_mark_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("filepath,title\na_0.png," + "w " * 1_000_000 + "\na_1.png,a pond\n")
    assert [len(record.captions[0]) for record in csv(path, tmp_path)] == [1_999_999, 6]
    monkeypatch.setattr("priorclip.data_shards.sources.table.MAX_FIELD", 100)
    path.write_text('filepath,title\na_0.png,"a pond\n' + "a_1.png,a field\n" * 50)
    with pytest.raises(ValueError, match=r"a\.csv, line \d+: .*Is a quotation mark missing\?"):
        csv(path, tmp_path)


@pytest.mark.parametrize(
    "name", ["train\\pond_2.png", "train/pond_2.png", ".\\train\\pond_2.png", "D:train\\pond_2.png"]
)
def test_names_of_windows_have_the_scene_and_the_key_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "pond_2.png").write_bytes(encoded(picture(1)))
    entry = {"filename": name, "sentences": [{"raw": "a pond"}]}
    (tmp_path / "set.json").write_text(json.dumps({"images": [entry]}))
    (record,) = karpathy(tmp_path / "set.json", tmp_path)
    if name.startswith("D:"):
        assert record.path is None  # a drive is no folder of ours
        return
    assert (record.key, record.label) == ("train/pond_2", "pond")
    for listed in ("train/pond_2.png", "train\\pond_2.png", "pond_2.png"):
        (tmp_path / "labels.csv").write_text(f"filename,label\n{listed},lake\n")
        assert karpathy(tmp_path / "set.json", tmp_path, labels=tmp_path / "labels.csv")[0].label == "lake"
    assert record.path == tmp_path / "train" / "pond_2.png"
