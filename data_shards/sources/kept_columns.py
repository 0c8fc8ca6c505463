"""Columns of a table that KEY.json keeps: `--keep-columns lat,lon=x,time,gsd,sensor`.

    rule = kept_columns("lat,lon=x,time,gsd,sensor")
    rule.facts({"lat": "46.9", "x": "7.4", "time": "2019-07-01 12:30+02:00", "gsd": "0.1", "sensor": "SWISSIMAGE"})
    {"footprint": {"type": "Point", "coordinates": [7.4, 46.9]}, "acquired": "2019-07-01T10:30:00", "gsd": 0.1,
     "kept_columns": {"sensor": "SWISSIMAGE"}}

``NAME=COLUMN`` keeps the column under another name. The names in ROLES say where and when an image was taken: they
become the fields of format/place.py, so that a search can be limited to a box and a time. All other columns are kept
as they are. A blank value is unknown. A value that cannot be, such as a latitude of 95, raises BadSample, so that
packing leaves out the image, counts it and lists it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from sys import intern
from typing import Any

from priorclip.data_shards.format.place import COLUMNS, check_columns
from priorclip.data_shards.format.sample import BadSample

ROLES = {
    "lat": ("lat", "latitude"),
    "lon": ("lon", "lng", "long", "longitude"),
    "box": ("box", "bbox"),
    "time": ("time", "acquired", "acquisition_time", "acquisition_date", "date", "datetime", "timestamp"),
    "gsd": ("gsd",),
}
# Names that results of a search have already, besides those of ROLES.
FACTS = ("rank", "score", "row", "key", "label", "caption", "where", "scene", "window", "footprint")
EDGES = ("west", "south", "east", "north")
TAKEN = frozenset((*FACTS, *EDGES))
CORNERS = (("xmin", "ymin", "xmax", "ymax"), EDGES)  # of a box with names; GeoParquet has the first
REASON = "bad column value"


@dataclass(frozen=True)
class KeptColumns:
    """Which columns KEY.json keeps, each as (name, column). See above.

    Args:
        roles: columns with a meaning, named by the keys of ROLES
        others: columns that are kept as they are
    """

    roles: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, str], ...] = ()

    @property
    def columns(self) -> list[str]:
        """The columns of the table."""
        return [column for _, column in (*self.roles, *self.others)]

    def require(self, found: Collection[str], where: object) -> None:
        """Raises ValueError, which lists the columns that ``where`` has, if one is missing."""
        missing = [column for column in self.columns if column not in found]
        if missing:
            raise ValueError(
                f"{where} has no column {', '.join(missing)} (--keep-columns); it has: {', '.join(sorted(found))}"
            )

    def facts(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of KEY.json for a row of the table. Raises BadSample, which names the column."""
        facts: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        for name, column in (*self.roles, *self.others):
            value = row.get(column)
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            try:
                if name in READERS:
                    facts[name] = READERS[name](value)
                else:
                    kept[name] = plain(value)
            except ValueError as error:
                raise BadSample(REASON, f"column '{column}': {error}") from error
        if ("lat" in facts) != ("lon" in facts):
            raise BadSample(REASON, "one of latitude and longitude is blank")
        if "lat" in facts:
            facts["footprint"] = {"type": "Point", "coordinates": [facts.pop("lon"), facts.pop("lat")]}
        try:
            check_columns(kept)
        except ValueError as error:
            raise BadSample(REASON, str(error)) from error
        return {**facts_in_place(facts), COLUMNS: kept}


