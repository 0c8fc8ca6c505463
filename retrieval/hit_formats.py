"""Hits as JSON, GeoJSON or CSV, for other programs.

    format_hits(hits, "geojson")     a FeatureCollection (RFC 7946), as QGIS opens it

A footprint is in lon/lat: a polygon, a part on each side of the dateline, or a point. A hit without one has the
geometry null. Kept columns stand beside the other facts of a hit. One that has the name of a fact is left out. JSON
says how it was searched: each hit of one query, each query of several, and the collection of GeoJSON have "search"
and, if that is "approximate", "recall_at_10".
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from priorclip.common.printable import one_line
from priorclip.data_shards.format.place import bounds
from priorclip.retrieval.text_tables import hit_table

if TYPE_CHECKING:
    from priorclip.retrieval.search import Hit

Answer = tuple[str, Sequence["Hit"]]  # a query and its hits
Way = Mapping[str, Any]  # how it was searched
EXACT: Way = {"search": "exact"}
COLUMNS = ("rank", "score", "label", "key", "caption", "scene", "window", "acquired", "gsd")
EDGES = ("west", "south", "east", "north")
NAMES = frozenset((*COLUMNS, *EDGES, "where", "footprint", "search", "recall_at_10"))


def format_hits(hits: Sequence[Hit], kind: str, way: Way = EXACT) -> str:
    """Returns hits in one of FORMATS, without a newline at the end. ``way`` is of ``way_of_search``."""
    return FORMATS[kind](hits, way)


def format_answers(answers: Sequence[Answer], kind: str, way: Way = EXACT) -> str:
    """Returns the hits of several queries in one of FORMATS, each with its query, without a newline at the end.

    JSON is a list of {"query", "hits"}. In GeoJSON and CSV each hit has "query".
    """
    return MANY[kind](answers, way)


def facts_of(hit: Hit) -> dict[str, Any]:
    """Returns what is known of a hit, without its footprint."""
    place = {name: value for name, value in hit.place.items() if name != "footprint"}
    facts = {"rank": hit.rank, "score": round(hit.score, 6), "key": hit.key, "label": hit.label}
    facts |= {"caption": hit.caption, **place, "where": hit.where}
    return {**facts, **{name: value for name, value in hit.columns.items() if name not in NAMES}}


def rows_of(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    return [{**facts_of(hit), "footprint": hit.place.get("footprint")} for hit in hits]


def hits_json(hits: Sequence[Hit], way: Way) -> str:
    return json.dumps([{**row, **way} for row in rows_of(hits)], indent=2)


def answers_json(answers: Sequence[Answer], way: Way) -> str:
    return json.dumps([{"query": query, **way, "hits": rows_of(hits)} for query, hits in answers], indent=2)


def feature(hit: Hit, **more: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": hit.place.get("footprint"), "properties": {**facts_of(hit), **more}}


def hits_geojson(hits: Sequence[Hit], way: Way) -> str:
    features = [{"id": hit.rank, **feature(hit)} for hit in hits]
    return json.dumps({"type": "FeatureCollection", **way, "features": features})


def answers_geojson(answers: Sequence[Answer], way: Way) -> str:
    features = [
        {"id": f"{number}-{hit.rank}", **feature(hit, query=query)}
        for number, (query, hits) in enumerate(answers, start=1) for hit in hits
    ]  # fmt: skip
    return json.dumps({"type": "FeatureCollection", **way, "features": features})


def hits_csv(hits: Sequence[Hit], way: Way) -> str:
    return table_csv([("", hits)], [])


def answers_csv(answers: Sequence[Answer], way: Way) -> str:
    return table_csv(answers, ["query"])


def table_csv(answers: Sequence[Answer], first: list[str]) -> str:
    """Returns a line for each hit of all answers; ``first`` is ["query"] for the query as first column, or empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    hits = [hit for _, found in answers for hit in found]
    kept = list(dict.fromkeys(name for hit in hits for name in hit.columns if name not in {*NAMES, *first}))
    writer.writerow([*first, *COLUMNS, *EDGES, "where", *map(one_line, kept)])
    for query, hit in ((query, hit) for query, found in answers for hit in found):
        facts = facts_of(hit)
        edges = bounds(hit.place["footprint"]) if "footprint" in hit.place else ("",) * 4
        values = [*([query] if first else []), *(facts.get(name) for name in COLUMNS)]
        values += [*edges, hit.where, *(facts.get(name) for name in kept)]
        writer.writerow([one_line(value) if isinstance(value, str) else value for value in values])
    return buffer.getvalue().rstrip("\n")


def hits_table(hits: Sequence[Hit], way: Way) -> str:
    return hit_table(hits)


def answers_table(answers: Sequence[Answer], way: Way) -> str:
    return "\n\n".join(f"{one_line(query)}\n{hit_table(hits)}" for query, hits in answers)


MANY: dict[str, Callable[[Sequence[Answer], Way], str]] = {
    "table": answers_table,
    "json": answers_json,
    "geojson": answers_geojson,
    "csv": answers_csv,
}
FORMATS: dict[str, Callable[[Sequence[Hit], Way], str]] = {
    "table": hits_table,
    "json": hits_json,
    "geojson": hits_geojson,
    "csv": hits_csv,
}
