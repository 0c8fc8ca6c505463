"""SkyScript as published: CSV, images2 ..., and pickles with box, time and tags, of which nothing is executed."""

from __future__ import annotations

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_packs import jpeg, packed, reasons, refusal, samples

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.place import bounds
from priorclip.data_shards.sources.plain_pickle import plain_pickle
from priorclip.data_shards.sources.skyscript import meta_facts

META = {
    "box": (7.40, 46.90, 7.41, 46.91),
    "time": (2019, 7, 1, 10, 30),
    "center_tags": {"landuse": "farmland", "crop": "wheat"},
    "surrounding_tags": [{"highway": "track"}, {"natural": "water"}],
}
NAMES = [
    "images2/a198234555_CH_19.jpg",
    "images2/w7_US_21.jpg",
    "images3/n3_S2_20.jpg",
    "images2/lost_US_20.jpg",
    "images2/n9_L8_16.jpg",
]


class Evil:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    root = tmp_path / "SkyScript"
    for folder in ("images2", "images3", "meta2"):
        (root / folder).mkdir(parents=True)
    lines = ["filepath,title,title_multi_objects"]
    for number, name in enumerate(NAMES):
        (root / name).write_bytes(jpeg(number))
        multi = f'"field {number}, surrounded by roads"' if number != 1 else ""
        lines.append(f"{name},field {number},{multi}")
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    (root / "meta2/a198234555_CH_19.pickle").write_bytes(pickle.dumps(META))
    (root / "meta2/w7_US_21.pickle").write_bytes(pickle.dumps({**META, "box": None, "surrounding_tags": []}))
    (root / "meta2/n9_L8_16.pickle").write_bytes(pickle.dumps({**META, "time": Evil(tmp_path / "executed")}))
    return root


def test_the_release(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    found = samples(packed(tmp_path, "skyscript", "--csv", release / "train.csv", "--images", release))
    assert list(found) == ["images2/a198234555_CH_19", "images2/w7_US_21", "images3/n3_S2_20"]
    first = found["images2/a198234555_CH_19"]
    assert first.image == jpeg(0)
    assert first.captions == ["field 0", "field 0, surrounded by roads"]
    assert bounds(first.info["footprint"]) == META["box"]
    assert first.info["acquired"] == "2019-07-01T10:30:00"
    assert first.info["kept_columns"] == {"osm_object": "a198234555", "image_source": "CH", "year": 2019}
    assert first.info["center_tags"] == META["center_tags"]
    assert first.info["surrounding_tags"] == META["surrounding_tags"]
    assert first.info["source"] == "skyscript"
    second = found["images2/w7_US_21"]
    assert second.captions == ["field 1"]
    assert ("footprint" in second.info, second.info["acquired"]) == (False, "2019-07-01T10:30:00")
    third = found["images3/n3_S2_20"].info  # without meta3
    assert third["kept_columns"]["year"] == 2020
    assert not {"footprint", "acquired", "center_tags"} & set(third)
    assert "has no folder meta3, so its images get no box and no time" in caplog.text
    assert reasons(tmp_path) == {"images2/lost_US_20": "missing meta file", "images2/n9_L8_16": "bad meta file"}
    assert not (tmp_path / "executed").exists()
    assert main(["verify", str(tmp_path / "shards")]) == 0
    assert "--source skyscript needs --csv" in refusal(capsys, tmp_path, "skyscript", "--images", release)


def test_one_column_and_kept_columns(release: Path, tmp_path: Path) -> None:
    words = ["--csv", release / "train.csv", "--images", release, "--caption-field", "title"]
    found = samples(packed(tmp_path, "skyscript", *words, "--keep-columns", "multi=title_multi_objects"))
    first = found["images2/a198234555_CH_19"]
    assert first.captions == ["field 0"]
    assert first.info["kept_columns"]["multi"] == "field 0, surrounded by roads"
    assert first.info["kept_columns"]["year"] == 2019


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=4) | st.tuples(part, part) | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_of_every_protocol(value: object, protocol: int) -> None:
    assert plain_pickle(pickle.dumps(value, protocol)) == value


def test_other_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "made"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(ValueError, match="no pickle of plain values: it has the opcode"):
            plain_pickle(pickle.dumps([Evil(path)], protocol))
    for value in (OrderedDict(a=1), np.float64(7.4), {1, 2}, b"bytes", Path("x")):
        with pytest.raises(ValueError, match="it has the opcode"):
            plain_pickle(pickle.dumps(value, 4))
    assert not path.exists()
    for data, said in (
        (b"", "no pickle of plain values"),
        (b"not a pickle", "no pickle of plain values"),
        (pickle.dumps(META)[:-9], "no pickle of plain values"),
        (b"Nr" + struct.pack("<I", 0xFFFFFFFF) + b".", "numbers more values than it can hold"),  # would take 64 GB
        (b"N(.", "no pickle of plain values"),
        (b"I" + b"9" * 5000 + b"\n.", "no pickle of plain values"),
    ):
        with pytest.raises(ValueError, match=said):
            plain_pickle(data)


def test_meta_files_of_the_wrong_kind() -> None:
    laughs: object = "ha"
    for _ in range(100):
        laughs = [laughs, laughs]  # 2^100 items, in a pickle of 500 bytes
    shared = {"key": "x" * 1000}
    for change, said in (
        ({"box": laughs}, "'box' must be 4 numbers"),
        ({"box": (1, 2, 3)}, "'box' must be 4 numbers"),
        ({"box": (7, 95, 8, 96)}, "a latitude of -90 to 90 degrees was expected, not 95"),
        ({"box": (7, 46, 7, 47)}, "with an area"),
        ({"time": (2019, 2, 30, 0, 0)}, "'time' is no time"),
        ({"time": (10**30, 1, 1, 1, 1)}, "'time' is no time"),
        ({"time": "2019"}, "'time' must be 5 numbers"),
        ({"center_tags": laughs}, "'center_tags' must have a text for each tag"),
        ({"surrounding_tags": laughs}, "'surrounding_tags' must have a text for each tag"),
        ({"surrounding_tags": [shared] * 2000}, "its tags have more than"),
        ({"surrounding_tags": 7}, "'surrounding_tags' must be a list"),
    ):
        with pytest.raises(ValueError, match=said):
            meta_facts(pickle.dumps({**META, **change}))
    with pytest.raises(ValueError, match="an object with 'box' and 'time'"):
        meta_facts(pickle.dumps([1]))
    assert meta_facts(pickle.dumps({})) == {}
