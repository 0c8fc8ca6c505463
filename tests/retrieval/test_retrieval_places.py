"""The places of tiles go through the index into results: GeoJSON, CSV, limits by box, time and scene."""

from __future__ import annotations

import csv
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import torch
from running_server import serving
from shapely.geometry import MultiPolygon, box, shape
from small_galleries import TestSet

from priorclip.data_shards import ShardSet
from priorclip.data_shards.format.place import bounds, place_of_info
from priorclip.retrieval import EmbeddingIndex, Searcher, nearest_rows
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.places import Within, moment, touches


@pytest.fixture(scope="module")
def index(placed_index: Path) -> Path:
    return placed_index


@pytest.fixture(scope="module")
def searcher(placed_searcher: Searcher) -> Searcher:
    return placed_searcher


def search(index: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["search", "--index", str(index), "--text", "a river", "--device", "cpu", "--k", "99", *words]) == 0
    return capsys.readouterr().out


def test_an_index_keeps_what_key_json_says(index: Path, searcher: Searcher) -> None:
    shards = ShardSet(str(index.parent / "tiles"))
    samples = {shards.key(row): shards.read(row) for row in range(len(shards))}
    assert len(samples) == 12
    for row in range(12):
        entry = searcher.index.entry(row)
        sample = samples[entry["key"]]
        place = place_of_info(sample.info)
        assert entry["place"] == {name: place[name] for name in place if name not in ("crs", "transform")}
        assert entry["caption"] == (sample.captions[0] if sample.captions else None)
        assert ("footprint" in place) == (place["scene"] != "lost.tif")
    hit = searcher.by_row(0, 1)[0]
    assert (hit.caption, hit.place) == (searcher.index.entry(0)["caption"], searcher.index.entry(0)["place"])


def test_geojson_is_what_gis_programs_read(
    index: Path, searcher: Searcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hits.geojson"
    assert "12 results" in search(index, capsys, "--format", "geojson", "--output", str(path))
    features = json.loads(path.read_text())["features"]
    hits = searcher.by_text("a river", 99)
    crossing = 0
    for feature, hit in zip(features, hits, strict=True):
        facts = feature["properties"]
        assert (facts["rank"], facts["key"], facts["label"]) == (hit.rank, hit.key, hit.label)
        assert facts["score"] == pytest.approx(hit.score, abs=1e-6)
        assert (facts["caption"], facts["scene"]) == (hit.caption, hit.place["scene"])
        if hit.place["scene"] == "lost.tif":
            assert feature["geometry"] is None
            continue
        outline = shape(feature["geometry"])
        assert outline.is_valid
        west, south, east, north = outline.bounds
        assert -180 <= west < east <= 180
        assert -90 <= south < north <= 90
        parts = outline.geoms if isinstance(outline, MultiPolygon) else [outline]
        assert all(part.exterior.is_ccw for part in parts)
        crossing += len(parts) == 2
    assert crossing == 1  # one tile of the scene across the dateline
    facts, _, shapes, columns = pyogrio.raw.read(path)  # GDAL, as QGIS
    assert facts["crs"] == "EPSG:4326"
    assert len(shapes) == 12
    assert list(columns[list(facts["fields"]).index("rank")]) == list(range(1, 13))


def test_json_and_csv(index: Path, searcher: Searcher, capsys: pytest.CaptureFixture[str]) -> None:
    hits = searcher.by_text("a river", 99)
    rows = json.loads(search(index, capsys, "--format", "json"))
    assert [row["footprint"] for row in rows] == [hit.place.get("footprint") for hit in hits]
    assert [row["gsd"] for row in rows if "gsd" in row] == [hit.place["gsd"] for hit in hits if "gsd" in hit.place]
    table = list(csv.DictReader(search(index, capsys, "--format", "csv").splitlines()))
    assert [row["key"] for row in table] == [hit.key for hit in hits]
    for row, hit in zip(table, hits, strict=True):
        edges = tuple(float(row[name]) for name in ("west", "south", "east", "north") if row[name])
        assert edges == (bounds(hit.place["footprint"]) if "footprint" in hit.place else ())
    assert "rank" in search(index, capsys).splitlines()[0]


def test_limits_give_the_ranking_of_all_without_the_others(index: Path, searcher: Searcher) -> None:
    everything = searcher.by_text("a river", 99)
    inside = box(9.0, 48.74, 9.0012, 48.76)
    for within, kept in (
        (Within.parse(bbox="9.0,48.74,9.0012,48.76"), lambda place: shape(place["footprint"]).intersects(inside)),
        (Within.parse(time="2024-06-02"), lambda place: place.get("acquired", "").startswith("2024-06-02")),
        (Within.parse(scene="scene-00?.tif"), lambda place: place["scene"].startswith("scene-00")),
        (Within.parse(time="2024-06-02/..", scene="scene-000.tif"), lambda place: False),
        (Within.parse(bbox="179,-18,-179,-17"), lambda place: place["scene"] == "fiji.tif"),
    ):
        expected = [(hit.key, hit.score) for hit in everything if "footprint" in hit.place and kept(hit.place)]
        found = searcher.by_text("a river", 99, within)
        assert [hit.key for hit in found] == [key for key, _ in expected]
        assert [hit.score for hit in found] == pytest.approx([score for _, score in expected], abs=1e-6)
        assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
        assert [hit.key for hit in searcher.by_text("a river", 2, within)] == [key for key, _ in expected[:2]]


def test_many_rows_within_limits_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_rows, "GATHERED", 7)
    draw = torch.Generator().manual_seed(3)
    embeddings = torch.nn.functional.normalize(torch.randn(60, 8, generator=draw), dim=1)
    embeddings[40] = embeddings[10]  # equal scores are in the order of the rows
    rows, query = np.arange(0, 60, 2), embeddings[10]
    exact = (embeddings[rows] @ query).tolist()
    expected = sorted(range(30), key=lambda place: (-round(exact[place], 6), place))[:12]
    scores, found = nearest_rows.nearest_of(embeddings, query, 12, rows)
    assert found == [int(rows[place]) for place in expected]
    assert found[:2] == [10, 40]
    assert scores == pytest.approx([exact[place] for place in expected], abs=1e-6)
    assert nearest_rows.nearest_of(embeddings, query, 5, rows[:0]) == ([], [])


