"""Large rasters, cut into tiles: `--source raster`.

    scenes/T33/a.tif, 10,980 x 10,980 pixels     T33/a/000000-000000, T33/a/000000-000192, ...  (row and column)

With ``measured`` a tile is a TIFF of all chosen bands (rasters/band_file.py), otherwise a JPEG.

Reading the source reads each scene's header and the range of its values. A tile is read, scaled and encoded when it is
packed, so that memory holds one tile. Tiles follow each other every ``stride`` pixels; the last ones of a row or column
move back, so that they end with the scene. A scene smaller than a tile is one tile. A scene that cannot be read is one
record too, which packing leaves out, counts and lists in quarantine.jsonl. tile_texts.py gives classes and texts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from priorclip.common.output import get_logger
from priorclip.common.url_secrets import has_bare_password
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.rasters.band_file import write_bands
from priorclip.data_shards.rasters.gdal import ADVICE, check_plain, has_rasterio, open_file, open_url, work_of
from priorclip.data_shards.rasters.georeference import place_of
from priorclip.data_shards.rasters.values import ValueRule
from priorclip.data_shards.rasters.virtual import checked_vrt
from priorclip.data_shards.remote.urls import public_url
from priorclip.data_shards.sources.folder import walk_names
from priorclip.data_shards.sources.names import image_path, sample_key
from priorclip.data_shards.sources.record import Missing, Record
from priorclip.data_shards.sources.tile_texts import TextSource

if TYPE_CHECKING:
    from priorclip.data_shards.rasters.scene import Scene

log = get_logger(__name__)

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt")
MIN_TILE, MAX_TILE = 16, 4096
MAX_TILES = 1 << 20  # of a scene; each takes 600 bytes of memory
MAX_WORK = 4 << 30  # bytes that GDAL unpacks for one tile


@dataclass(frozen=True, slots=True)
class Tile:
    """A window of a scene, which becomes a JPEG when it is read.

    Args:
        folder: folder of the scenes, or the URL of the scene
        name: the scene, relative to ``folder``; host and path of a URL
        window: left, top, width, height in pixels
        rule: how values become 8 bits
        ranges: black and white of each band, from the whole scene; None for 8-bit data
        quality: JPEG quality
    """

    folder: str = field(repr=False)
    name: str
    window: tuple[int, int, int, int]
    rule: ValueRule
    ranges: tuple[tuple[float, float], ...] | None
    quality: int

    def load(self, record: Record) -> Record:
        with open_scene(self.folder, self.name, self.rule) as scene:
            scene.ranges = None if self.ranges is None else list(self.ranges)
            pixels, share = scene.read(*self.window)
            refuse_empty(record.key, share, self.rule)
            facts = {"raster": scene.facts(share), **place_of(scene.dataset, *self.window)}
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=self.quality)
        return replace(record, image=buffer.getvalue(), extra={**record.extra, **facts})


@dataclass(frozen=True, slots=True)
class BandTile(Tile):
    """A window of a scene, which becomes a TIFF of all chosen bands with their measured values."""

    def load(self, record: Record) -> Record:
        with open_scene(self.folder, self.name, self.rule) as scene:
            values, valid = scene.raw(*self.window)
            share = float(valid.mean())
            refuse_empty(record.key, share, self.rule)
            facts = {"raster": scene.facts(share, measured=True), **place_of(scene.dataset, *self.window)}
            data = write_bands(values, valid, scene.band_names())
        return replace(record, image=data, extra={**record.extra, **facts})


def refuse_empty(key: str, share: float, rule: ValueRule) -> None:
    """Raises BadSample for a tile of which too few pixels are valid."""
    if share <= 0 or share < rule.min_valid:
        raise BadSample("too few valid pixels", f"{share:.1%} of {key}")


@contextmanager
def open_scene(folder: str | Path, name: str, rule: ValueRule) -> Iterator[Scene]:
    """Opens a scene below the folder, or that of a URL. Raises BadSample, also for what the body reads from it."""
    from priorclip.data_shards.rasters.scene import Scene

    opened = open_url(str(folder)) if is_url(folder) else open_file(image_path(Path(folder), name))
    with opened as dataset:
        yield Scene(dataset, rule)


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def url_scenes(images: str | Sequence[str]) -> list[tuple[str, str]]:
    """Returns the URLs of --images, each with the name of its scene: host and path, without secrets. None of a folder.

    Raises ValueError for a scheme that is not read, and for folders beside URLs.
    """
    if isinstance(images, str):
        images = [images] if not is_url(images) else re.split(r",(?=\w+://)", images)
    urls = [text.strip() for text in images]
    if not any(map(is_url, urls)):
        return []
    for url in urls:
        if urlsplit(url).scheme not in ("http", "https") or has_bare_password(url.partition("://")[2]):
            raise ValueError(f"--images {public_url(url)}: scenes are read from a folder, http:// and https://")
    return [(url, urlunsplit(urlsplit(public_url(url))._replace(scheme="", query="")).lstrip("/")) for url in urls]


def raster(
    images: str | Path | Sequence[str],
    rule: ValueRule,
    tile: int = 256,
    stride: int | None = None,
    quality: int = 90,
    texts: TextSource | None = None,
    max_bad_share: float = 0.5,
    measured: bool = False,
) -> list[Record]:
    """Cuts the scenes below a folder into tiles.

    Args:
        images: the folder; or URLs of cloud optimized GeoTIFFs, comma-separated or a list
        rule: how values become 8 bits; percentiles are those of the whole scene, so that neighbours keep their contrast
        tile: side of a tile in pixels
        stride: pixels from a tile to the next; None takes ``tile``, so that tiles do not overlap
        quality: JPEG quality of the tiles
        texts: where classes and texts come from; None gives none
        max_bad_share: largest share of scenes that may be unreadable
        measured: tiles are TIFFs of the chosen bands with their measured values, and no 8-bit JPEGs

    Raises:
        ValueError, FileNotFoundError: an option is wrong, rasterio is missing, too many scenes cannot be read, or no
            tile has a text where texts are given
    """
    stride = tile if stride is None else stride
    if not MIN_TILE <= tile <= MAX_TILE:
        raise ValueError(f"--tile must be a side in pixels, {MIN_TILE} to {MAX_TILE}, not {tile}")
    if not 1 <= stride <= tile:
        raise ValueError(f"--stride must be 1 to the side of a tile ({tile}), so that no pixel is lost, not {stride}")
    if not has_rasterio():
        raise ValueError(f"--source raster needs rasterio: {ADVICE}")
    scenes = url_scenes(images if isinstance(images, str) else [str(images)] if isinstance(images, Path) else images)
    where = f"of {len(scenes)} URLs" if scenes else f"below {images}"
    scenes = scenes or folder_scenes(Path(str(images) if isinstance(images, str | Path) else one_folder(images)))
    texts = texts or TextSource()
    records: list[Record] = []
    for folder, name in scenes:
        records += tiles(folder, name, rule, tile, stride, None if measured else quality, texts)
    bad = [record for record in records if isinstance(record.image, Missing)]
    if len(bad) == len(records):
        raise ValueError(f"none of {len(scenes)} scenes {where} can be read, see the warnings above")
    if len(bad) > max_bad_share * len(scenes):
        raise ValueError(
            f"{len(bad)} of {len(scenes)} scenes {where} cannot be read, see the warnings above: "
            f"more than --max-bad-share {max_bad_share:g} allows"
        )
    texts.warn_of_unused()
    if texts and not any(record.captions or record.label for record in records):
        raise ValueError("no tile has a class or a text: do the coordinates, or the names of the scenes, fit?")
    return records


def one_folder(images: Sequence[str]) -> str:
    """Returns the folder of a list of one. Raises ValueError for several."""
    if len(images) != 1:
        raise ValueError(f"--images takes one folder of scenes, or URLs, not {len(images)} folders")
    return images[0]


def folder_scenes(root: Path) -> list[tuple[str, str]]:
    """Returns the folder and the relative name of each scene in it, without those that a virtual raster joins.

    Raises FileNotFoundError if there is no folder, or no scene in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"scene folder {root} does not exist")
    names = walk_names(root, lambda name: name.lower().endswith(SUFFIXES))
    if not names:
        raise FileNotFoundError(f"no scene ({', '.join(SUFFIXES)}) below {root}")
    parts = virtual_parts(root, names)
    return [(str(root), name) for name in names if name not in parts]


