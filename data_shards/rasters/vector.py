"""Reads classes and texts with their shapes: GeoJSON, GeoPackage or Shapefile, in any CRS.

    layer = read_vector(Path("landuse.gpkg"), None, "class", ["text"])
    layer.notes[7]                              Note("forest", ["a forest of firs"])
    shapes = in_pixels(layer, crs, transform, 10980, 10980)      # [(shape in the scene's pixels, note), ...]

GeoJSON is read here, by json and shapely; GeoPackage and Shapefile by pyogrio, after a look at their first bytes. So a
file with one of these suffixes and other content, such as a virtual format that names files, is not opened.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import BadSample, require_encodable

LON_LAT = "EPSG:4326"  # of GeoJSON without the old member "crs"
GEOPACKAGE, SHAPEFILE = b"SQLite format 3\0", b"\0\0\x27\x0a"
SUFFIXES = {".geojson": "GeoJSON", ".json": "GeoJSON", ".gpkg": "GPKG", ".shp": "ESRI Shapefile"}
MARGIN = 0.05  # of the neighbourhood to which shapes are cut, as a share of the scene
Window = tuple[float, float, float, float]
DENSE = 64  # an edge is no longer than one of so many parts of the scene, because straight edges bend in another CRS
LABEL_FIELDS = ("label", "class", "scene_class", "category", "name")
CAPTION_FIELDS = ("captions", "caption", "text", "description")


@dataclass(frozen=True)
class Note:
    """What a shape says of the ground under it.

    Args:
        label: class or None
        captions: texts, may be empty
    """

    label: str | None
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layer:
    """Shapes in one CRS, each with its note.

    Args:
        shapes: shapely geometries, 2-D and valid
        notes: as many
        crs: of the shapes, as rasterio takes it
    """

    shapes: list[Any]
    notes: list[Note]
    crs: str

    @cached_property
    def tree(self) -> Any:
        import shapely

        return shapely.STRtree(self.shapes)


def read_vector(path: Path, layer: str | None, label_field: str | None, caption_fields: Sequence[str] | None) -> Layer:
    """Reads the shapes that have a class or a text.

    Args:
        path: .geojson, .json, .gpkg or .shp
        layer: of a GeoPackage with several
        label_field: field of the class; None takes the first of LABEL_FIELDS that the file has
        caption_fields: fields of texts; None takes the first of CAPTION_FIELDS

    Raises:
        FileNotFoundError, ValueError: the file is missing, of another kind or damaged, or has no such field
    """
    kind = SUFFIXES.get(path.suffix.lower())
    if not path.is_file():
        raise FileNotFoundError(f"--vector {path}: the file does not exist")
    if kind is None:
        raise ValueError(f"--vector {path} must be one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("shapely") is None:
        raise ValueError("--vector needs shapely: pip install 'priorclip-pretraining[geo]'")
    shapes, rows, crs = read_geojson(path) if kind == "GeoJSON" else read_with_pyogrio(path, kind, layer)
    names = list(dict.fromkeys(name for row in rows for name in row))
    label, captions = choose_fields(f"--vector {path}", names, label_field, caption_fields)
    notes = [note_of(row, label, captions) for row in rows]
    kept = [place for place, note in enumerate(notes) if (note.label or note.captions) and shapes[place] is not None]
    if not kept:
        raise ValueError(f"--vector {path}: no shape has a value in {', '.join(filter(None, (label, *captions)))}")
    return Layer([valid(shapes[place]) for place in kept], [notes[place] for place in kept], crs)


def choose_fields(
    source: str, names: Sequence[str], label_field: str | None, caption_fields: Sequence[str] | None
) -> tuple[str | None, tuple[str, ...]]:
    """Returns the fields of the class and of the texts. Raises ValueError, which lists the fields that are there."""
    shown = ", ".join(names) or "none"
    wanted = (("--label-field", [label_field] if label_field else []), ("--caption-field", caption_fields or []))
    for option, given in wanted:
        missing = [name for name in given if name not in names]
        if missing:
            raise ValueError(f"{source} has no field {', '.join(missing)} ({option}); it has: {shown}")
    lower = {name.lower(): name for name in reversed(names)}
    label, captions = label_field, tuple(caption_fields or ())
    if label is None:
        label = next((lower[name] for name in LABEL_FIELDS if name in lower), None)
    if not captions:
        captions = tuple(lower[name] for name in CAPTION_FIELDS if name in lower)[:1]
    if label is None and not captions:
        raise ValueError(
            f"{source}: name the field of the class or the text, --label-field or --caption-field: {shown}"
        )
    return label, captions


def note_of(row: Mapping[str, Any], label: str | None, captions: Sequence[str]) -> Note:
    """Returns the note of a row. A list counts as several texts, a blank or missing value as none."""
    texts = [text for name in captions for text in texts_of(row.get(name))]
    return Note(next(iter(texts_of(row.get(label)) if label else []), None), list(dict.fromkeys(texts)))


def texts_of(value: Any) -> list[str]:
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return []
    values = value if isinstance(value, list | tuple | np.ndarray) else [value]
    found = []
    for each in values:
        if isinstance(each, float | np.floating) and float(each).is_integer():
            each = int(each)  # Shapefile keeps class numbers as floats
        text = " ".join(str(each).replace("\0", " ").split())
        try:
            found += [require_encodable(text, "text")] if text else []
        except BadSample as error:
            raise ValueError(f"a text is not UTF-8: {error}") from error
    return found


def read_geojson(path: Path) -> tuple[list[Any], list[dict[str, Any]], str]:
    """Returns shapes (None without a geometry), properties and CRS. Raises ValueError, which names the feature."""
    import shapely

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        found = content["features"] if content["type"] == "FeatureCollection" else [content]
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ValueError("its features are no list of objects")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--vector {path} is no GeoJSON: {type(error).__name__}: {error}") from error
    shapes, rows = [], []
    for number, feature in enumerate(found):
        try:
            geometry, row = feature["geometry"], feature.get("properties") or {}
            shapes.append(None if geometry is None else shapely.from_geojson(json.dumps(geometry)))
            rows.append(dict(row))
        except (ValueError, KeyError, TypeError, RecursionError, shapely.errors.ShapelyError) as error:
            raise ValueError(f"--vector {path}, feature {number}: {type(error).__name__}: {error}") from error
    return shapes, rows, geojson_crs(content, path)


def geojson_crs(content: Mapping[str, Any], path: Path) -> str:
    """Returns the CRS of a GeoJSON: lon/lat, or what the member "crs" of files before RFC 7946 names."""
    member = content.get("crs")
    if member is None:
        return LON_LAT
    try:
        name = str(member["properties"]["name"])
    except (KeyError, TypeError) as error:
        raise ValueError(f'--vector {path}: its "crs" has no name') from error
    return LON_LAT if name.upper().endswith("CRS84") else name


def read_with_pyogrio(path: Path, kind: str, layer: str | None) -> tuple[list[Any], list[dict[str, Any]], str]:
    """Returns shapes, fields and CRS of a GeoPackage or a Shapefile. Raises ValueError."""
    import shapely

    if importlib.util.find_spec("pyogrio") is None:
        raise ValueError(f"--vector {path} needs pyogrio: pip install 'priorclip-pretraining[geo]'")
    with open(path, "rb") as file:
        begins = file.read(16)
    if not begins.startswith(GEOPACKAGE if kind == "GPKG" else SHAPEFILE):
        raise ValueError(f"--vector {path} is no {kind}, whatever its name says")
    import pyogrio

    try:
        layers = pyogrio.list_layers(path)[:, 0].tolist()
        if layer is None and len(layers) > 1:
            raise ValueError(f"--vector {path} has several layers, name one by --layer: {', '.join(layers)}")
        if layer is not None and layer not in layers:
            raise ValueError(f"--layer {layer}: --vector {path} has the layers {', '.join(layers)}")
        facts, _, geometry, columns = pyogrio.raw.read(path, layer=layer or layers[0], force_2d=True)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError, RuntimeError) as error:
        raise ValueError(f"--vector {path} cannot be read: {error}") from error
    if facts["crs"] is None:
        raise ValueError(f"--vector {path} does not say its coordinate system (CRS): a Shapefile needs its .prj")
    if geometry is None:
        raise ValueError(f"--vector {path} has no shapes")
    names = [str(name) for name in facts["fields"]]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)] or [{} for _ in geometry]
    return list(shapely.from_wkb(geometry)), rows, str(facts["crs"])


def valid(shape: Any) -> Any:
    import shapely

    return shapely.make_valid(shapely.force_2d(shape))


def in_pixels(layer: Layer, crs: Any, transform: Any, width: int, height: int) -> list[tuple[Any, Note]]:
    """Returns the shapes that touch a scene, cut to it and in its pixels, with their notes.

    Shapes are cut to the neighbourhood of the scene before they change their CRS, because a country has points that the
    scene's CRS does not know.

    Args:
        layer: the shapes
        crs: of the scene
        transform: affine, pixels to the CRS
        width, height: of the scene in pixels

    Raises ValueError if the CRS of the layer is unknown or does not lead to that of the scene.
    """
    import shapely
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError
    from rasterio.warp import transform as move

    from priorclip.data_shards.rasters.georeference import edge_of

    a, b, c, d, e, f = tuple(~transform)[:6]

    def to_scene(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = (np.asarray(each) for each in move(layer.crs, crs, points[:, 0].tolist(), points[:, 1].tolist())[:2])
        return np.column_stack([a * x + b * y + c, d * x + e * y + f])

    scene, found = shapely.box(0, 0, width, height), []
    outline = edge_of(transform, width, height)
    try:
        x, y = (np.asarray(each) for each in move(crs, layer.crs, outline[:, 0].tolist(), outline[:, 1].tolist())[:2])
        for window in windows_around(x, y, is_geographic(layer.crs)):
            frame = shapely.box(*window)
            step = max(window[2] - window[0], window[3] - window[1]) / DENSE
            for place in sorted(layer.tree.query(frame, predicate="intersects").tolist()):
                near = shapely.segmentize(layer.shapes[place].intersection(frame), step)
                here = shapely.make_valid(shapely.transform(near, to_scene)).intersection(scene)
                if not here.is_empty:
                    found.append((here, layer.notes[place]))
    except (RasterioError, CPLE_BaseError) as error:
        raise ValueError(f"--vector: its CRS {layer.crs[:60]} does not lead to that of the scene: {error}") from error
    return found


def is_geographic(crs: str) -> bool:
    from rasterio.crs import CRS

    return bool(CRS.from_user_input(crs).is_geographic)


def windows_around(x: NDArray[np.float64], y: NDArray[np.float64], degrees: bool) -> list[Window]:
    """Returns rectangles (left, bottom, right, top) that hold an outline and a margin; two across the dateline."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return []  # the scene has no place in this CRS
    turned = np.unwrap(x, period=360) if degrees else x
    left, right, bottom, top = (float(each) for each in (turned.min(), turned.max(), y.min(), y.max()))
    margin = max(right - left, top - bottom) * MARGIN
    left, right, bottom, top = left - margin, right + margin, bottom - margin, top + margin
    if not degrees:
        return [(left, bottom, right, top)]
    if abs(turned[-1] - turned[0]) > 180:  # around a pole
        return [(-180, bottom, 180, 90) if y.mean() > 0 else (-180, -90, 180, top)]
    turns = range(math.floor((left + 180) / 360), math.floor((right + 180) / 360) + 1)
    return [(max(left - 360 * turn, -180), bottom, min(right - 360 * turn, 180), top) for turn in turns]
