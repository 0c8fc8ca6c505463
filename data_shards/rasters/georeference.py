"""Where a window of a raster is: CRS, affine transform, footprint in lon/lat, ground sampling distance, time.

    place_of(dataset, 0, 0, 256, 256)
    {"crs": "EPSG:32633", "transform": [10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0], "gsd": 10.0,
     "footprint": {"type": "Polygon", "coordinates": [[[15.0, 45.15], ...]]}, "acquired": "2020-06-04T10:00:00"}

The footprint is WGS 84 in the axis order of GeoJSON (lon, lat). A window across the dateline becomes two polygons, as
RFC 7946 (3.1.9) asks, and a window around a pole reaches the pole. A raster without coordinates, or of another planet,
has no footprint.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

EDGE = 16  # points on each edge of a window, because straight edges of a projection bend on the globe
DEGREES, GRID = 7, 1e-7  # decimals of a footprint: 1 cm
AXIS, SQUEEZE = 6_378_137.0, 0.00669437999014  # of WGS 84: half of the equatorial axis in metres, eccentricity squared
DEGREE = 111_320.0  # metres of a degree of the equator: no degree is longer
TIMES = ("ACQUISITIONDATETIME", "ACQUISITION_DATE", "DATE_ACQUIRED", "SENSING_TIME", "datetime", "TIFFTAG_DATETIME")
TIME = re.compile(r"(\d{4})[-:/]?(\d\d)[-:/]?(\d\d)(?:[T ]?(\d\d):?(\d\d):?(\d\d))?")


def place_of(dataset: Any, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """Returns what is known of the place of a window; keys whose value is unknown are left out.

    Args:
        dataset: raster that rasterio has opened
        x, y, width, height: the window in pixels
    """
    crs, transform = coordinates(dataset)
    facts: dict[str, Any] = {"acquired": acquired(dataset)}
    if crs is not None:
        from affine import Affine

        own = transform @ Affine.translation(x, y)
        facts |= {"crs": name_of(crs), "transform": [float(value) for value in tuple(own)[:6]]}
        ring = edge_of(own, width, height)
        points = to_lon_lat(crs, ring)
        if points is not None:
            facts["gsd"] = ground_distance(crs, own, width, height)
            facts["footprint"] = footprint(points, facts["gsd"])
    return {name: value for name, value in facts.items() if value is not None}


def coordinates(dataset: Any) -> tuple[Any, Any]:
    """Returns (CRS, affine transform), if need be fitted to ground control points; (None, None) without coordinates."""
    if dataset.crs is not None and not dataset.transform.is_identity:
        return dataset.crs, dataset.transform
    points, crs = dataset.gcps
    if crs is not None and len(points) >= 3:
        from rasterio.transform import from_gcps

        return crs, from_gcps(points)
    return None, None


def name_of(crs: Any) -> str:
    """Returns EPSG:CODE, or the WKT of a CRS that has no code."""
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt())


def edge_of(transform: Any, width: int, height: int) -> NDArray[np.float64]:
    """Returns the closed outline (N, 2) of a window in its CRS, with EDGE points on each side."""
    steps = np.arange(EDGE) / EDGE
    ahead, zero, one = steps, np.zeros(EDGE), np.ones(EDGE)
    columns = np.concatenate([ahead, one, 1 - steps, zero, [0]]) * width
    lines = np.concatenate([zero, ahead, one, 1 - steps, [0]]) * height
    a, b, c, d, e, f = tuple(transform)[:6]
    return np.column_stack([a * columns + b * lines + c, d * columns + e * lines + f])


def to_lon_lat(crs: Any, points: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Returns points (N, 2) in WGS 84; None if one has no place there, as on another planet or off the globe."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError
    from rasterio.warp import transform

    try:
        lon, lat = transform(crs, "EPSG:4326", points[:, 0].tolist(), points[:, 1].tolist())[:2]
    except (RasterioError, CPLE_BaseError, ValueError):
        return None
    found = np.column_stack([lon, lat])
    inside = np.isfinite(found).all() and np.abs(found[:, 1]).max() <= 90 + 1e-6
    return found if inside else None


def footprint(points: NDArray[np.float64], gsd: float | None = None) -> dict[str, Any]:
    """Returns the GeoJSON polygon of a closed outline (N, 2) in lon/lat, cut at the dateline, with a pole inside it.

    Points without which the outline moves by less than a tenth of a pixel of ``gsd`` metres are left out.
    """
    from shapely import affinity, box, set_precision, union_all
    from shapely.geometry import MultiPolygon, Polygon, mapping
    from shapely.geometry.polygon import orient

    lon = np.unwrap(points[:, 0], period=360)
    lat = np.clip(points[:, 1], -90, 90)
    ring = list(zip(lon.tolist(), lat.tolist(), strict=True))
    turns = lon[-1] - lon[0]
    if abs(turns) > 180:  # the outline goes around a pole
        lon[-1], lat[-1] = lon[0] + math.copysign(360, turns), lat[0]
        ring[-1] = (float(lon[-1]), float(lat[-1]))
        pole = 90.0 if lat.mean() > 0 else -90.0
        ring += [(float(lon[-1]), pole), (float(lon[0]), pole)]
    whole = Polygon(ring).buffer(0)
    west, _, east, _ = whole.bounds
    parts: list[Polygon] = []
    for turn in range(math.floor((west + 180) / 360), math.floor((east + 180) / 360) + 1):
        piece = whole.intersection(box(360 * turn - 180, -90, 360 * turn + 180, 90))
        moved = affinity.translate(piece, -360 * turn)
        parts += [part for part in getattr(moved, "geoms", [moved]) if part.geom_type == "Polygon" and part.area]
    if abs(turns) > 180:
        joined = union_all(parts, grid_size=GRID)  # the two sides of the meridian where the outline begins
        parts = list(getattr(joined, "geoms", [joined]))
    parts = [part.simplify((gsd or 0) / DEGREE / 10) for part in parts]
    whole = set_precision(MultiPolygon(parts), GRID)
    parts = [orient(part) for part in getattr(whole, "geoms", [whole])]
    shape = mapping(parts[0] if len(parts) == 1 else MultiPolygon(parts))
    return {"type": shape["type"], "coordinates": rounded(shape["coordinates"])}


def rounded(values: Any) -> Any:
    return round(values, DEGREES) if isinstance(values, float) else [rounded(value) for value in values]


def ground_distance(crs: Any, transform: Any, width: int, height: int) -> float | None:
    """Returns the side in metres, on the ground, of a square with the area of the pixel in the window's middle."""
    a, b, c, d, e, f = tuple(transform)[:6]
    x, y = width / 2, height / 2
    corners = np.array([(x, y), (x + 1, y), (x, y + 1)])
    points = to_lon_lat(crs, np.column_stack([corners @ (a, b) + c, corners @ (d, e) + f]))
    if points is None:
        return None
    lon, lat = np.radians(np.unwrap(points[:, 0], period=360)), np.radians(points[:, 1])
    bulge = 1 - SQUEEZE * math.sin(lat[0]) ** 2
    north = AXIS * (1 - SQUEEZE) / bulge**1.5
    east = AXIS / math.sqrt(bulge) * math.cos(lat[0])
    right = (lon[1] - lon[0]) * east, (lat[1] - lat[0]) * north
    down = (lon[2] - lon[0]) * east, (lat[2] - lat[0]) * north
    return float(f"{math.sqrt(abs(right[0] * down[1] - right[1] * down[0])):.6g}")


def acquired(dataset: Any) -> str | None:
    """Returns the time of the tags as ISO 8601, or None."""
    tags = {**dataset.tags(), **dataset.tags(ns="IMAGERY")}
    for name in TIMES:
        found = TIME.match(str(tags.get(name, "")).strip())
        if found:
            date, clock = "-".join(found.groups()[:3]), found.groups()[3:]
            return f"{date}T{':'.join(clock)}" if all(clock) else date  # type: ignore[arg-type]
    return None
