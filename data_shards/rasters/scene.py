"""A raster that rasterio has opened: which bands make the picture, the range of its values, and pixels of a window.

    scene = Scene(dataset, rule)
    scene.bands            (3, 2, 1): red, green and blue of a file of blue, green, red and near infrared
    scene.ranges           [(133.0, 2810.0), ...], or None for 8-bit data
    pixels, share = scene.read(0, 0, 256, 256)     uint8 (256, 256, 3), share of valid pixels

Memory is bounded: statistics and pictures are made of strips of at most STRIP pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.rasters.values import ALL, SENSORS, ValueRule, find_ranges, has_data, to_bytes

STRIP = 1 << 20  # pixels that are in memory at a time
SAMPLE = 1 << 22  # pixels of a scene that the percentiles are made of; a scene with fewer pixels is read whole
ALIASES = {"grey": "gray", "near infrared": "nir", "b04": "red", "b03": "green", "b02": "blue", "b08": "nir"}


class Scene:
    """A raster and the rule by which it becomes 8-bit. Raises BadSample for bands that the rule names and it lacks."""

    def __init__(self, dataset: Any, rule: ValueRule) -> None:
        self.dataset, self.rule = dataset, rule
        self.names = band_names(dataset, rule.sensor)
        self.palette = self._palette()
        self.bands = self._choose()
        self.types = {np.dtype(dataset.dtypes[band - 1]) for band in self.bands}

    @property
    def deep(self) -> bool:
        """Whether the values need a range: they have more than 8 bits, or a sign."""
        return self.types != {np.dtype(np.uint8)}

    @property
    def size(self) -> tuple[int, int]:
        return self.dataset.width, self.dataset.height

    def _palette(self) -> NDArray[np.uint8] | None:
        """Returns the colours (N, 3) of a raster of one band with a colour map; None for others."""
        from rasterio.enums import ColorInterp

        if self.dataset.colorinterp[0] != ColorInterp.palette or self.dataset.dtypes[0] not in ("uint8", "uint16"):
            return None
        colours = self.dataset.colormap(1)
        table = np.zeros((max(colours) + 1, 3), np.uint8)
        for value, colour in colours.items():
            table[value] = colour[:3]
        return table

    def _choose(self) -> tuple[int, ...]:
        """Returns the numbers, from 1, of three bands, or of one."""
        from rasterio.enums import ColorInterp

        kinds = self.dataset.colorinterp
        measured = [at for at, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
        if not measured:
            raise BadSample("unsupported raster", "its only band is alpha")
        if self.rule.bands == ALL:
            return tuple(measured)
        if self.rule.bands is not None and self.palette is None:
            return tuple(self._number(name) for name in self.rule.bands)
        for wanted in (
            tuple(kinds.index(kind) + 1 if kind in kinds else 0 for kind in colour_kinds()),
            tuple(self.names.get(name, 0) for name in ("red", "green", "blue")),
        ):
            if all(wanted):
                return wanted
        return tuple(measured[:3]) if len(measured) >= 3 else (measured[0],)

    def _number(self, name: str) -> int:
        if name.isdigit() and 1 <= int(name) <= self.dataset.count:
            return int(name)
        found = self.names.get(ALIASES.get(name.lower(), name.lower()))
        if found is None:
            known = ", ".join(self.names) or "none, so give numbers, or a sensor by --value-range"
            raise BadSample("no such band", f"{name!r} of {self.dataset.count} bands; names: {known}")
        return found

    def raw(
        self, x: int, y: int, width: int, height: int, shape: tuple[int, int] | None = None
    ) -> tuple[NDArray, NDArray[np.bool_]]:
        """Returns the values (H, W, B) of a window inside the raster, and which pixels are valid (H, W).

        ``shape`` is (H, W) if that is not the window's own: the nearest pixels, or those of the file's overviews.
        """
        from rasterio.windows import Window

        window = Window(x, y, width, height)
        high, wide = shape or (height, width)
        chosen = list(self.bands)
        values = np.moveaxis(self.dataset.read(chosen, window=window, out_shape=(len(chosen), high, wide)), 0, -1)
        valid = self.dataset.dataset_mask(window=window, out_shape=(high, wide)) > 0
        known = np.zeros_like(valid)
        whole = np.ones_like(valid)
        for place, band in enumerate(self.bands):
            known |= has_data(values[..., place], self.dataset.nodatavals[band - 1])
            whole &= has_data(values[..., place])  # a marker in one band makes the pixel invalid
        return values, valid & known & whole

    def strips(self) -> Iterator[tuple[int, int]]:
        """Yields (first row, rows) of strips that follow the file's blocks as far as they are small enough."""
        wide, high = self.size
        block = self.dataset.block_shapes[0][0]
        most = max(1, STRIP // wide)
        rows = min(high, most // block * block if most >= block else most)
        for first in range(0, high, rows):
            yield first, min(rows, high - first)

    @cached_property  # a tile sets it to what the whole scene has
    def ranges(self) -> list[tuple[float, float]] | None:
        """Black and white of each band, from the valid pixels of the whole raster; None keeps 8-bit values.

        Above SAMPLE pixels the statistics use strips at even distances.
        """
        if not self.deep or self.palette is not None:
            return None
        if self.rule.ranges is not None:
            return self._range_of([np.empty(0)] * len(self.bands))
        strips = list(self.strips())
        wanted = -(-SAMPLE // max(1, self.size[0] * strips[0][1]))
        chosen = sorted({int(at) for at in np.linspace(0, len(strips) - 1, min(wanted, len(strips)))})
        found: list[list[NDArray]] = [[] for _ in self.bands]
        for at in chosen:
            first, rows = strips[at]
            values, valid = self.raw(0, first, self.size[0], rows)
            for place, band in enumerate(self.bands):
                plane = values[..., place][valid]
                found[place].append(plane[has_data(plane, self.dataset.nodatavals[band - 1])])
        return self._range_of([np.concatenate(parts) for parts in found])

    def _range_of(self, columns: list[NDArray]) -> list[tuple[float, float]]:
        try:
            return find_ranges(columns, self.rule)
        except ValueError as error:
            raise BadSample("unsupported raster", str(error)) from error

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], float]:
        """Returns the picture (H, W, 3) of a window inside the raster, and its share of valid pixels."""
        values, valid = self.raw(x, y, width, height)
        return self.paint(values, valid), float(valid.mean())

    def paint(self, values: NDArray, valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Returns the picture (H, W, 3) of what ``raw`` returned."""
        if self.palette is not None:
            pixels = self.palette[np.minimum(values[..., 0], len(self.palette) - 1)]
            pixels[~valid] = self.rule.fill
        else:
            pixels = to_bytes(values, valid, self.ranges, self.rule.fill)
        return np.broadcast_to(pixels, (*valid.shape, 3)) if pixels.shape[2] == 1 else pixels

    def band_names(self) -> list[str]:
        """Returns the names of the bands as the file describes them, else by the sensor, else their numbers."""
        return [self.dataset.descriptions[band - 1] or self._name(band) for band in self.bands]

    def facts(self, share: float, measured: bool = False) -> dict[str, Any]:
        """Returns what KEY.json keeps of the pixels: bands, type, the share of valid pixels, and the range.

        ``measured`` says that the values are kept, so that they have no range.
        """
        facts: dict[str, Any] = {
            "bands": self.band_names(),
            "type": self.dataset.dtypes[self.bands[0] - 1],
            "valid": round(share, 4),
        }
        if not measured and self.ranges is not None:
            facts |= {"range": [list(pair) for pair in self.ranges], "range_from": self.rule.how}
        return facts

    def _name(self, band: int) -> str:
        return next((name for name, number in self.names.items() if number == band), str(band))


def colour_kinds() -> tuple[Any, ...]:
    from rasterio.enums import ColorInterp

    return ColorInterp.red, ColorInterp.green, ColorInterp.blue


def band_names(dataset: Any, sensor: str | None) -> dict[str, int]:
    """Returns name -> number of each band with a name, from the sensor's table, else from the file's descriptions."""
    if sensor is not None and (order := SENSORS[sensor].bands.get(dataset.count)):
        return {name: number for number, name in enumerate(order, 1)}
    names = [(text or "").strip().lower() for text in dataset.descriptions]
    found = {ALIASES.get(name, name): number for number, name in reversed(list(enumerate(names, 1))) if name}
    for number, kind in enumerate(dataset.colorinterp, 1):
        if kind.name not in ("gray", "undefined", "alpha", "palette"):
            found.setdefault(kind.name, number)
    return dict(sorted(found.items(), key=lambda item: item[1]))
