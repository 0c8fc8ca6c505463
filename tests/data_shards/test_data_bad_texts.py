"""Bad captions and labels are refused, odd but sound ones are read right (see bad_streams.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_streams import (
    among_sound,
    epoch_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import encoded, picture, write_tar

from priorclip.data_shards import BadSample
from priorclip.data_shards.format.sample import parse_text

pytestmark = pytest.mark.usefixtures("time_limit")


HUGE = b'{"captions": ["x"], "count": ' + b"9" * 5000 + b"}"


BAD_TEXTS = {
    "latin": ({"txt": "Flugh\xe4fen".encode("latin-1")}, "text is not UTF-8"),
    "blank": ({"txt": b" \n\t\0\0 "}, "no caption"),
    "none": ({}, "no caption"),
    "torn": ({"json": b'{"captions": ["a fie'}, "bad json"),
    "list": ({"json": b"[1, 2]"}, "bad json"),
    "deep": ({"json": b'{"captions": ' + b"[" * 100_000}, "bad json"),
    "huge": ({"json": HUGE}, "bad json"),
    "numbers": ({"json": b'{"captions": [1, 2]}'}, "bad json"),
    "object": ({"json": b'{"captions": {"a": "b"}}'}, "bad json"),
    "label": ({"json": b'{"captions": ["x"], "label": {"a": 1}}'}, "bad json"),
    "surrogate": ({"json": b'{"captions": ["x \\ud83d"]}'}, "text is not UTF-8"),
}


ODD_TEXTS: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "nan": ({"json": b'{"captions": ["x"], "width": NaN, "height": -Infinity}'}, ["x"]),
    "twice": ({"json": b'{"captions": ["x"], "captions": ["y"]}'}, ["y"]),
    "emoji": ({"txt": "\N{AIRPLANE} \N{DESERT}".encode()}, ["\N{AIRPLANE} \N{DESERT}"]),
    "arabic": ({"txt": "مطار كبير".encode()}, ["مطار كبير"]),
    "nul": ({"txt": b"a field\0\0"}, ["a field"]),
    "long": ({"txt": b"word " * 200_000}, [("word " * 200_000).strip()]),
}


def test_odd_and_bad_texts(words: object, tmp_path: Path) -> None:
    jpeg = encoded(picture(1))
    members: dict[str, bytes] = {}
    for name, (texts, _) in {**BAD_TEXTS, **ODD_TEXTS}.items():
        members |= {f"{name}.jpg": jpeg, **{f"{name}.{kind}": data for kind, data in texts.items()}}
    tar = write_tar(tmp_path / "a.tar", among_sound(members))
    epoch = epoch_of(tar, words, tmp_path)
    assert epoch.reasons == {name: reason for name, (_, reason) in BAD_TEXTS.items()}
    for name, (texts, expected) in ODD_TEXTS.items():
        assert parse_text(texts)[0] == expected, name


@settings(deadline=None)
@given(st.data())
def test_any_bytes_of_text_are_captions_or_bad(data: st.DataObject) -> None:
    whole = bytearray('{"captions": ["a \\u00e9 field", "é"], "label": "farm", "width": 3}'.encode())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    try:
        captions, label, _ = parse_text({"json": bytes(whole)})
    except BadSample:
        return
    assert all(text.strip() == text and text.encode() for text in captions)
    assert label is None or label.encode()
