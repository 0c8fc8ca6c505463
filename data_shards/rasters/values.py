"""Which values become black and white: a stated range, a sensor's, or percentiles of the valid pixels of the scene.

    rule = value_rule("0,3000")                  stated, for all bands; "0,3000;0,2500;0,2000" for each band
    rule = value_rule("sentinel2-l2a")           the sensor's range and band names
    rule = value_rule(None)                      percentiles 2 to 98, each band by itself
    ranges = find_ranges(values, valid, rule)    [(0.0, 3000.0), ...]
    to_bytes(values, valid, ranges, fill=0)      uint8; clipped to the range, invalid pixels are the fill

The depth of the container says nothing: reflectance of 0 to 3,000 in 16 bits would be black. Pixels without data (the
declared value, masks, alpha, NaN, and values that only stand for "nothing", such as -9999 and -3.4e38) never enter a
statistic. A few extreme values far away from all others do not enter one either, because 65535 often marks a defect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ALL = ("all",)  # bands of a rule: every band that is measured, which alpha is not
GREY = 128  # of an image whose valid pixels are all equal
HUGE = 1e30  # a larger magnitude is a marker: -3.4e38, 1e36
MARKERS = (-9999.0, -99999.0, -32768.0, -32767.0)  # no measurement of signed types has exactly these
RARE = 100  # an outlier is at most one in so many values, or a single one
GAP = 4  # an extreme value further from the next than this many times the spread of all others is an outlier


@dataclass(frozen=True)
class Sensor:
    """A sensor: the values of black and white, and the order of its bands in files of this many bands.

    Args:
        low, high: black and white in the product's digital numbers
        bands: names by the number of bands; ``combinations`` names them
    """

    low: float
    high: float
    bands: dict[int, tuple[str, ...]]


_S2 = ("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir2", "watervapour")
SENSORS = {
    # Reflectance x 10,000. Level 2A has no cirrus band, some files keep its place.
    "sentinel2-l2a": Sensor(
        0,
        3000,
        {
            4: ("blue", "green", "red", "nir"),
            10: ("blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir2", "swir1", "swir2"),
            12: (*_S2, "swir1", "swir2"),
            13: (*_S2, "cirrus", "swir1", "swir2"),
        },
    ),
    # Reflectance = 0.0000275 x value - 0.2, so that these are reflectances 0 and 0.3.
    "landsat-c2-l2": Sensor(
        7273,
        18182,
        {
            4: ("blue", "green", "red", "nir"),
            6: ("blue", "green", "red", "nir", "swir1", "swir2"),
            7: ("coastal", "blue", "green", "red", "nir", "swir1", "swir2"),
        },
    ),
    "naip": Sensor(0, 255, {3: ("red", "green", "blue"), 4: ("red", "green", "blue", "nir")}),
    "planetscope": Sensor(
        0,
        3000,
        {
            4: ("blue", "green", "red", "nir"),
            8: ("coastal", "blue", "green1", "green", "yellow", "red", "rededge1", "nir"),
        },
    ),
}
COMBINATIONS = {
    "natural-colour": ("red", "green", "blue"),
    "false-colour": ("nir", "red", "green"),
    "agriculture": ("swir1", "nir", "blue"),
    "urban": ("swir2", "swir1", "red"),
    "shortwave-infrared": ("swir2", "nir", "red"),
}


@dataclass(frozen=True)
class ValueRule:
    """How values become 8 bits. It is stored in the manifest.

    Args:
        ranges: stated (low, high), one for all bands or one for each; None takes percentiles
        percentiles: percentiles of the valid values that become black and white
        sensor: name in SENSORS, for the names of the bands
        bands: names or numbers (from 1) of the bands that become red, green and blue, or of one grey band; any number
            of them where measured values are kept, and ALL for all
        fill: grey level of pixels without data
        min_valid: smallest share of valid pixels of a picture; at least one pixel must be valid
    """

    ranges: tuple[tuple[float, float], ...] | None = None
    percentiles: tuple[float, float] = (2.0, 98.0)
    sensor: str | None = None
    bands: tuple[str, ...] | None = None
    fill: int = 0
    min_valid: float = 0.0

    @property
    def how(self) -> str:
        """The rule in words, for the log and the manifest."""
        if self.sensor:
            return f"the range of {self.sensor}"
        if self.ranges is not None:
            return "the stated range"
        return f"percentiles {self.percentiles[0]:g} to {self.percentiles[1]:g} of the valid pixels of each image"


DEFAULT = ValueRule()


def value_rule(
    text: str | None = None,
    percentiles: str = "2,98",
    bands: str | None = None,
    fill: int = 0,
    min_valid: float = 0.0,
    measured: bool = False,
) -> ValueRule:
    """Returns the rule of the options --value-range, --percentiles, --bands, --fill and --min-valid.

    ``measured`` says that the values are kept, so that there may be any number of bands.

    Raises ValueError, which names the option and what it takes.
    """
    if not 0 <= fill <= 255:
        raise ValueError(f"--fill must be a grey level, 0 to 255, not {fill}")
    if not 0 <= min_valid <= 1:
        raise ValueError(f"--min-valid must be a share, 0 to 1, not {min_valid}")
    low, high = number_pair("--percentiles", percentiles)
    if not 0 <= low < high <= 100:
        raise ValueError(f"--percentiles must be two numbers such as 2,98, the first one smaller, not {percentiles!r}")
    names: tuple[str, ...] | None = ALL if measured else None
    if bands is not None and not (measured and bands.strip() == ALL[0]):
        names = COMBINATIONS.get(bands.strip()) or tuple(name.strip() for name in bands.split(","))
        if measured and (not all(names) or len(set(names)) < len(names)):
            raise ValueError(f"--bands must be different names or numbers, such as red,green,blue,nir, not {bands!r}")
        if not measured and (len(names) not in (1, 3) or not all(names)):
            known = ", ".join(COMBINATIONS)
            raise ValueError(
                f"--bands must be one or three, such as red,green,blue or 4,3,2, or {known}, not {bands!r} "
                "(--image-format tiff takes any number)"
            )
    sensor: str | None = None
    ranges: tuple[tuple[float, float], ...] | None = None
    if text is not None and text in SENSORS:
        sensor, ranges = text, ((SENSORS[text].low, SENSORS[text].high),)
    elif text is not None:
        ranges = tuple(number_pair("--value-range", part) for part in text.split(";"))
        if any(a >= b for a, b in ranges):
            raise ValueError(f"--value-range: black must be smaller than white, not {text!r}")
    return ValueRule(ranges, (low, high), sensor, names, fill, min_valid)


def number_pair(option: str, text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        also = f", LOW,HIGH;LOW,HIGH;... for each band, or one of {', '.join(SENSORS)}" if "range" in option else ""
        raise ValueError(f"{option} must be LOW,HIGH{also}, not {text!r}") from error
    if not np.isfinite((low, high)).all():
        raise ValueError(f"{option} must be finite, not {text!r}")
    return low, high


def has_data(values: NDArray, nodata: float | None = None) -> NDArray[np.bool_]:
    """Returns which values are measurements: not the no-data value, NaN, infinite or a marker such as -9999."""
    known = np.ones(values.shape, bool)
    if nodata is not None and not np.isnan(nodata):
        known &= values != (values.dtype.type(nodata) if values.dtype.kind == "f" else nodata)
    if values.dtype.kind == "f":
        known &= np.isfinite(values) & (np.abs(values) < HUGE)
    if values.dtype.kind in "fi" and values.dtype.itemsize > 1:
        for marker in MARKERS:
            known &= values != marker
    return known


def find_ranges(columns: Sequence[NDArray], rule: ValueRule) -> list[tuple[float, float]]:
    """Returns black and white for each band.

    Args:
        columns: the valid values of each band, in any order
        rule: the rule of the scene

    Raises ValueError if the rule states ranges for another number of bands.
    """
    if rule.ranges is not None:
        if len(rule.ranges) not in (1, len(columns)):
            raise ValueError(f"--value-range has {len(rule.ranges)} ranges, and the picture has {len(columns)} bands")
        return list(rule.ranges) * (len(columns) if len(rule.ranges) == 1 else 1)
    return [percentile_range(without_outliers(values), rule.percentiles) for values in columns]


def percentile_range(values: NDArray, percentiles: tuple[float, float]) -> tuple[float, float]:
    if not len(values):
        return 0.0, 0.0
    low, high = np.percentile(values, percentiles)
    if low == high:  # most values are equal: take all of them, so that the rest is seen
        low, high = values.min(), values.max()
    return float(low), float(high)


def without_outliers(values: NDArray) -> NDArray:
    """Returns the values without an extreme value far away from all others: a lone one, or the type's largest."""
    levels, counts = np.unique(values, return_counts=True)
    rare = counts <= max(1, len(values) // RARE)
    if values.dtype.kind in "iu":
        rare |= levels == np.iinfo(values.dtype).max
    first, last = 0, len(levels) - 1
    if last >= 2 and rare[last] and gap(levels[last], levels[last - 1]) > GAP * gap(levels[last - 1], levels[0]):
        last -= 1
    if last - first >= 2 and rare[0] and gap(levels[1], levels[0]) > GAP * gap(levels[last], levels[1]):
        first += 1
    if (first, last) == (0, len(levels) - 1):
        return values
    return values[(values >= levels[first]) & (values <= levels[last])]


def gap(large: np.generic, small: np.generic) -> float:
    return float(large) - float(small)  # type: ignore[arg-type]


def to_bytes(
    values: NDArray, valid: NDArray[np.bool_], ranges: Sequence[tuple[float, float]] | None, fill: int
) -> NDArray[np.uint8]:
    """Returns 8-bit values (H, W, B): low becomes 0, high 255, invalid pixels the fill.

    Args:
        values: (H, W, B)
        valid: (H, W)
        ranges: (low, high) of each band; None keeps 8-bit values
        fill: grey level of invalid pixels
    """
    result = np.empty(values.shape, np.uint8)
    for band in range(values.shape[2]):
        plane = values[..., band]
        if ranges is None:
            result[..., band] = plane
            continue
        low, high = ranges[band]
        with np.errstate(all="ignore"):  # invalid pixels may hold anything
            scaled = (
                (plane.astype(np.float64) - low) * (255 / (high - low)) if high > low else np.full_like(plane, GREY)
            )
            result[..., band] = np.clip(np.nan_to_num(scaled.astype(np.float32)) + 0.5, 0, 255).astype(np.uint8)
    result[~valid] = fill
    return result
