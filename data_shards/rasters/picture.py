"""The whole of a small raster as an 8-bit RGB picture, with rasterio, or with Pillow if that reads it right.

    picture = raster_picture(data, find_layout(data), max_pixels, rule)
    picture.info["raster"]     {"type": "uint16", "range": [[133.0, 2810.0], ...], "valid": 0.98, ...}

Without rasterio, what Pillow cannot read right is refused with the advice to install it, and never read wrong.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decoding_work import check_work
from priorclip.data_shards.rasters.gdal import ADVICE, BLOCK, has_rasterio, open_bytes, work_of
from priorclip.data_shards.rasters.layout import ORIENTATION, Layout
from priorclip.data_shards.rasters.scene import Scene
from priorclip.data_shards.rasters.values import ValueRule, find_ranges, has_data, to_bytes

WORK = 32  # bytes to unpack, for each pixel that an image may have
SUFFIXES = {"TIFF": ".tif", "JPEG2000": ".jp2", "PNG": ".png"}


def raster_picture(data: bytes, layout: Layout, max_pixels: int, rule: ValueRule) -> Image.Image:
    """Returns the RGB picture. ``info["raster"]`` says how the values became 8 bits.

    Args:
        data: the encoded raster
        layout: its layout
        max_pixels: larger rasters are refused
        rule: how values become 8 bits

    Raises:
        BadSample: the raster is too large, damaged, complex, has no valid pixels, or needs rasterio, which is missing
    """
    check_layout(data, layout, max_pixels)
    if has_rasterio():
        picture, facts = with_rasterio(data, layout, max_pixels, rule)
    elif layout.pillow:
        picture, facts = with_pillow(data, layout, rule)
    else:
        raise BadSample("needs rasterio", f"{layout}: {ADVICE}")
    if facts["valid"] <= 0 or facts["valid"] < rule.min_valid:
        raise BadSample("too few valid pixels", f"{facts['valid']:.1%} of {layout}")
    result = Image.fromarray(picture)
    if has_rasterio():  # Pillow has turned it already
        result.getexif()[ORIENTATION] = layout.orientation
    result.info["raster"] = facts
    return result


def check_layout(data: bytes, layout: Layout, max_pixels: int) -> None:
    """Raises BadSample for a raster that is complex or too large, from its header."""
    if layout.complex:
        raise BadSample("unsupported raster", f"{layout}: complex values have no picture, save their magnitude")
    if layout.width * layout.height > max_pixels:
        raise BadSample("too many pixels", f"{layout.width} x {layout.height}, limit {max_pixels}")
    check_work(data, layout.kind, layout.width, layout.height, max_pixels)


def with_rasterio(data: bytes, layout: Layout, limit: int, rule: ValueRule) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    try:
        with open_bytes(data, SUFFIXES[layout.kind]) as dataset:
            if dataset.width * dataset.height > limit:
                raise BadSample("too many pixels", f"{dataset.width} x {dataset.height}, limit {limit}")
            most = max(WORK * limit, BLOCK)
            if (work := work_of(dataset, dataset.width, dataset.height)) > most:
                raise BadSample("slow to decode", f"{layout}: {work >> 20} MB to unpack, limit {most >> 20} MB")
            scene = Scene(dataset, rule)
            wide, high = scene.size
            pixels = np.empty((high, wide, 3), np.uint8)
            valid = 0.0
            for first, rows in scene.strips():
                pixels[first : first + rows], share = scene.read(0, first, wide, rows)
                valid += share * rows / high
            return pixels, scene.facts(valid)
    except BadSample as error:
        if error.reason != "unreadable image":
            raise
        raise BadSample(error.reason, f"{layout}: {error.detail}") from error


def with_pillow(data: bytes, layout: Layout, rule: ValueRule) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Reads a raster whose values Pillow keeps: one band of up to 32 bits, or 8 bits in an unusual compression."""
    with Image.open(io.BytesIO(data)) as image:
        deep = image.mode[0] in "IF"
        values = np.asarray(image if deep else image.convert("RGB"))
    values = values[..., None] if values.ndim == 2 else values
    values = values.astype(layout.type) if deep else values
    nodata = number_or_none(layout.nodata)
    valid = has_data(values[..., 0], nodata) if deep else np.ones(values.shape[:2], bool)
    ranges = None
    facts: dict[str, Any] = {"bands": ["1"] if deep else ["red", "green", "blue"], "type": layout.type}
    if deep:
        try:
            ranges = find_ranges([values[..., 0][valid]], rule)
        except ValueError as error:
            raise BadSample("unsupported raster", str(error)) from error
        facts |= {"range": [list(pair) for pair in ranges], "range_from": rule.how}
    pixels = to_bytes(values, valid, ranges, rule.fill)
    facts["valid"] = round(float(valid.mean()), 4)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*valid.shape, 3))), facts


def number_or_none(text: str | None) -> float | None:
    """Returns the no-data value of a tag; None if the tag holds no number, as GDAL takes it."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
