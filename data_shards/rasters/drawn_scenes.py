"""`data_shards synthetic`: writes drawn scenes as GeoTIFFs with coordinates, and a GeoJSON of what is where.

    OUTPUT/scene-000.tif     red, green, blue (and nir), uint8 or uint16 (reflectance x 10,000), tiled, deflate, UTM
           places.geojson    a polygon in lon/lat for each drawn scene, with window, label, captions, attributes

The scenes stand side by side in one CRS with a gap of their own width between them, each acquired a day later.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from priorclip.common.files import folder_aside
from priorclip.data_shards.rasters.gdal import ADVICE, has_rasterio
from priorclip.data_shards.rasters.georeference import edge_of, footprint, to_lon_lat
from priorclip.data_shards.synthetic.dice import generator
from priorclip.data_shards.synthetic.land import Land, check_land, draw_land

if TYPE_CHECKING:
    from priorclip.data_shards.commands import SyntheticConfig

PLACES = "places.geojson"
REFLECTANCE = 10_000  # of white, in 16 bits
WHITE = 0.3  # reflectance of the brightest visible pixel, so that 0,3000 is the range of the scene
FIRST_DAY = datetime(2024, 6, 1, 10, 30, tzinfo=UTC)
SPECKLE = 6  # purpose of the stream of random numbers; 0 to 5 are in synthetic/scene.py
NAMES = ("red", "green", "blue", "nir")


def write_drawn_scenes(config: SyntheticConfig) -> list[Path]:
    """Draws the scenes and writes the folder. Returns the paths of the scenes.

    Raises:
        ValueError: an option is wrong, or rasterio is missing
        FileExistsError: the folder exists and has files
    """
    output = Path(config.output)
    check_options(config)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is not empty: name a new folder")
    features: list[dict[str, Any]] = []
    names = [f"scene-{number:03d}.tif" for number in range(config.count)]
    with folder_aside(output) as aside:
        for number, name in enumerate(names):
            first = config.first_index + number * (config.size // config.cell) ** 2
            land = draw_land(config.seed, first, config.size, config.cell, config.bands == "rgbn")
            transform = place_scene(config, number)
            write_scene(aside / name, land, transform, config, number)
            features += describe(land, name, transform, config.crs, config.gsd)
        collection = {"type": "FeatureCollection", "features": features}
        (aside / PLACES).write_text(json.dumps(collection) + "\n", encoding="utf-8")
    return [output / name for name in names]


def check_options(config: SyntheticConfig) -> None:
    """Raises ValueError, which names the option and what it takes."""
    if not has_rasterio():
        raise ValueError(f"data_shards synthetic writes GeoTIFFs with rasterio, which is missing: {ADVICE}")
    check_land(config.size, config.cell)
    for name, value, least in (("count", config.count, 1), ("first-index", config.first_index, 0)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    if config.seed < 0:
        raise ValueError(f"--seed must not be negative, not {config.seed}")
    if not 0.01 <= config.gsd <= 1000:
        raise ValueError(f"--gsd must be metres a pixel, 0.01 to 1000, not {config.gsd}")
    crs = projected(config.crs)
    for number in (0, config.count - 1):
        if not on_the_globe(crs, edge_of(place_scene(config, number), config.size, config.size)):
            raise ValueError(
                f"scene {number} of --crs {config.crs} is off the globe: choose other --left, --top and --gsd"
            )


def on_the_globe(crs: Any, points: NDArray[np.float64]) -> bool:
    """Tells whether points (N, 2) have a place in lon/lat that leads back to them."""
    from rasterio.warp import transform

    found = to_lon_lat(crs, points)
    if found is None:
        return False
    back = transform("EPSG:4326", crs, found[:, 0].tolist(), found[:, 1].tolist())
    return bool(np.allclose(np.column_stack(back[:2]), points, rtol=0, atol=1.0))


def projected(name: str) -> Any:
    """Returns the CRS of a name. Raises ValueError for an unknown one, or one whose unit is not the metre."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        crs = CRS.from_user_input(name)
        if crs.is_projected and crs.linear_units in ("metre", "meter"):
            return crs
    except CRSError as error:
        raise ValueError(f"--crs {name!r} is unknown: give an EPSG code such as EPSG:32632") from error
    raise ValueError(f"--crs {name} does not count in metres: give a projected one, such as EPSG:32632 (UTM)")


def place_scene(config: SyntheticConfig, number: int) -> Any:
    """Returns the affine transform of a scene."""
    from rasterio.transform import from_origin

    shift = 2 * number * config.size * config.gsd
    return from_origin(config.left + shift, config.top, config.gsd, config.gsd)


def write_scene(path: Path, land: Land, transform: Any, config: SyntheticConfig, number: int) -> None:
    """Writes a GeoTIFF in tiles, with names of the bands and the time of acquisition."""
    import rasterio

    rng = generator(config.seed, SPECKLE, config.first_index + number)
    bands = bands_of(land, config.type, rng)
    side = min(256, max(16, config.size // 16 * 16))
    profile: dict[str, Any] = {"driver": "GTiff", "count": len(bands), "dtype": config.type, "crs": config.crs}
    profile |= {"height": config.size, "width": config.size, "transform": transform, "compress": "deflate"}
    profile |= {"tiled": True, "blockxsize": side, "blockysize": side, "interleave": "pixel"}
    colours = "RGB" if config.type == "uint8" else "MINISBLACK"
    with rasterio.open(path, "w", photometric=colours, predictor=2, **profile) as file:
        for place, (name, band) in enumerate(zip(NAMES, bands, strict=False), 1):
            file.write(band, place)
            file.set_band_description(place, name)
        time = FIRST_DAY + timedelta(days=number)
        file.update_tags(TIFFTAG_DATETIME=time.strftime("%Y:%m:%d %H:%M:%S"))


def bands_of(land: Land, kind: str, rng: np.random.Generator) -> list[NDArray]:
    """Returns the bands in the type of the file: grey levels of 8 bits, or reflectance x 10,000."""
    visible = [land.image[..., channel] for channel in range(3)]
    if kind == "uint8":
        heat = [] if land.infrared is None else [np.rint(land.infrared.astype(np.float32) * 255).astype(np.uint8)]
        return [*visible, *heat]
    step = REFLECTANCE * WHITE / 256
    deep = [(step * (band + rng.random(band.shape, np.float32))).astype(np.uint16) for band in visible]
    if land.infrared is not None:
        deep.append(np.rint(land.infrared.astype(np.float32) * REFLECTANCE).astype(np.uint16))
    return deep


def describe(land: Land, name: str, transform: Any, crs: str, gsd: float) -> list[dict[str, Any]]:
    """Returns a GeoJSON feature for each drawn scene of a land."""
    from affine import Affine

    features = []
    for cell in land.cells:
        x, y, width, height = cell.window
        points = to_lon_lat(projected(crs), edge_of(transform @ Affine.translation(x, y), width, height))
        assert points is not None, "the options were checked"
        features.append(
            {
                "type": "Feature",
                "geometry": footprint(points, gsd),
                "properties": {
                    "scene": name,
                    "window": list(cell.window),
                    "label": cell.label,
                    "caption": cell.captions[0],
                    "captions": cell.captions,
                    "attributes": cell.attributes,
                },
            }
        )
    return features
