"""Small rasters as sensors and GDAL write them, for the tests of measurements and scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin


def reflectance(bands: int, high: int = 64, wide: int = 80, top: float = 3000) -> np.ndarray:
    """Returns a smooth field (bands, high, wide) of floats between 0 and ``top``, another one in each band."""
    y, x = np.mgrid[0:high, 0:wide]
    return np.stack([(np.sin(x / (9 + band)) + np.cos(y / 7) + 2) / 4 * top for band in range(bands)])


def write_raster(path: Path, values: np.ndarray, georeferenced: bool = True, **options: Any) -> Path:
    """Writes values (bands, high, wide); ``mask``, ``colormap``, ``names`` and ``tags`` are written beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extras = {name: options.pop(name, None) for name in ("mask", "colormap", "names", "tags", "colours")}
    profile: dict[str, Any] = {"driver": "GTiff", "count": len(values), "dtype": values.dtype}
    profile |= {"height": values.shape[1], "width": values.shape[2]}
    if georeferenced:
        profile |= {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10)}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **(profile | options)) as file:
        if extras["colours"] is not None:
            file.colorinterp = extras["colours"]
        file.write(values)
        if extras["mask"] is not None:
            file.write_mask(extras["mask"])
        if extras["colormap"] is not None:
            file.write_colormap(1, extras["colormap"])
        for number, name in enumerate(extras["names"] or (), 1):
            file.set_band_description(number, name)
        if extras["tags"] is not None:
            file.update_tags(**extras["tags"])
    return path
