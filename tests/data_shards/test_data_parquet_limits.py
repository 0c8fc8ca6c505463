"""Parquet files that ask for far more memory than their size, or are damaged: refused by name. Others are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import fuzz
from small_data import encoded, picture

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources import RecordSet
from priorclip.data_shards.sources.bigearthnet import bigearthnet
from priorclip.data_shards.sources.parquet import column_rows, parquet
from priorclip.data_shards.sources.record import load


def repeated(value: Any, count: int) -> pyarrow.DictionaryArray:
    """A column of one value, which stands once in the file."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([value]))


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", store_schema=False, **options)
    return path


READERS: dict[str, Callable[[Path], Any]] = {
    "records": lambda path: parquet(path, path.parent),
    "rows": lambda path: list(column_rows(path, ("image", "caption"))),
    "records without columns": lambda path: parquet(path, image_field="data", label_field="label"),
    "bigearthnet": lambda path: bigearthnet(path.parent, metadata=path),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_with_more_rows_than_bytes_is_refused(reader: str, tmp_path: Path) -> None:
    rows = 100_000
    columns = {name: repeated("a.jpg", rows) for name in ("image", "caption", "label", "patch_id", "labels")}
    path = write(tmp_path / "a.parquet", {**columns, "data": repeated(b"x", rows)})
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=rf"a\.parquet of \d+ bytes says that it has {rows} rows, which cannot be"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", ["records", "rows", "bigearthnet"])
def test_texts_that_would_fill_the_memory_are_refused(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 rows of one text of 1 MB, at a smaller limit."""
    monkeypatch.setattr("priorclip.data_shards.sources.parquet_limits.TEXTS", 16 << 20)
    monkeypatch.setattr("priorclip.data_shards.sources.parquet_limits.AT_ONCE", 8 << 20)
    rows = 3_000
    columns = {name: repeated("x" * (1 << 20), rows) for name in ("caption", "labels")}
    names = [f"{os.urandom(8).hex()}_{row}.jpg" for row in range(rows)]
    path = write(tmp_path / "a.parquet", {**columns, "image": names, "patch_id": names})
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"a\.parquet is refused because its texts take more than \d+ MB"):
        READERS[reader](path)


@pytest.mark.parametrize("honest", [True, False])
def test_images_that_would_fill_the_memory_are_bad_samples(
    honest: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the size that the row group says, and by that of the images if it says a smaller one."""
    monkeypatch.setattr("priorclip.data_shards.sources.parquet_limits.MAX_GROUP", 1 << 20)
    if not honest:
        monkeypatch.setattr("priorclip.data_shards.sources.parquet_limits.said_size", lambda *_: 0)
    image, good = {"bytes": bytes(100_000), "path": None}, {"bytes": encoded(picture(1)), "path": None}
    columns = {"image": [image] * 20 + [good] * 20, "caption": [f"a pond {row}" for row in range(40)]}
    path = write(tmp_path / "a.parquet", columns, row_group_size=20, use_dictionary=False)
    records = parquet(path)
    with pytest.raises(BadSample, match=r"row group 0: its images are [12] MB or more together, limit 1 MB"):
        load(records[0])
    assert load(records[39]).image == good["bytes"]


def test_one_text_that_is_not_utf_8_costs_its_record(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a pond", b"a \xff pond", b"a lake"], pyarrow.binary()).view(pyarrow.string())
    lists = pyarrow.ListArray.from_arrays([0, 1, 2, 3], texts)
    for column in (texts, lists):
        path = write(tmp_path / "a.parquet", {"image": [encoded(picture(n)) for n in range(3)], "caption": column})
        records = RecordSet(parquet(path))
        assert [records.read(sample).captions for sample in (0, 2)] == [["a pond"], ["a lake"]]
        with pytest.raises(BadSample, match="text is not UTF-8"):
            records.read(1)


@pytest.mark.parametrize("value", [7, 1.5, True, b"x", [1], {"a": 1}])
def test_a_column_of_another_kind_is_no_text(value: Any, tmp_path: Path) -> None:
    columns = {name: [value] for name in ("caption", "split", "url", "status")}
    path = write(tmp_path / "a.parquet", {"image": [encoded(picture(1))], **columns, "label": ["pond"]})
    (record,) = parquet(path)
    assert (record.captions, record.split, record.url, record.label) == ([], None, None, "pond")


@fuzz
@given(places=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_damage_is_named(tmp_path: Path, places: list[tuple[int, int]]) -> None:
    """Counted from the end, where the sizes are."""
    path = tmp_path / "a.parquet"
    images = [{"bytes": encoded(picture(n)), "path": None} for n in range(6)]
    if not (tmp_path / "good").exists():
        columns = {"image": images, "caption": [["a pond", "b"]] * 6, "label": ["x", "y", "z"] * 2}
        (tmp_path / "good").write_bytes(write(path, columns, row_group_size=3).read_bytes())
    data = bytearray((tmp_path / "good").read_bytes())
    for place, value in places:
        data[max(0, len(data) - 1 - place)] = value
    path.write_bytes(data)
    said: list[str] = []
    try:
        for record in parquet(path):
            try:
                load(record)
            except BadSample as error:
                said.append(error.detail)
    except ValueError as error:
        said.append(str(error))
    assert all(text.startswith(str(path)) for text in said)


@pytest.mark.parametrize("labels", [7, "pond", None, b"x", {"a": 1}, [1, None]])
def test_a_table_of_bigearthnet_with_labels_of_another_kind_has_none(labels: Any, tmp_path: Path) -> None:
    when = datetime(2020, 6, 4)
    write(
        tmp_path / "metadata.parquet", {"patch_id": ["a_1_2"], "labels": [labels], "split": [when], "country": [when]}
    )
    (record,) = bigearthnet(tmp_path)
    assert (record.scenes, record.split, record.extra) == ([], None, {})
