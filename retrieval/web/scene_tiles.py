"""Draws the scenes of an index as the square tiles of a web map (z, x, y of the usual Mercator grid).

    tiles = SceneTiles(Path("scenes"), index.columns, value_rule(None))
    tiles.draw(14, 8823, 5650)      bytes of a PNG of 256 x 256, transparent without valid pixels; None if empty

A tile reads only the windows that it shows, with at most two pixels of the file for each of its own, from the
overviews of the file if there are some. A scene without overviews is left out of tiles that would unpack more than
MOST_WORK bytes. Somebody else may have written the index: a scene is a file below the folder that the user names, and
only formats that name no other file are opened (data_shards/rasters/gdal.py).
"""

from __future__ import annotations

import io
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from priorclip.common.output import get_logger
from priorclip.common.safe_paths import UnsafePath
from priorclip.data_shards.format.place import Bounds
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.rasters.gdal import ADVICE, has_rasterio, work_of
from priorclip.data_shards.rasters.georeference import coordinates
from priorclip.data_shards.rasters.scene import Scene
from priorclip.data_shards.rasters.values import ValueRule
from priorclip.data_shards.sources.scenes import open_scene
from priorclip.retrieval.places import PlaceColumns, touches

log = get_logger(__name__)

SIDE = 256  # pixels of a tile
DEEPEST = 24  # zoom; a pixel is 0.6 cm then
FINE = 2 * SIDE  # pixels of a file that are read for a side of a tile at most
KNOTS = 17  # points on a side whose place in the file is computed exactly; those between are interpolated
MOST_WORK = 256 << 20  # bytes that a tile may unpack of a scene
MOST_SCENES = 16  # of one tile
RADIUS, MERCATOR = 6_378_137.0, "EPSG:3857"  # of the grid, in metres


class SceneTiles:
    """The scenes of an index, below a folder.

    Args:
        folder: of the scenes, as `pack --images` had it
        columns: where the images of the index are
        rule: how values become 8 bits

    Raises:
        ValueError, FileNotFoundError: rasterio or the folder is missing
    """

    def __init__(self, folder: Path, columns: PlaceColumns, rule: ValueRule) -> None:
        if not has_rasterio():
            raise ValueError(f"--scenes needs rasterio: {ADVICE}")
        if not folder.is_dir():
            raise FileNotFoundError(f"--scenes {folder}: the folder does not exist")
        self.folder, self.columns, self.rule = folder, columns, rule
        self._ranges: dict[str, list[tuple[float, float]] | None] = {}
        self._lock = threading.Lock()  # of the ranges: the first tile of a scene computes them for all
        self._bad: set[str] = set()

    def draw(self, z: int, x: int, y: int) -> bytes | None:
        """Returns a tile as a PNG, or None if nothing is in it."""
        canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
        touching = touches(self.columns.bounds, tile_bounds(z, x, y)) & (self.columns.scene >= 0)
        for number in np.unique(self.columns.scene[touching])[:MOST_SCENES]:
            name = self.columns.names[number]
            try:
                with open_scene(self.folder, name, self.rule) as scene:
                    self._paint(canvas, scene, name, (z, x, y))
            except (BadSample, UnsafePath, OSError) as error:
                if name not in self._bad:
                    log.warning("%s is not on the map: %s", name, error)
                self._bad.add(name)
        if not canvas[..., 3].any():
            return None
        buffer = io.BytesIO()
        Image.fromarray(canvas, "RGBA").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def _paint(self, canvas: NDArray[np.uint8], scene: Scene, name: str, tile: tuple[int, int, int]) -> None:
        """Adds the pixels of a scene to those of ``canvas`` that are still empty."""
        found = file_pixels(scene.dataset, *tile)
        if found is None:
            return
        columns, rows = found
        wide, high = scene.size
        inside = (columns >= 0) & (columns < wide) & (rows >= 0) & (rows < high) & (canvas[..., 3] == 0)
        if not inside.any():
            return
        left, top = int(columns[inside].min()), int(rows[inside].min())
        width, height = int(columns[inside].max()) + 1 - left, int(rows[inside].max()) + 1 - top
        shape = (min(height, FINE), min(width, FINE))
        shrinks = max(height / shape[0], width / shape[1])
        if work_of(scene.dataset, width, height) > MOST_WORK and not covers(scene.dataset.overviews(1), shrinks):
            return
        with self._lock:
            if name not in self._ranges:
                self._ranges[name] = scene.ranges
        scene.ranges = self._ranges[name]
        values, valid = scene.raw(left, top, width, height, shape)
        down = ((rows[inside] - top) * shape[0] / height).astype(int).clip(0, shape[0] - 1)
        across = ((columns[inside] - left) * shape[1] / width).astype(int).clip(0, shape[1] - 1)
        pixels = scene.paint(values, valid)[down, across]
        canvas[inside] = np.column_stack([pixels, np.where(valid[down, across], 255, 0)])