def facts_in_place(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts under the names of format/place.py."""
    names = {"box": "footprint", "time": "acquired"}
    return {names.get(name, name): value for name, value in facts.items()}


def kept_columns(value: str | Sequence[str] | None) -> KeptColumns | None:
    """Returns the rule of ``--keep-columns``; None without it. Raises ValueError for columns that contradict."""
    pieces = value.split(",") if isinstance(value, str) else list(value or [])
    if not pieces:
        return None
    named: dict[str, str] = {}
    for piece in pieces:
        name, _, column = (part.strip() for part in piece.partition("="))
        if not name or not (column or "=" not in piece):
            raise ValueError(f"--keep-columns takes COLUMN or NAME=COLUMN, comma-separated, not {piece!r}")
        name = role_of(name) or name
        if name in named:
            raise ValueError(f"--keep-columns has two columns for {name}: keep one of them as OTHER_NAME=COLUMN")
        if name in TAKEN:
            raise ValueError(f"--keep-columns: results have a {name!r} already; keep it as OTHER_NAME={column or name}")
        named[name] = column or piece.strip()
    if ("lat" in named) != ("lon" in named):
        raise ValueError("--keep-columns has one of lat and lon: name both, or keep it as OTHER_NAME=COLUMN")
    if "box" in named and "lat" in named:
        raise ValueError(
            "--keep-columns has a box, and lat and lon: one of them is the place. Keep the others as OTHER_NAME=COLUMN"
        )
    return KeptColumns(
        tuple((name, column) for name, column in named.items() if name in ROLES),
        tuple((name, column) for name, column in named.items() if name not in ROLES),
    )


def role_of(name: str) -> str | None:
    return next((role for role, names in ROLES.items() if name.lower() in names), None)


def number(value: Any) -> float:
    """Returns a finite number of a cell: a number or its text. Raises ValueError."""
    try:
        found = float(value) if isinstance(value, int | float | Decimal | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        found = None
    if found is None or not math.isfinite(found):
        raise ValueError(f"a finite number was expected, not {shown(value)}")
    return found


def latitude(value: Any) -> float:
    found = number(value)
    if not -90 <= found <= 90:
        raise ValueError(f"a latitude of -90 to 90 degrees was expected, not {found:g}")
    return found


def longitude(value: Any) -> float:
    found = number(value)
    if not -180 <= found <= 180:
        raise ValueError(f"a longitude of -180 to 180 degrees was expected, not {found:g}")
    return found


def metres(value: Any) -> float:
    found = number(value)
    if not 0 < found < 1e9:
        raise ValueError(f"metres above 0 were expected, not {found:g}")
    return found


def box(value: Any) -> dict[str, Any]:
    """Returns the GeoJSON polygon of west, south, east, north in degrees; two across the dateline, if west > east.

    Args:
        value: four numbers, their text with or without brackets, or an object with names as in CORNERS
    """
    if isinstance(value, Mapping):
        names = next((each for each in CORNERS if set(each) <= set(value)), None)
        value = [value[name] for name in names] if names else None
    elif isinstance(value, str):
        value = re.split(r"[,;\s]+", value.strip().strip("()[]").strip())
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError("a box of west, south, east, north in degrees was expected")
    west, south, east, north = (read(each) for read, each in zip(CORNER_READERS, value, strict=True))
    if south >= north or west == east:
        raise ValueError(f"a box of west, south, east, north with an area was expected, not {west, south, east, north}")
    spans = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
    parts = [
        [[[low, south], [high, south], [high, north], [low, north], [low, south]]] for low, high in spans if low < high
    ]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def moment(value: Any) -> str:
    """Returns the day or the second (UTC) of a time in ISO 8601. A time without an offset is UTC."""
    if isinstance(value, str):
        try:
            return date.fromisoformat(value.strip()).isoformat()
        except ValueError:
            value = parse_time(value)
    if isinstance(value, datetime):
        try:
            whole = value.astimezone(UTC) if value.tzinfo else value
        except OverflowError as error:
            raise ValueError(f"a time of the years 1 to 9999 was expected, not {value}") from error
        return whole.replace(tzinfo=None).isoformat(timespec="seconds")
    if isinstance(value, date):
        return value.isoformat()
    raise ValueError(
        f"a time as 2019-07-01 or 2019-07-01T10:30:00Z was expected, not {shown(value)}; a column of years or of "
        "seconds can be kept as OTHER_NAME=COLUMN"
    )


def parse_time(text: str) -> datetime | str:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return text


def plain(value: Any) -> Any:
    """Returns a cell as JSON can hold it. Raises ValueError for bytes and numbers that are not finite."""
    if isinstance(value, str):
        return intern(value.strip())
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float | Decimal):
        return number(value)
    if isinstance(value, date):  # datetime too
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    raise ValueError(f"text, a number, a time or a list was expected, not {type(value).__name__}")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


CORNER_READERS = longitude, latitude, longitude, latitude
READERS = {"lat": latitude, "lon": longitude, "box": box, "time": moment, "gsd": metres}
