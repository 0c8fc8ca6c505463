"""Where and when the images of an index are, and which of them a search is limited to.

    INDEX/places.safetensors   "bounds" (N, 4) float64: west, south, east, north in degrees, west > east across the
                               dateline, NaN if unknown; "time" (N,) float64: seconds since 1970 (UTC), NaN if unknown;
                               "scene" (N,) int32: number of the scene, -1 without one
          scenes.json          the names of the scenes

    within = Within.parse(bbox="8,48,9,49", time="2024-06/2024-07", scene="T32/*")
    within.rows(columns)       rows of the images that touch the box, were acquired in the time, and are of such scenes

The box is compared with the box around a footprint. An image without the value that a limit needs is left out.
"""

from __future__ import annotations

import calendar
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from priorclip.common.untrusted_json import read_regular
from priorclip.data_shards.format.place import Bounds, bounds

PLACES, SCENES = "places.safetensors", "scenes.json"
MAX_SCENES = 1 << 28  # bytes of scenes.json
MOMENT = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):(\d\d)(?::(\d\d))?Z?)?)?)?")


@dataclass(frozen=True)
class PlaceColumns:
    """What an index knows of the places of its images, a row for each. See above."""

    bounds: NDArray[np.float64]
    time: NDArray[np.float64]
    scene: NDArray[np.int32]
    names: list[str]

    @classmethod
    def of(cls, places: Sequence[Mapping[str, Any]]) -> PlaceColumns | None:
        """Returns the columns of the images' places, which may be empty; None if all are."""
        if not any(places):
            return None
        unknown = (np.nan,) * 4
        numbers: dict[str, int] = {}
        scene = [numbers.setdefault(place["scene"], len(numbers)) if "scene" in place else -1 for place in places]
        return cls(
            np.array([bounds(each["footprint"]) if "footprint" in each else unknown for each in places], np.float64),
            np.array([moment(each["acquired"])[0] if "acquired" in each else np.nan for each in places], np.float64),
            np.array(scene, np.int32),
            list(numbers),
        )

    @classmethod
    def joined(cls, parts: Sequence[tuple[PlaceColumns | None, int]]) -> PlaceColumns | None:
        """Returns the columns of several parts one after the other: columns, or None, and the number of images.

        They are those that ``of`` returns for all images together; None if no part has any.
        """
        known = [part for part, _ in parts if part is not None]
        if not known:
            return None
        names = [name for part in known for name in part.names]
        first = np.cumsum([0, *(len(part.names) for part in known)])
        offsets = iter(first.tolist())
        scene = np.concatenate(
            [
                np.full(count, -1) if part is None else np.where(part.scene < 0, -1, part.scene + next(offsets))
                for part, count in parts
            ]
        )
        numbers: dict[str, int] = {}
        used, places = np.unique(scene[scene >= 0], return_index=True)  # and their first images
        new = np.full(len(names) + 1, -1, np.int32)  # the last is for -1
        for old in used[np.argsort(places)].tolist():
            new[old] = numbers.setdefault(names[old], len(numbers))
        unknown = [(np.full((count, 4), np.nan), np.full(count, np.nan)) for _, count in parts]
        bounds = [either[0] if part is None else part.bounds for (part, _), either in zip(parts, unknown, strict=True)]
        time = [either[1] if part is None else part.time for (part, _), either in zip(parts, unknown, strict=True)]
        return cls(np.concatenate(bounds), np.concatenate(time), new[scene], list(numbers))

    def part(self, rows: NDArray[np.int64]) -> PlaceColumns | None:
        """Returns the columns of some rows; None if nothing is known of any of them."""
        found = PlaceColumns(self.bounds[rows], self.time[rows], self.scene[rows], self.names)
        if np.isnan(found.bounds).all() and np.isnan(found.time).all() and (found.scene < 0).all():
            return None
        return found

    def save(self, folder: Path) -> None:
        save_file({"bounds": self.bounds, "time": self.time, "scene": self.scene}, folder / PLACES)
        (folder / SCENES).write_text(json.dumps(self.names) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, count: int) -> PlaceColumns | None:
        """Reads the columns of an index of ``count`` images; None if it has none.

        Raises ValueError, which names the file, if one is damaged.
        """
        path = folder / PLACES
        if not path.exists():
            return None
        try:
            columns = load_file(path)
            names = json.loads(read_regular(folder / SCENES, MAX_SCENES))
            found = cls(columns["bounds"], columns["time"], columns["scene"], names)
            fits = found.bounds.shape == (count, 4) and found.time.shape == found.scene.shape == (count,)
            texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not (fits and texts) or (count and not -1 <= found.scene.min() <= found.scene.max() < len(names)):
                raise ValueError("it does not fit the index")
        except Exception as error:  # safetensors' own error is no subclass of ValueError
            raise ValueError(f"{path} or {SCENES} is damaged ({error}): make the index again") from error
        return found


