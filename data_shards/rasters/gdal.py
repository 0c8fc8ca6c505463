"""Opens rasters with rasterio (GDAL) so that a file can neither reach other files nor the network, nor run code.

    with open_bytes(data) as dataset: ...            a TIFF, JPEG 2000 or PNG in memory
    with open_file(Path("scenes/a.tif")) as dataset: ...   a file below a folder of the user
    with open_url("https://host/a.tif") as dataset: ...    a TIFF of a server, of which only the needed blocks are read

Only the drivers of DRIVERS are used, and VRT after virtual.py has checked what it names. GDAL looks for no neighbours
(.aux.xml, .ovr), and keeps CACHE bytes of blocks. A file whose single block would take more than BLOCK bytes is
refused, because GDAL unpacks whole blocks; so is one with too many bands or too long sides. rasterio is an extra
(``pip install 'priorclip-pretraining[geo]'``), and nothing here is imported before it is needed.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from priorclip.common.url_secrets import mask_urls
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decoding_work import check_scene
from priorclip.data_shards.rasters.virtual import checked_vrt
from priorclip.data_shards.remote.urls import public_url

ADVICE = "pip install 'priorclip-pretraining[geo]' reads it"
DRIVERS = ["GTiff", "JP2OpenJPEG", "PNG"]
CACHE = 64 << 20  # bytes of unpacked blocks that GDAL keeps
BLOCK = 256 << 20  # bytes of one unpacked block
MAX_SIDE = 1 << 22  # pixels; a line of the raster is in memory as a whole
MAX_BANDS = 4096
SETTINGS = {
    "GDAL_CACHEMAX": CACHE,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_VRT_ENABLE_RAWRASTERBAND": "NO",
    "GDAL_NUM_THREADS": "1",
    "GDAL_HTTP_TIMEOUT": "60",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_MAX_RETRY": "3",
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
    "GDAL_HTTP_NETRC": "NO",
    "CPL_VSIL_CURL_USE_HEAD": "NO",
    "PROJ_NETWORK": "OFF",
}


@cache
def has_rasterio() -> bool:
    return importlib.util.find_spec("rasterio") is not None


@contextmanager
def gdal_errors(name: str) -> Iterator[None]:
    """Turns what rasterio raises for a file into BadSample, which names the file."""
    import rasterio
    from rasterio._err import CPLE_BaseError  # GDAL's own errors, which some calls do not wrap
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # we report its errors, each once
    with rasterio.Env(**SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            yield
        except (RasterioError, CPLE_BaseError, OSError, ValueError, MemoryError) as error:
            if isinstance(error, BadSample):
                raise
            cause = error.__cause__ or error
            raise BadSample("unreadable image", mask_urls(f"{name}: {type(cause).__name__}: {cause}")) from error


@contextmanager
def open_bytes(data: bytes, suffix: str = ".tif") -> Iterator[Any]:
    """Opens an encoded raster. Raises BadSample, also for what the body reads from it."""
    from rasterio.io import MemoryFile

    with gdal_errors("the image"), MemoryFile(data, ext=suffix) as file, file.open(driver=DRIVERS) as dataset:
        check_blocks(dataset)
        yield dataset


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Opens a raster file, also a virtual one (.vrt). Raises BadSample, also for what the body reads from it."""
    if path.suffix.lower() != ".vrt":
        with open_plain(path) as dataset:
            yield dataset
        return
    from rasterio.io import MemoryFile

    text = checked_vrt(path, check_plain)[0]
    with gdal_errors(path.name), MemoryFile(text.encode(), ext=".vrt") as file, file.open(driver=["VRT"]) as dataset:
        check_blocks(dataset)
        yield dataset


@contextmanager
def open_plain(path: Path) -> Iterator[Any]:
    """Opens a raster file of the formats that name no other file. Raises BadSample, as ``open_file``."""
    from rasterio.io import DatasetReader

    if not path.is_file():
        raise BadSample("missing file", str(path))
    check_work_of_tiles(path)
    with gdal_errors(path.name), DatasetReader(str(path.absolute()), driver=DRIVERS, sharing=False) as dataset:
        check_blocks(dataset)
        yield dataset


@contextmanager
def open_url(url: str) -> Iterator[Any]:
    """Opens a TIFF of a server that answers requests for ranges. Raises BadSample, as ``open_file``.

    Only a user's command line may give the URL. GDAL reads the header, and the blocks of the windows that are read.
    """
    from rasterio.io import DatasetReader

    with gdal_errors(public_url(url)), DatasetReader(f"/vsicurl/{url}", driver=["GTiff"], sharing=False) as dataset:
        check_blocks(dataset)
        yield dataset


def once_a_file(check: Callable[[Path], None]) -> Callable[[Path], None]:
    """Returns a check that runs again only if the file has another size or time, because each tile opens its scene."""
    remembered = lru_cache(maxsize=4096)(lambda path, size, changed: check(path))

    def call(path: Path) -> None:
        about = path.stat()
        remembered(path, about.st_size, about.st_mtime_ns)

    return call


@once_a_file
def check_plain(path: Path) -> None:
    """Raises BadSample if ``open_plain`` cannot open the file."""
    with open_plain(path):
        pass


check_work_of_tiles = once_a_file(check_scene)


def check_blocks(dataset: Any) -> None:
    """Raises BadSample if a block or a line would take too much memory, or if its values are complex."""
    if max(dataset.width, dataset.height) > MAX_SIDE:
        raise BadSample("too many pixels", f"{dataset.width} x {dataset.height}, limit {MAX_SIDE} on a side")
    if dataset.count > MAX_BANDS:
        raise BadSample("unsupported raster", f"{dataset.count} bands, limit {MAX_BANDS}")
    for (high, wide), kind in zip(dataset.block_shapes, dataset.dtypes, strict=True):
        if kind.startswith("complex"):
            bands = f"{dataset.count} {'band' if dataset.count == 1 else 'bands'} of {kind}"
            raise BadSample("unsupported raster", f"{bands}: complex values have no picture, save their magnitude")
        size = high * wide * np.dtype(kind).itemsize * bands_together(dataset)
        if size > BLOCK:
            raise BadSample(
                "too many pixels", f"one block of {wide} x {high} takes {size >> 20} MB, limit {BLOCK >> 20}"
            )


def bands_together(dataset: Any) -> int:
    """Returns the number of bands that are unpacked when one is read."""
    return dataset.count if dataset.interleaving is not None and dataset.interleaving.name == "pixel" else 1


def work_of(dataset: Any, width: int, height: int, bands: int = 3) -> int:
    """Returns the bytes that GDAL unpacks at most for a window of this size, for so many bands."""
    high, wide = dataset.block_shapes[0]
    across, down = (
        min(-(-side // block) + 1, -(-whole // block))
        for side, block, whole in ((width, wide, dataset.width), (height, high, dataset.height))
    )
    together = bands_together(dataset)
    itemsize = max(np.dtype(kind).itemsize for kind in dataset.dtypes)
    return across * wide * down * high * itemsize * (together if together > 1 else min(bands, dataset.count))