def test_boxes_meet_as_shapes_on_the_globe_do() -> None:
    """Compared with shapely: each box is drawn once or, across the dateline, twice."""
    rng = np.random.default_rng(1)
    boxes = np.column_stack([rng.uniform(-180, 180, 300), rng.uniform(-90, 0, 300),
                             rng.uniform(-180, 180, 300), rng.uniform(0, 90, 300)])  # fmt: skip
    boxes[:50, 1], boxes[:50, 3] = 50, 60

    def parts(west: float, south: float, east: float, north: float) -> MultiPolygon:
        spans = [(west, east)] if west <= east else [(west, 180), (-180, east)]
        return MultiPolygon([box(low, south, high, north) for low, high in spans])

    for query in ((10, -5, 40, 5), (170, -80, -170, 55), (-180, -90, 180, 90), (-179, 70, -178, 71), (0, 65, 20, 80)):
        expected = [parts(*each).intersects(parts(*query)) for each in boxes.tolist()]
        assert touches(boxes, query).tolist() == expected
    assert not touches(np.full((1, 4), np.nan), (-180, -90, 180, 90)).any()


def test_times() -> None:
    assert moment("2024-02") == (1_706_745_600, 1_709_251_200)  # 29 days
    assert moment("2023") == (1_672_531_200, 1_704_067_200)
    assert moment("2024-06-01T10:30:00") == (1_717_237_800, 1_717_237_801)
    assert Within.parse(time="2024-06-01/2024-06-01").time == (1_717_200_000, 1_717_286_400)


def test_wrong_limits(index: Path, test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("--bbox", "-1,2,3"), "bbox must be WEST,SOUTH,EAST,NORTH in degrees, not '-1,2,3'"),
        (("--bbox", "-10,50,20,40"), "latitudes -90 to 90"),
        (("--bbox", "0,0,200,1"), "longitudes -180 to 180"),
        (("--time", "June"), "time must be 2024"),
        (("--time", "2024-13"), "time must be 2024"),
        (("--time", "2024-06/2023"), "ends before it begins"),
    ):
        assert main(["search", "--index", str(index), "--text", "x", *words]) == 2
        assert message in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(index, bare)
    (bare / "places.safetensors").unlink()
    words = ["search", "--index", str(bare), "--text", "x", "--device", "cpu", "--scene", "a"]
    assert main(words) == 2
    assert "this index has no places" in capsys.readouterr().err


def read_all(folder: Path) -> None:
    loaded = EmbeddingIndex.load(folder)
    for row in range(len(loaded)):
        loaded.entry(row)


def test_places_of_a_foreign_index_are_checked(index: Path, tmp_path: Path) -> None:
    for number, (name, old, new, message) in enumerate(
        (
            ("images.jsonl", b'"Polygon"', b'"Polyglot"', "'footprint' must be a GeoJSON Polygon"),
            ("images.jsonl", b'"gsd": ', b'"gsd": -', "'gsd' must be metres above 0"),
            ("images.jsonl", b'"place": {', b'"place": 7, "other": {', "'place' must be an object"),
            ("scenes.json", b"[", b"[7, ", "places.safetensors or scenes.json is damaged"),
            ("scenes.json", b'"lost.tif"', b'"a", "b', "is damaged"),
            ("places.safetensors", b"bounds", b"bound_", "is damaged"),
        )
    ):
        copy = tmp_path / str(number)
        shutil.copytree(index, copy)
        content = (copy / name).read_bytes()
        assert old in content
        (copy / name).write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match=message):
            read_all(copy)


def test_the_server_limits_and_tells_places(searcher: Searcher) -> None:
    with serving(searcher) as served:
        with urllib.request.urlopen(f"{served.url}search?text=a+river&scene=scene-001.tif&time=2024-06&k=2") as answer:
            hits = json.load(answer)["hits"]
        assert [hit["place"]["scene"] for hit in hits] == ["scene-001.tif"] * 2
        assert all(hit["place"]["footprint"]["type"] == "Polygon" and hit["caption"] for hit in hits)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{served.url}search?text=a+river&bbox=1,2,3")