@dataclass(frozen=True)
class Within:
    """The limits of a search; None is no limit.

    Args:
        bbox: west, south, east, north in degrees; west > east across the dateline
        time: first second and the second after the last, since 1970
        scene: name of the scene, with * and ?
    """

    bbox: Bounds | None = None
    time: tuple[float, float] | None = None
    scene: str | None = None

    @classmethod
    def parse(cls, bbox: str | None = None, time: str | None = None, scene: str | None = None) -> Within | None:
        """Returns the limits of the options; None without any. Raises ValueError, which says what is expected."""
        if bbox is None and time is None and scene is None:
            return None
        return cls(None if bbox is None else parse_bbox(bbox), None if time is None else parse_time(time), scene)

    @staticmethod
    def need(columns: PlaceColumns | None) -> PlaceColumns:
        """Returns the columns. Raises ValueError for an index without places."""
        if columns is None:
            raise ValueError(
                "this index has no places: make it from tiles of scenes (pack --source raster), or from a table with "
                "places (pack --keep-columns lat,lon,time)"
            )
        return columns

    def rows(self, columns: PlaceColumns | None) -> NDArray[np.int64]:
        """Returns the rows of the images within the limits. Raises ValueError for an index without places."""
        columns = self.need(columns)
        kept = np.ones(len(columns.scene), bool)
        if self.bbox is not None:
            kept &= touches(columns.bounds, self.bbox)
        if self.time is not None:
            kept &= (columns.time >= self.time[0]) & (columns.time < self.time[1])
        if self.scene is not None:
            known = np.array([fnmatchcase(name, self.scene) for name in columns.names] + [False])
            kept &= known[columns.scene]
        return np.flatnonzero(kept)


def touches(boxes: NDArray[np.float64], box: Bounds) -> NDArray[np.bool_]:
    """Returns which boxes (N, 4) have a point in common with a box. West > east goes across the dateline."""
    west, south, east, north = boxes.T
    kept = (south <= box[3]) & (north >= box[1])
    across = west > east
    # Each box is one interval of longitudes, or two. They meet if any two of them do.
    meets = np.zeros(len(boxes), bool)
    for low, high in [(box[0], box[2])] if box[0] <= box[2] else [(box[0], 180.0), (-180.0, box[2])]:
        meets |= (west <= high) & (np.where(across, 180.0, east) >= low)
        meets |= across & (low <= east)
    return kept & meets


def parse_bbox(text: str) -> Bounds:
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"bbox must be WEST,SOUTH,EAST,NORTH in degrees, not {text!r}") from error
    if not (all(-180 <= lon <= 180 for lon in (west, east)) and -90 <= south <= north <= 90):
        raise ValueError(
            f"bbox must be WEST,SOUTH,EAST,NORTH with longitudes -180 to 180 and latitudes -90 to 90, not {text!r}"
        )
    return west, south, east, north


def parse_time(text: str) -> tuple[float, float]:
    """Returns the first second and the second after the last of "2024-06", or of "2024-06-01/2024-06-30"."""
    first, slash, last = text.partition("/")
    begin = -np.inf if slash and first in ("", "..") else moment(first)[0]
    end = np.inf if slash and last in ("", "..") else moment(last if slash else first)[1]
    if begin >= end:
        raise ValueError(f"time ends before it begins: {text!r}")
    return begin, end


def moment(text: str) -> tuple[float, float]:
    """Returns the first second of a year, month, day or second, and the one after its last. Raises ValueError."""
    found = MOMENT.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError("no such form")
        year, month, day, hour, minute, second = (int(part) if part else None for part in found.groups())
        begin = datetime(year or 0, month or 1, day or 1, hour or 0, minute or 0, second or 0, tzinfo=UTC)
    except ValueError as error:
        raise ValueError(f"time must be 2024, 2024-06, 2024-06-30, or FROM/TO of these, not {text!r}") from error
    if month is None:
        length = timedelta(days=366 if calendar.isleap(begin.year) else 365)
    elif day is None:
        length = timedelta(days=calendar.monthrange(begin.year, begin.month)[1])
    else:
        length = timedelta(days=1) if hour is None else timedelta(seconds=1 if second is not None else 60)
    return begin.timestamp(), begin.timestamp() + length.total_seconds()
