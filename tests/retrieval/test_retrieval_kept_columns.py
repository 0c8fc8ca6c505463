"""Columns of a table that `pack --keep-columns` keeps go through the index into results, and limit a search."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyogrio
import pytest
from shapely import from_wkb
from small_galleries import TestSet

from priorclip.common.options import parse_command
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.retrieval import EmbeddingIndex
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import COMMANDS

ROWS = [
    ("harbour/harbour_0.png", "46.95", "7.45", "2019-07-01", "0.1", "CH"),
    ("river/river_1.png", "-17.7", "178.1", "2024-06-02T10:30:00Z", "10", "S2"),
    ("forest/forest_2.png", "-17.8", "-179.9", "2024-06-03", "", "S2"),
    ("stadium/stadium_3.png", "", "", "2024-07-01", "30", "L8"),
    ("harbour/harbour_4.png", "", "", "", "", ""),
    ("river/river_5.png", "95", "0", "", "", ""),
]


@pytest.fixture(scope="module")
def index(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text", "lat", "lon", "taken", "gsd", "sensor"])
        writer.writerows([name, f"the {name}", *rest] for name, *rest in ROWS)
    words = ["pack", "--source", "csv", "--csv", str(folder / "table.csv"), "--images", str(test_set.images)]
    words += ["--keep-columns", "lat,lon,time=taken,gsd,sensor", "--workers", "1", "--shuffle", "false"]
    assert data_shards([*words, "--output", str(folder / "shards")]) == 0
    words = ["index", "--model", str(test_set.export), "--data", str(folder / "shards"), "--device", "cpu"]
    assert main([*words, "--workers", "0", "--output", str(folder / "index")]) == 0
    return folder / "index"


def search(index: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["search", "--index", str(index), "--text", "a river", "--device", "cpu", "--k", "9", *words]) == 0
    return capsys.readouterr().out


def test_points_and_columns_are_in_results(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["key"].rpartition("_")[2]: row for row in json.loads(search(index, capsys, "--format", "json"))}
    assert set(rows) == {"0", "1", "2", "3", "4"}  # the image at 95 degrees is left out
    first = rows["0"]
    assert first["footprint"] == {"type": "Point", "coordinates": [7.45, 46.95]}
    assert (first["acquired"], first["gsd"], first["sensor"]) == ("2019-07-01", 0.1, "CH")
    assert first["caption"] == "the harbour/harbour_0.png"
    assert (rows["3"]["footprint"], rows["3"]["gsd"], rows["3"]["sensor"]) == (None, 30, "L8")
    assert "sensor" not in rows["4"]

    path = tmp_path / "hits.geojson"
    search(index, capsys, "--format", "geojson", "--output", str(path))
    facts, _, shapes, columns = pyogrio.raw.read(path)  # GDAL, as QGIS
    read = dict(zip(facts["fields"], columns, strict=True))
    points = {
        sensor: from_wkb(shape) for sensor, shape, gsd in zip(read["sensor"], shapes, read["gsd"]) if gsd in (0.1, 10)
    }
    assert {name: (point.x, point.y) for name, point in points.items()} == {"CH": (7.45, 46.95), "S2": (178.1, -17.7)}

    table = {row["sensor"]: row for row in csv.DictReader(search(index, capsys, "--format", "csv").splitlines())}
    assert [table["CH"][name] for name in ("west", "south", "east", "north")] == ["7.45", "46.95", "7.45", "46.95"]
    assert (table["L8"]["west"], table["L8"]["gsd"], table["L8"]["acquired"]) == ("", "30.0", "2024-07-01")


def test_limits_of_place_and_time(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (("--bbox", "7,46,8,47"), {"0"}),
        (("--bbox", "178,-18,-179,-17"), {"1", "2"}),  # across the dateline
        (("--bbox", "0,0,1,1"), set()),
        (("--time", "2024-06"), {"1", "2"}),
        (("--time", "2024-06-02T10:30:00"), {"1"}),
        (("--time", "2024"), {"1", "2", "3"}),
        (("--bbox", "178,-18,-179,-17", "--time", "2024-06-03/.."), {"2"}),
    ):
        found = json.loads(search(index, capsys, "--format", "json", *words))
        assert {row["key"].rpartition("_")[2] for row in found} == expected, words


def test_columns_of_a_foreign_index_are_checked(index: Path, tmp_path: Path) -> None:
    lines = (index / "images.jsonl").read_bytes()
    for number, (new, said) in enumerate(
        (
            (b'"kept_columns": 7, "x": {', "'kept_columns' must be an object"),
            (b'"kept_columns": {"n": NaN, ', "not finite"),
        )
    ):
        copy = tmp_path / str(number)
        copy.mkdir()
        for path in index.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "images.jsonl").write_bytes(lines.replace(b'"kept_columns": {', new))
        with pytest.raises(ValueError, match=said):
            EmbeddingIndex.load(copy).entry(0)


def test_a_column_with_the_name_of_a_fact_changes_no_fact(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pack` refuses such names, but somebody else may have written the index."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in index.iterdir():
        content = path.read_bytes()
        (copy / path.name).write_bytes(
            content.replace(b'"kept_columns": {', b'"kept_columns": {"score": 9, "where": "x", ')
        )
    rows = json.loads(search(copy, capsys, "--format", "json"))
    assert all(-1 <= row["score"] <= 1 and row["where"] != "x" for row in rows)
    table = list(csv.reader(search(copy, capsys, "--format", "csv").splitlines()))
    assert len(set(table[0])) == len(table[0])


def test_json_is_short_for_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", "--index", "i", "--text", "a"]
    for more, expected in ((["--json"], "json"), (["--json", "--format", "json"], "json"), ([], "table")):
        _, config = parse_command(COMMANDS, [*words, *more], prog="retrieval", description="")
        assert config.format == expected
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--json", "--format", "csv"])
    assert "--json and --format csv name two formats" in capsys.readouterr().err
