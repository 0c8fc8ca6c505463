"""The place of an image in KEY.json: scene, window, CRS, transform, footprint, ground sampling distance, time.

    check_place(info)                ValueError: 'footprint' has a latitude outside of -90 to 90
    place_of_info(info)              {"scene": "T33/a.tif", "window": [0, 192, 256, 256], "footprint": {...}, ...}
    columns_of_info(info)            {"sensor": "S2"}: columns of the table that KEY.json keeps as they are
    bounds(footprint)                (west, south, east, north) in degrees; west > east across the dateline

``rasters/georeference.py`` makes these values for tiles of scenes, whose footprint is a polygon. For rows of a table
``sources/kept_columns.py`` makes them; there the footprint may be a point. Somebody else may have written a file, so
they are checked here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from priorclip.common.untrusted_json import shown

KEYS = ("scene", "window", "crs", "transform", "footprint", "gsd", "acquired")
COLUMNS = "kept_columns"  # the field of KEY.json
MAX_POINTS, MAX_TEXT = 10_000, 10_000  # of a footprint; characters of a name, a CRS, or the kept columns
TIME = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d)?")
Bounds = tuple[float, float, float, float]


def place_of_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what KEY.json says of the place; empty for an image without one. Raises ValueError if it is malformed."""
    place = {name: info[name] for name in KEYS if name in info}
    if not {"window", "footprint"} & set(place):  # then "scene", "crs" and "gsd" may be words of another program
        place = {name: place[name] for name in ("gsd", "acquired") if name in place and COLUMNS in info}
    check_place(place)
    return place


def columns_of_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the kept columns in KEY.json; empty for an image without any. Raises ValueError if they are malformed."""
    columns = info.get(COLUMNS, {})
    check_columns(columns)
    return dict(columns)


def check_columns(columns: Any) -> None:
    """Raises ValueError if kept columns are no object, hold a number that is not finite, or are too long."""
    if not isinstance(columns, dict):
        raise ValueError(f"'{COLUMNS}' must be an object, not {shown(columns)}")
    try:
        size = len(json.dumps(columns, allow_nan=False, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{COLUMNS}' holds a number that is not finite, or is too deep") from error
    if size > MAX_TEXT:
        raise ValueError(f"'{COLUMNS}' has {size} characters, limit {MAX_TEXT}")


def check_place(place: Mapping[str, Any]) -> None:
    """Checks the values that are there. Raises ValueError, which names the field."""
    for name in ("scene", "crs", "acquired"):
        value = place.get(name, "")
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise ValueError(f"'{name}' must be text, not {shown(value)}")
    if "acquired" in place and not is_time(place["acquired"]):
        raise ValueError(f"'acquired' must be a date or a time as ISO 8601, not {shown(place['acquired'])}")
    if "window" in place:
        window = place["window"]
        whole = isinstance(window, list) and len(window) == 4 and all(type(value) is int for value in window)
        if not whole or min(window) < 0 or 0 in window[2:] or max(window) > 1 << 40:
            raise ValueError(f"'window' must be left, top, width and height in pixels, not {shown(window)}")
    if "transform" in place:
        values = place["transform"]
        if not isinstance(values, list) or len(values) != 6 or not all(map(is_finite, values)):
            raise ValueError(f"'transform' must be six finite numbers, not {shown(values)}")
    if "gsd" in place and not (is_finite(place["gsd"]) and place["gsd"] > 0):
        raise ValueError(f"'gsd' must be metres above 0, not {shown(place['gsd'])}")
    if "footprint" in place:
        check_footprint(place["footprint"])
        if "window" in place and place["footprint"]["type"] == "Point":
            raise ValueError("'footprint' must be a GeoJSON Polygon or MultiPolygon, because a window is no point")


def is_time(text: str) -> bool:
    """Tells whether a text is a day or a second that the calendar has: not 2024-02-30."""
    try:
        return bool(TIME.fullmatch(text) and datetime.fromisoformat(text))
    except ValueError:
        return False


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def check_footprint(shape: Any) -> None:
    """Raises ValueError if a value is no GeoJSON point, polygon, or polygons, in lon/lat."""
    kind = shape.get("type") if isinstance(shape, dict) else None
    if kind not in ("Point", "Polygon", "MultiPolygon"):
        raise ValueError(f"'footprint' must be a GeoJSON Polygon, MultiPolygon or Point, not {shown(shape)}")
    count = 0
    try:
        if kind == "Point":
            if len(shape["coordinates"]) != 2:
                raise ValueError("'footprint' must be a point of two numbers")
            check_position(*shape["coordinates"])
            return
        for ring in (ring for polygon in polygons(shape) for ring in polygon):
            if len(ring) < 4 or ring[0] != ring[-1] or any(len(point) != 2 for point in ring):
                raise ValueError(
                    "'footprint' has a ring that is not closed, or of less than four points of two numbers"
                )
            count += len(ring)
            for lon, lat in ring if count <= MAX_POINTS else ():
                check_position(lon, lat)
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError("'footprint' must have coordinates as GeoJSON has them") from error
    if not 0 < count <= MAX_POINTS:
        raise ValueError(f"'footprint' must have 4 to {MAX_POINTS} points, not {count}")


def check_position(lon: Any, lat: Any) -> None:
    if not (is_finite(lon) and -180 <= lon <= 180):
        raise ValueError(f"'footprint' has a longitude outside of -180 to 180: {shown(lon)}")
    if not (is_finite(lat) and -90 <= lat <= 90):
        raise ValueError(f"'footprint' has a latitude outside of -90 to 90: {shown(lat)}")


def polygons(shape: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yields the polygons of a footprint, each a list of rings; none of a point."""
    if shape["type"] == "Point":
        return
    yield from [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]


def bounds(shape: Mapping[str, Any]) -> Bounds:
    """Returns west, south, east and north of a checked footprint; west is larger than east across the dateline.

    The widest gap of longitudes without footprint lies outside. The box of a point is the point.
    """
    if shape["type"] == "Point":
        lon, lat = shape["coordinates"]
        return lon, lat, lon, lat
    points = [polygon[0] for polygon in polygons(shape)]
    south = min(lat for part in points for _, lat in part)
    north = max(lat for part in points for _, lat in part)
    spans = sorted((min(lon for lon, _ in part), max(lon for lon, _ in part)) for part in points)
    merged = [spans[0]]
    for low, high in spans[1:]:
        if low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    around = [*merged, (merged[0][0] + 360, 0.0)]
    gaps = [after[0] - before[1] for before, after in pairwise(around)]
    widest = max(range(len(gaps)), key=lambda place: gaps[place])
    if math.isclose(gaps[widest], 0, abs_tol=1e-9):
        return -180.0, south, 180.0, north
    return merged[(widest + 1) % len(merged)][0], south, merged[widest][1], north
