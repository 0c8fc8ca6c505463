"""Packs of small data sets, for the tests of all sources."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from small_data import encoded, picture, rows

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main

SHARED = Path(__file__).parents[3] / "shared/data"


real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the benchmarks' annotation files are not in {SHARED}")


def packed(tmp_path: Path, *options: object) -> ShardSet:
    """Returns the shards that `pack --source ...` writes with these options, in the order of the records."""
    folder = tmp_path / "shards"
    words = [str(word) for word in options]
    assert main(["pack", "--source", *words, "--output", str(folder), "--workers", "1", "--shuffle", "false"]) == 0
    return ShardSet(str(folder))


def refusal(capsys: pytest.CaptureFixture, tmp_path: Path, *options: object) -> str:
    """Returns the error of `pack --source ...` with wrong options."""
    assert main(["pack", "--source", *map(str, options), "--output", str(tmp_path / "refused")]) == 2
    assert not (tmp_path / "refused").exists()
    return capsys.readouterr().err


def samples(shards: ShardSet) -> dict:
    return {shards.key(i): shards.read(i) for i in range(len(shards))}


def reasons(tmp_path: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in rows(tmp_path / "shards" / "quarantine.jsonl")}


def jpeg(index: int) -> bytes:
    return encoded(picture(index, 40, 32), quality=90)


def hugging_face(path: Path, count: int, group: int, labels: list[str]) -> None:
    """Writes a file like `datasets` does: struct<bytes, path>, list of captions, class label with names."""
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": labels, "_type": "ClassLabel"}}
    table = pyarrow.table(
        {
            "image": pyarrow.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(count)], struct),
            "captions": [[f"caption {i}", f"second {i}", " "] for i in range(count)],
            "label": [i % (len(labels) + 1) - 1 for i in range(count)],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