def covers(overviews: list[int], shrinks: float) -> bool:
    """Tells whether a file has an overview that makes reading with this reduction cheap."""
    return any(factor * 4 >= shrinks for factor in overviews)


def tile_bounds(z: int, x: int, y: int) -> Bounds:
    """Returns west, south, east, north of a tile in degrees."""
    return longitude(x, z), latitude(y + 1, z), longitude(x + 1, z), latitude(y, z)


def longitude(x: float, z: int) -> float:
    return x / 2**z * 360 - 180


def latitude(y: float, z: int) -> float:
    return math.degrees(math.atan(math.sinh(math.pi * (1 - 2 * y / 2**z))))


def file_pixels(dataset: Any, z: int, x: int, y: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Returns column and row (SIDE, SIDE) in the file of the middle of each pixel of a tile; NaN away from the scene.

    Returns None for a file without coordinates, or away from the tile. KNOTS x KNOTS points of what both share
    are exact; the others are interpolated, which is wrong by less than a pixel where the projection is smooth.
    """
    from rasterio.transform import array_bounds
    from rasterio.warp import transform, transform_bounds

    crs, affine = coordinates(dataset)
    if crs is None:
        return None
    half = math.pi * RADIUS
    west, east = ((at / 2**z * 2 - 1) * half for at in (x, x + 1))
    north, south = ((1 - at / 2**z * 2) * half for at in (y, y + 1))
    left, bottom, right, top = transform_bounds(crs, MERCATOR, *array_bounds(dataset.height, dataset.width, affine))
    across, columns = shared_knots(west, east, left, right)
    down, rows = shared_knots(north, south, top, bottom)
    if across is None or down is None:
        return None
    places = np.meshgrid(across, down)
    points = np.asarray(transform(MERCATOR, crs, places[0].ravel(), places[1].ravel()))
    a, b, c, d, e, f = tuple(~affine)[:6]
    grids = np.stack([a * points[0] + b * points[1] + c, d * points[0] + e * points[1] + f])
    grids = grids.reshape(2, KNOTS, KNOTS)
    low, share = split(rows)
    lines = grids[:, low] * (1 - share)[:, None] + grids[:, low + 1] * share[:, None]
    low, share = split(columns)
    whole = lines[:, :, low] * (1 - share) + lines[:, :, low + 1] * share
    return whole[0], whole[1]


def shared_knots(
    begin: float, end: float, low: float, high: float
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
    """Returns KNOTS places in what two intervals share, and where among them the middles of a tile's pixels lie.

    Args:
        begin, end: the tile's edges, in the order of its pixels
        low, high: the scene's edges, in the same order

    Middles outside are NaN. The first value is None if the intervals share nothing.
    """
    sign = 1 if end > begin else -1
    first, last = sign * max(sign * begin, sign * low), sign * min(sign * end, sign * high)
    middles = begin + (np.arange(SIDE) + 0.5) / SIDE * (end - begin)
    if sign * (last - first) <= 0:
        return None, middles
    where = (middles - first) / (last - first) * (KNOTS - 1)
    where[(where < 0) | (where > KNOTS - 1)] = np.nan
    return np.linspace(first, last, KNOTS), where


def split(places: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the knot before each place, and the share of the way to the next; NaN stays in the share."""
    low = np.nan_to_num(places).astype(np.int64).clip(0, KNOTS - 2)
    return low, places - low
