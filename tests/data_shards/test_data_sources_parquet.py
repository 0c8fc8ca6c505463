"""Parquet files as sources: columns, labels, failed rows and the order of reading."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from source_packs import hugging_face, jpeg, packed, reasons, refusal, samples

from priorclip.data_shards.sources import (
    load,
)
from priorclip.data_shards.sources.catalogue import shuffled
from priorclip.data_shards.sources.parquet import parquet


def test_parquet_as_hugging_face_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    hugging_face(data / "train-00000-of-00002.parquet", 7, 3, ["harbor", "lake"])
    hugging_face(data / "train-00001-of-00002.parquet", 2, 3, ["harbor", "lake"])
    hugging_face(data / "test-00000-of-00001.parquet", 1, 3, ["harbor", "lake"])
    found = samples(packed(tmp_path, "parquet", "--parquet", data, "--split", "train"))
    assert len(found) == 9
    assert found["train-00000-of-00002/00000004"].image == jpeg(4)
    assert found["train-00000-of-00002/00000004"].captions == ["caption 4", "second 4"]
    assert [sample.label for sample in found.values()][:3] == [None, "harbor", "lake"]
    said = refusal(capsys, tmp_path, "parquet", "--parquet", data, "--caption-field", "text")
    assert "no column 'text'; it has: image, captions, label" in said
    assert "no row of the split 'val'" in refusal(capsys, tmp_path, "parquet", "--parquet", data, "--split", "val")
    (data / "train-00002.parquet").write_bytes(b"not parquet")
    assert "train-00002.parquet is not a Parquet file" in refusal(capsys, tmp_path, "parquet", "--parquet", data)


def test_parquet_with_binary_paths_and_failed_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = {
        "jpg": [jpeg(0), None, jpeg(2)],
        "caption": ["a", "b", None],
        "scene": ["lake", "lake", "river"],
        "status": ["success", "failed_to_download", "success"],
        "error_message": [None, "HTTP Error 404", None],
        "url": ["https://h/0", None, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    found = samples(packed(tmp_path, "parquet", "--parquet", tmp_path / "00000.parquet"))
    assert found["00000/00000000"].image == jpeg(0)
    assert found["00000/00000000"].info["url"] == "https://h/0"
    assert "river" in found["00000/00000002"].captions[0]  # from a template
    assert reasons(tmp_path) == {"00000/00000001": "not downloaded"}

    (tmp_path / "img/lake").mkdir(parents=True)
    (tmp_path / "img/lake/1.jpg").write_bytes(jpeg(5))
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["lake/1.jpg"], "text": ["x"]}), tmp_path / "p.parquet")
    assert "--images" in refusal(capsys, tmp_path, "parquet", "--parquet", tmp_path / "p.parquet")
    record = parquet(tmp_path / "p.parquet", tmp_path / "img")[0]
    assert (record.key, record.captions, load(record).image) == ("lake/1", ["x"], jpeg(5))
    pyarrow.parquet.write_table(pyarrow.table({"image": [b""], "label": [3], "text": ["x"]}), tmp_path / "n.parquet")
    assert "have no class names" in refusal(capsys, tmp_path, "parquet", "--parquet", tmp_path / "n.parquet")


def test_parquet_reads_each_row_group_about_once_when_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from priorclip.data_shards.sources import parquet as module

    hugging_face(tmp_path / "a.parquet", 60, 10, ["harbor"])
    records = shuffled(parquet(tmp_path / "a.parquet"), seed=3)
    assert sorted(record.key for record in records) == [f"a/{n:08d}" for n in range(60)]
    assert [record.key for record in records] != sorted(record.key for record in records)
    opened: list[str] = []
    real_open = module._open
    monkeypatch.setattr(module, "_open", lambda file: (opened.append(str(file)), real_open(file))[1])
    module._images.cache_clear()
    assert {load(record).image == jpeg(int(record.key[2:])) for record in records} == {True}
    assert len(opened) == 6
