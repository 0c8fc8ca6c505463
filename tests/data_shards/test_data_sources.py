"""Options of all sources, and records: size, places and keys."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import image_folder, write_tar
from source_packs import hugging_face, jpeg, refusal

from priorclip.data_shards import RecordSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources import (
    ImageFile,
    Record,
    load,
    rs5m,
    sample_key,
    webdataset,
)
from priorclip.data_shards.sources.catalogue import SOURCES
from priorclip.data_shards.sources.folder import imagefolder
from priorclip.data_shards.sources.parquet import parquet
from priorclip.data_shards.sources.record import join_sets


def test_options_of_another_source_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, tmp_path, "imagefolder", "--images", tmp_path, "--labels", "x.csv", "--count", "3")
    assert "--source imagefolder does not take --count, --labels; it takes: --images, --split" in said
    assert "--source rs5m needs --csv" in refusal(capsys, tmp_path, "rs5m", "--images", tmp_path)
    assert "karpathy, precomp, webdataset" in refusal(capsys, tmp_path, "laion")


def test_help_explains_every_source(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    text = capsys.readouterr().out
    for name, source in SOURCES.items():
        assert name in text
        for option in source.needs + source.takes:
            assert f"--{option}" in text.replace("-", "_").replace("__", "--")


def test_records_stay_small_and_plan_without_touching_images(tmp_path: Path) -> None:
    """Packing keeps five million records in memory, so a row like RS5M's may cost at most 700 bytes of Python."""
    table, count = tmp_path / "pub11.csv", 4000
    with open(table, "w") as file:
        file.write("img_name,text,url\n")
        for number in range(count):
            words = "aerial photograph of a harbour with ships and a long pier"
            file.write(f"pub11_{number:07d}.jpg,{words} {number},https://images.example.org/{number:07d}.jpg\n")
    tracemalloc.start()
    records = rs5m(table, "/no/such/folder")
    size = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert len(records) == count
    assert size < 700, f"{size:.0f} bytes a record"
    with pytest.raises(BadSample, match="missing file"):
        load(records[0])


def test_record_sets_read_every_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"k.jpg": jpeg(1), "k.txt": b"one"})
    hugging_face(tmp_path / "b.parquet", 2, 1, ["harbor"])
    image_folder(tmp_path / "c", 2)
    records = [*webdataset(str(tmp_path / "a.tar")), *parquet(tmp_path / "b.parquet"), *imagefolder(tmp_path / "c")]
    source = RecordSet(records)
    assert [source.read(i).image[:2] for i in range(5)] == [b"\xff\xd8"] * 5
    assert source.captions(0) == ["one"]
    assert source.captions(2) == ["caption 1", "second 1"]
    assert source.classes == ["airport", "beach", "harbor"]


def test_places_travel_to_worker_processes(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", 9, 2, ["harbor"])
    write_tar(
        tmp_path / "a.tar", {f"{i}.{end}": data for i in range(9) for end, data in (("jpg", jpeg(i)), ("txt", b"x"))}
    )
    for name, option in (("parquet", "a.parquet"), ("webdataset", "a.tar")):
        flag = "--parquet" if name == "parquet" else "--shards"
        packs = []
        for workers in ("1", "2"):
            out = tmp_path / f"{name}{workers}"
            words = ["--source", name, flag, str(tmp_path / option), "--output", str(out), "--workers", workers]
            assert main(["pack", *words, "--shard-size", "4"]) == 0
            packs.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
        assert packs[0] == packs[1]
        assert len(packs[0]) == 3


def test_places_are_named_without_their_folder() -> None:
    """The fingerprint of a pack contains ``repr``, which must not change if the data set moves."""
    assert repr(ImageFile("/here", "a/b.jpg")) == repr(ImageFile("/there", "a/b.jpg"))
    assert repr(ImageFile("/here", "a/b.jpg")) != repr(ImageFile("/here", "a/c.jpg"))


@given(st.lists(st.text("ab./\\ _", max_size=12), min_size=1, max_size=8))
def test_keys_stay_in_the_tar_and_sets_apart(names: list[str]) -> None:
    for name in names:
        key = sample_key(name)
        assert key
        assert ".." not in key.split("/")
        assert "." not in key.rsplit("/", 1)[-1]
        assert not key.startswith("/")
    random.Random(1).shuffle(names)
    groups = [
        [Record(sample_key(name), b"x", source=source) for name in dict.fromkeys(names)] for source in ("a", "a", "b")
    ]
    keys = [record.key.split("/")[0] for record in join_sets(groups)]
    assert Counter(keys) == dict.fromkeys(("a", "a-2", "b"), len(dict.fromkeys(names)))
