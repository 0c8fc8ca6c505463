"""Mean and deviation of each band, as `data_shards stats` measured them: data.statistics.

read_band_statistics("data/bands-stats/stats.json")      {"red": (812.4, 390.1), "nir": (2410.7, 1103.9), ...}
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from priorclip.common.untrusted_json import read_object

LARGEST = 64 << 20  # bytes of a stats.json


def read_band_statistics(path: str | Path) -> dict[str, tuple[float, float]]:
    """Returns (mean, deviation) by the name of the band.

    Raises:
        FileNotFoundError: no such file
        ValueError: it has no bands, or their figures are no finite numbers; the message names the file and the band
    """
    place = Path(path)
    if place.is_dir():
        place = place / "stats.json"
    if not place.is_file():
        raise FileNotFoundError(f"data.statistics {place}: no such file; `data_shards stats --output DIR` writes it")
    rasters = read_object(place, LARGEST).get("rasters")
    bands = rasters.get("bands") if isinstance(rasters, dict) else None
    if not isinstance(bands, dict) or not bands:
        raise ValueError(f"data.statistics {place} has no bands: are its shards rasters (pack --image-format tiff)?")
    return {
        name: mean_and_deviation(facts, f"data.statistics {place}: the band {name[:60]!r}")
        for name, facts in bands.items()
    }


def mean_and_deviation(facts: Any, what: str) -> tuple[float, float]:
    """Returns the two figures of a band. Raises ValueError, which begins with ``what``, for others."""
    values = [facts.get(key) for key in ("mean", "deviation")] if isinstance(facts, dict) else [None]
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if len(numbers) != 2:
        raise ValueError(f"{what} has no finite mean and deviation")
    if numbers[1] <= 0:
        raise ValueError(f"{what} is the same everywhere; leave it out")
    return numbers[0], numbers[1]
