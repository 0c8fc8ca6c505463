"""Images of any number of bands with their measured values: TIFFs as members of shards.

    data = write_bands(values, valid, ["red", "green", "blue", "nir"])     (H, W, 4) of any real type -> bytes of a TIFF
    planes = read_bands(data, ("nir", "red"), choose, max_pixels)          the chosen window, float32 (2, h, w)

A TIFF keeps the type of the values, their names as descriptions of the bands, and which pixels are valid: invalid ones
hold the no-data value of tag 42113. Bands lie one after the other, so that a reader of three unpacks three. The bytes
depend on the values and on the version of GDAL only. Invalid pixels are read as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import image_errors
from priorclip.data_shards.images.decoding_work import check_work
from priorclip.data_shards.rasters.gdal import ADVICE, BLOCK, gdal_errors, has_rasterio, open_bytes, work_of
from priorclip.data_shards.rasters.layout import TIFF, find_layout
from priorclip.data_shards.rasters.scene import Scene
from priorclip.data_shards.rasters.values import ALL, ValueRule

WHOLE_SIDE, TILE = 512, 256  # pixels; a larger image is stored in tiles, so that a crop reads a part
WORK = 32  # bytes to unpack, for each pixel that an image may have

Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def write_bands(values: NDArray[Any], valid: NDArray[np.bool_], names: Sequence[str]) -> bytes:
    """Returns the image as a TIFF.

    Args:
        values: (H, W, B) of integers or floats of at most 32 bits, or 64-bit floats
        valid: which pixels are measurements, (H, W)
        names: B names, which become the descriptions of the bands
    """
    from rasterio.io import MemoryFile

    height, width, count = values.shape
    kind = values.dtype
    profile: dict[str, Any] = {"driver": "GTiff", "width": width, "height": height, "count": count, "dtype": kind.name}
    profile |= {"compress": "deflate", "predictor": 3 if kind.kind == "f" else 2, "interleave": "band"}
    profile |= {"photometric": "MINISBLACK"}
    if max(height, width) > WHOLE_SIDE:
        profile |= {"tiled": True, "blockxsize": TILE, "blockysize": TILE}
    else:
        profile |= {"blockysize": height}
    if not valid.all():
        profile["nodata"] = unused_value(values[valid])
        values = np.where(valid[..., None], values, kind.type(profile["nodata"]))
    with gdal_errors("a TIFF in memory"), MemoryFile() as file:
        with file.open(**profile) as dataset:
            dataset.write(np.moveaxis(values, -1, 0))
            for number, name in enumerate(names, 1):
                dataset.set_band_description(number, name)
        return bytes(file.getbuffer())


def unused_value(measured: NDArray[Any]) -> float:
    """Returns a value of the type that none of the measurements has: NaN for floats, else 0 or one from the top.

    Raises BadSample if an 8-bit image uses all of them.
    """
    if measured.dtype.kind == "f":
        return float("nan")
    limits = np.iinfo(measured.dtype)
    used = np.unique(measured)
    for value in chain((0,), range(int(limits.max), int(limits.min) - 1, -1)):
        place = int(np.searchsorted(used, value))
        if place == len(used) or used[place] != value:
            return float(value)
    raise BadSample("unsupported raster", f"its {measured.dtype} values leave none free for pixels without data")


def read_bands(
    data: bytes, bands: Sequence[str], choose: Callable[[int, int], Window], max_pixels: int
) -> NDArray[np.float32]:
    """Returns the measured values of some bands in a window, float32 (B, h, w); 0 where there is no data.

    Args:
        data: bytes of a TIFF
        bands: names, or numbers from 1, in the order of the result
        choose: returns the window for (width, height)
        max_pixels: larger images are refused

    Raises BadSample for other images, for a band that the image lacks, and for damaged or too large ones.
    """
    return read_measured(data, bands, choose, max_pixels)[0]


def read_measured(
    data: bytes, bands: Sequence[str] | None, choose: Callable[[int, int], Window], max_pixels: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], list[str]]:
    """Returns what ``read_bands`` returns, which pixels are valid (h, w), and the names of the bands.

    ``bands`` None takes all bands.
    """
    if not data.startswith(TIFF):
        raise BadSample("no bands", "data.bands reads TIFFs (pack --image-format tiff), and this image is none")
    if not has_rasterio():
        raise BadSample("needs rasterio", f"data.bands reads TIFFs with rasterio: {ADVICE}")
    with image_errors():
        layout = find_layout(data)
    if layout is not None and layout.orientation != 1:
        raise BadSample("unsupported raster", f"its tag of orientation is {layout.orientation}: save it upright")
    with open_bytes(data) as dataset:
        wide, high = dataset.width, dataset.height
        if wide * high > max_pixels:
            raise BadSample("too many pixels", f"{wide} x {high}, limit {max_pixels}")
        check_work(data, "TIFF", wide, high, max_pixels)
        scene = Scene(dataset, ValueRule(bands=tuple(bands) if bands else ALL))
        if scene.palette is not None:
            raise BadSample("unsupported raster", "a picture with a palette has no measured values")
        most = max(WORK * max_pixels, BLOCK)
        if (work := work_of(dataset, wide, high, len(scene.bands))) > most:
            raise BadSample("slow to decode", f"{work >> 20} MB to unpack, limit {most >> 20} MB")
        left, top, right, bottom = choose(wide, high)
        values, valid = scene.raw(left, top, right - left, bottom - top)
        names = scene.band_names()
    planes = np.moveaxis(values, -1, 0).astype(np.float32)
    planes[:, ~valid] = 0
    return planes, valid, names
