"""Hits as GeoParquet, which geopandas, DuckDB and QGIS read: a row a hit, its footprint as geometry in lon/lat.

    write_geoparquet([("a river", hits)], Path("hits.parquet"), with_query=True)

    query | rank | score | key | label | caption | scene | window | gsd | acquired | where | kept columns | geometry

A hit without a place has no geometry. A kept column whose values are of several kinds, or lists, holds JSON.
Source: GeoParquet 1.1 (geoparquet.org), written by geopandas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorclip.common.files import file_aside
from priorclip.retrieval.hit_formats import NAMES, Answer, facts_of

WGS84 = "EPSG:4326"  # GeoParquet stores lon, lat under it too


def require_geopandas() -> None:
    """Raises ValueError, which says what to install, if geopandas or pyarrow is missing."""
    try:
        import geopandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format geoparquet needs {error.name}: pip install 'priorclip-pretraining[geo]'") from error


def write_geoparquet(answers: Sequence[Answer], path: Path, with_query: bool = False) -> None:
    """Writes the hits of all answers into one file; a crash leaves the old file or the new one.

    Args:
        answers: queries with their hits
        path: the file
        with_query: a first column holds the query of each hit
    """
    import geopandas
    from shapely.geometry import shape

    rows: list[dict[str, Any]] = []
    shapes = []
    for query, hit in ((query, hit) for query, hits in answers for hit in hits):
        rows.append(({"query": query} if with_query else {}) | facts_of(hit))
        footprint = hit.place.get("footprint")
        shapes.append(None if footprint is None else shape(footprint))
    names = list(dict.fromkeys(name for row in rows for name in row if name != "geometry"))
    columns = {name: of_one_kind([row.get(name) for row in rows], name not in NAMES) for name in names}
    frame = geopandas.GeoDataFrame(columns, geometry=shapes, crs=WGS84)
    with file_aside(path) as aside:
        frame.to_parquet(aside, index=False, schema_version="1.1.0")


def of_one_kind(values: list[Any], kept: bool) -> list[Any]:
    """Returns the values of a column, as JSON if it is a kept one and Parquet has no type for all of them."""
    kinds = {type(value) for value in values if value is not None}
    if not kept or (len(kinds) <= 1 and not kinds & {list, dict}):
        return values
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
