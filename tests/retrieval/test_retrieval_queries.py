"""`retrieval search --queries FILE`: every line is searched for, with the hits of a search of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import geopandas
import pytest
from shapely.geometry import shape

from priorclip.retrieval import Searcher
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.hits_geoparquet import write_geoparquet
from priorclip.retrieval.search import Hit

TEXTS = ["a river", "two storage tanks beside a road", 'a río, "wide"', "a river"]
K = 3


@pytest.fixture
def searched(placed_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Returns a function that searches for the texts and gives what it printed."""
    file = tmp_path / "queries.txt"
    file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")

    def search(*words: str) -> str:
        command = ["search", "--index", str(placed_index), "--queries", str(file), "-k", str(K), "--device", "cpu"]
        assert main([*command, *words]) == 0
        return capsys.readouterr().out

    return search


def expected(searcher: Searcher) -> list[list[tuple[int, str]]]:
    return [[(hit.rank, hit.key) for hit in searcher.by_text(text, K)] for text in TEXTS]


def test_each_query_has_the_hits_of_its_own_search(searched: Any, placed_searcher: Searcher) -> None:
    found = json.loads(searched("--format", "json"))
    assert [answer["query"] for answer in found] == TEXTS
    assert [[(hit["rank"], hit["key"]) for hit in answer["hits"]] for answer in found] == expected(placed_searcher)
    for answer in found:
        scores = [hit.score for hit in placed_searcher.by_text(answer["query"], K)]
        assert [hit["score"] for hit in answer["hits"]] == pytest.approx(scores, abs=2e-6)


def test_csv_geojson_and_table_say_the_query(searched: Any, placed_searcher: Searcher) -> None:
    flat = [
        (text, rank, key) for text, hits in zip(TEXTS, expected(placed_searcher), strict=True) for rank, key in hits
    ]
    rows = list(csv.DictReader(searched("--format", "csv").splitlines()))
    assert [(row["query"], int(row["rank"]), row["key"]) for row in rows] == flat
    features = json.loads(searched("--format", "geojson"))["features"]
    told = [each["properties"] for each in features]
    assert [(each["query"], each["rank"], each["key"]) for each in told] == flat
    assert len({each["id"] for each in features}) == len(flat)
    blocks = searched().strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == TEXTS
    assert [len(block.splitlines()) for block in blocks] == [2 + K] * len(TEXTS)


def test_limits_hold_for_every_query(searched: Any) -> None:
    found = json.loads(searched("--format", "json", "--scene", "fiji.tif"))
    assert {hit["scene"] for answer in found for hit in answer["hits"]} == {"fiji.tif"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a river\n\na road\n", "line 2 is blank"),
        (b"", "it has no line"),
        (b"a r\xedver\n", "is no text in UTF-8"),
    ],
)
def test_a_file_that_is_no_list_of_texts_is_refused(
    content: bytes, message: str, placed_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.txt").write_bytes(content)
    assert main(["search", "--index", str(placed_index), "--queries", str(tmp_path / "q.txt")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a river"], "give either --text"),
        (["--format", "geoparquet"], "--format geoparquet is no text: name its file with --output"),
    ],
)
def test_options_that_contradict_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--index", "index", "--queries", "q.txt", *words])
    assert message in capsys.readouterr().err


def test_geopandas_reads_the_places(searched: Any, placed_searcher: Searcher, tmp_path: Path) -> None:
    """The footprints, scores and queries are those of GeoJSON; a scene without coordinates has no geometry."""
    path = tmp_path / "hits.parquet"
    words = ["-k", "99", "--output"]
    assert f"{path}: {12 * len(TEXTS)} results" in searched("--format", "geoparquet", *words, str(path))
    searched("--format", "geojson", *words, str(tmp_path / "hits.geojson"))
    frame = geopandas.read_parquet(path)
    features = json.loads((tmp_path / "hits.geojson").read_text())["features"]
    assert frame.crs.to_epsg() == 4326
    assert len(frame) == len(features)
    without = 0
    for (_, row), each in zip(frame.iterrows(), features, strict=True):
        told = each["properties"]
        assert (row["query"], row["rank"], row["key"], row["scene"]) == tuple(
            told[name] for name in ("query", "rank", "key", "scene")
        )
        assert row["score"] == pytest.approx(told["score"], abs=1e-9)
        assert list(row["window"]) == told["window"]
        without += row.geometry is None
        assert (row.geometry is None) == (each["geometry"] is None)
        if row.geometry is not None:
            assert row.geometry.equals(shape(each["geometry"]))
    assert 0 < without < len(frame)


def test_kept_columns_of_several_kinds_are_json(tmp_path: Path) -> None:
    hits = [
        Hit(rank, 0.5, rank, f"k{rank}", None, "f.jpg", columns={"cloud": cloud, "mixed": mixed, "tags": tags})
        for rank, cloud, mixed, tags in ((1, 0.25, "a", ["x"]), (2, None, 3, None), (3, 0.5, None, ["y", "z"]))
    ]
    write_geoparquet([("", hits)], tmp_path / "hits.parquet")
    frame = geopandas.read_parquet(tmp_path / "hits.parquet")
    assert "query" not in frame
    assert frame["cloud"].fillna(-1).tolist() == [0.25, -1, 0.5]
    assert [json.loads(each) for each in frame["mixed"].dropna()] == ["a", 3]
    assert [json.loads(each) for each in frame["tags"].dropna()] == [["x"], ["y", "z"]]
    assert frame.geometry.isna().all()