def virtual_parts(root: Path, names: Sequence[str]) -> set[str]:
    """Returns the scenes that a virtual raster of the folder joins, so that their ground is not cut twice."""
    files = {str((root / name).absolute()): name for name in names}
    parts: set[str] = set()
    for name in names:
        if name.lower().endswith(".vrt"):
            with suppress(BadSample):  # ``tiles`` says why
                found = {files.get(str(path)) for path in checked_vrt(root / name, check_plain)[1]} - {None}
                parts |= {each for each in found if each is not None}
                log.info("%s joins %d scenes of the folder, which are not cut by themselves", name, len(found))
    return parts


def tiles(
    folder: str | Path, name: str, rule: ValueRule, tile: int, stride: int, quality: int | None, texts: TextSource
) -> list[Record]:
    """Returns the tiles of a scene; one record that says why, with a warning, if it cannot be read.

    ``quality`` None makes TIFFs of measured values.
    """
    folder, key = str(folder), sample_key(name)
    source = urlsplit(public_url(folder)).netloc if is_url(folder) else Path(folder).name
    try:
        with open_scene(folder, name, rule) as scene:
            check_tiles(scene.dataset, tile, stride, len(scene.bands))
            (wide, high), found = scene.size, None if quality is None else scene.ranges
            if quality is None and scene.palette is not None:
                raise BadSample("unsupported raster", "a picture with a palette has no measured values to keep")
            located = "footprint" in place_of(scene.dataset, 0, 0, wide, high)
            notes = texts.scene(name, scene) if texts else None
    except BadSample as error:
        log.warning("%s is left out: %s", name, error)
        return [Record(key, Missing(error.reason, f"{name}: {error.detail}"), source=source)]
    ranges = None if found is None else tuple(found)
    if ranges is not None:
        shown = ", ".join(f"{low:g} to {high:g}" for low, high in ranges)
        log.info("%s: black to white is %s (%s)", name, shown, rule.how)
    if not located:
        log.warning("%s has no coordinates on the Earth, so its tiles have no footprint", name)
    records = []
    for y, x in product(starts(high, tile, stride), starts(wide, tile, stride)):
        window = x, y, min(tile, wide), min(tile, high)
        kind = BandTile if quality is None else Tile
        place = kind(folder, name, window, rule, ranges, quality or 0)
        record = Record(f"{key}/{y:06d}-{x:06d}", place, source=source)
        record.extra = {"scene": name, "window": list(window)}
        if notes is not None:
            note, shares = notes.of(window)
            record.label, record.captions = note.label, note.captions
            record.extra |= {"shares": shares} if shares else {}
        records.append(record)
    return records


def check_tiles(dataset: Any, tile: int, stride: int, bands: int = 3) -> None:
    """Raises BadSample for a scene of too many tiles, or of which a tile takes too long to read."""
    across, down = (max(0, side - tile) // stride + 1 for side in (dataset.width, dataset.height))
    if across * down > MAX_TILES:
        raise BadSample("too many tiles", f"{across * down}, limit {MAX_TILES}: cut the scene, or set --tile, --stride")
    if (work := work_of(dataset, tile, tile, bands)) > MAX_WORK:
        raise BadSample("slow to decode", f"{work >> 20} MB to unpack for a tile, limit {MAX_WORK >> 20} MB")


def starts(length: int, tile: int, stride: int) -> list[int]:
    """Returns where tiles begin, so that they cover the length; the last one ends with it."""
    last = max(0, length - tile)
    return [*range(0, last, stride), last]
