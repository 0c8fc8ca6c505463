"""Hits as JSON, GeoJSON or CSV, for other programs.

    format_hits(hits, "geojson")     a FeatureCollection (RFC 7946), as QGIS opens it

A footprint is in lon/lat: a polygon, a part on each side of the dateline, or a point. A hit without one has the
geometry null. Kept columns stand beside the other facts of a hit. One that has the name of a fact is left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from priorclip.common.printable import one_line
from priorclip.data_shards.format.place import bounds
from priorclip.retrieval.text_tables import hit_table

if TYPE_CHECKING:
    from priorclip.retrieval.search import Hit

COLUMNS = ("rank", "score", "label", "key", "caption", "scene", "window", "acquired", "gsd")
EDGES = ("west", "south", "east", "north")
NAMES = frozenset((*COLUMNS, *EDGES, "where", "footprint"))


def format_hits(hits: Sequence[Hit], kind: str) -> str:
    """Returns hits in one of FORMATS, without a newline at the end."""
    return FORMATS[kind](hits)


def facts_of(hit: Hit) -> dict[str, Any]:
    """Returns what is known of a hit, without its footprint."""
    place = {name: value for name, value in hit.place.items() if name != "footprint"}
    facts = {"rank": hit.rank, "score": round(hit.score, 6), "key": hit.key, "label": hit.label}
    facts |= {"caption": hit.caption, **place, "where": hit.where}
    return {**facts, **{name: value for name, value in hit.columns.items() if name not in NAMES}}


def hits_json(hits: Sequence[Hit]) -> str:
    rows = [{**facts_of(hit), "footprint": hit.place.get("footprint")} for hit in hits]
    return json.dumps(rows, indent=2)


def hits_geojson(hits: Sequence[Hit]) -> str:
    features = [
        {"type": "Feature", "id": hit.rank, "geometry": hit.place.get("footprint"), "properties": facts_of(hit)}
        for hit in hits
    ]
    return json.dumps({"type": "FeatureCollection", "features": features})


def hits_csv(hits: Sequence[Hit]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    kept = list(dict.fromkeys(name for hit in hits for name in hit.columns if name not in NAMES))
    writer.writerow([*COLUMNS, *EDGES, "where", *map(one_line, kept)])
    for hit in hits:
        facts = facts_of(hit)
        edges = bounds(hit.place["footprint"]) if "footprint" in hit.place else ("",) * 4
        values = [*(facts.get(name) for name in COLUMNS), *edges, hit.where, *(facts.get(name) for name in kept)]
        writer.writerow([one_line(value) if isinstance(value, str) else value for value in values])
    return buffer.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Sequence[Hit]], str]] = {
    "table": hit_table,
    "json": hits_json,
    "geojson": hits_geojson,
    "csv": hits_csv,
}
