"""SkyScript: `--source skyscript`, 5.2 million images with captions made from the tags of OpenStreetMap.

    SkyScript_train_unfiltered_5M.csv    filepath,title,title_multi_objects
    images2/a198234555_CH_19.jpg         object a198234555 of OpenStreetMap, image source CH, year 2019
    meta2/a198234555_CH_19.pickle        {"box": (west, south, east, north), "time": (2019, 7, 1, 10, 30),
                                          "center_tags": {"landuse": "farmland"}, "surrounding_tags": [{...}, ...]}

The layout is that of the release: images2 to images7, and beside them meta2 to meta7, if they were downloaded
too. The box becomes the footprint, and the time (UTC) becomes when the image was acquired, as `--keep-columns` does
for other tables.
The parts of the file name are kept columns. The tags are fields of KEY.json. A meta file is read with its image, by
plain_pickle.py, which executes nothing. An image whose meta file is missing or damaged is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from priorclip.common.output import get_logger
from priorclip.common.untrusted_json import read_regular
from priorclip.data_shards.format.place import COLUMNS
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources.kept_columns import KeptColumns, box
from priorclip.data_shards.sources.names import image_path, slashes
from priorclip.data_shards.sources.plain_pickle import plain_pickle
from priorclip.data_shards.sources.record import ImageFile, Record
from priorclip.data_shards.sources.table import csv, csv_rows

log = get_logger(__name__)

CAPTIONS = ("title", "title_multi_objects")
NAME = re.compile(r"([a-z]\d+)_([A-Z0-9]{2})_(\d\d)")
IMAGES, META = re.compile(r"images(\d+)"), "meta{}"
MAX_META = 1 << 20  # bytes of a meta file, and characters of its tags
REASON = "bad meta file"


@dataclass(frozen=True, slots=True)
class SkyScriptImage:
    """An image with its meta file.

    Args:
        folder: folder of images2, meta2, ...
        name: the image, relative to ``folder``
        told: there are meta files
    """

    folder: str = field(repr=False)
    name: str
    told: bool

    def load(self, record: Record) -> Record:
        loaded = ImageFile(self.folder, self.name).load(record)
        extra = {**record.extra, COLUMNS: {**record.extra.get(COLUMNS, {}), **name_facts(self.name)}}
        if self.told:
            path = image_path(Path(self.folder), meta_name(self.name))
            try:
                extra |= meta_facts(read_regular(path, MAX_META))
            except FileNotFoundError as error:
                raise BadSample("missing meta file", meta_name(self.name)) from error
            except (OSError, ValueError) as error:
                raise BadSample(REASON, f"{meta_name(self.name)}: {error}") from error
        return replace(loaded, extra=extra)


def skyscript(
    file: str | Path,
    images: str | Path,
    caption_field: Sequence[str] | None = None,
    kept: KeptColumns | None = None,
) -> list[Record]:
    """Reads a CSV of the release.

    Args:
        file: the CSV
        images: folder of images2 to images7, and of meta2 to meta7 if there are any
        caption_field: columns with captions; None takes those of CAPTIONS that exist, else as ``csv``
        kept: further columns that KEY.json keeps

    Raises:
        ValueError: as ``csv``
    """
    records = csv(file, images, caption_field=caption_field or caption_columns(Path(file)), kept=kept)
    folders: dict[str, bool] = {}
    for record in records:
        record.source = "skyscript"
        if not isinstance(record.image, ImageFile):
            continue
        name = record.image.name
        part = meta_name(name).partition("/")[0]
        if part not in folders:
            folders[part] = bool(part) and (Path(images) / part).is_dir()
            if part and not folders[part]:
                log.warning("%s has no folder %s, so its images get no box and no time", images, part)
        record.image = SkyScriptImage(record.image.folder, name, folders[part])
    return records


def caption_columns(path: Path) -> list[str] | None:
    found = next((row.keys() for row, _ in csv_rows(path)), ())
    return [name for name in CAPTIONS if name in found] or None


def meta_name(name: str) -> str:
    """Returns ``meta2/a1_CH_19.pickle`` of ``images2/a1_CH_19.jpg``; "" of a name that is not of this form."""
    folder, _, base = slashes(name).rpartition("/")
    number = IMAGES.fullmatch(folder)
    return f"{META.format(number[1])}/{Path(base).stem}.pickle" if number else ""


def name_facts(name: str) -> dict[str, Any]:
    """Returns the object, the image source and the year in a file name; nothing of a name of another form."""
    found = NAME.fullmatch(Path(slashes(name)).stem)
    return {"osm_object": found[1], "image_source": found[2], "year": 2000 + int(found[3])} if found else {}


def meta_facts(data: bytes) -> dict[str, Any]:
    """Returns the fields of KEY.json for a meta file. Raises ValueError, which names the field."""
    content = plain_pickle(data)
    if not isinstance(content, dict):
        raise ValueError(f"an object with 'box' and 'time' was expected, not {type(content).__name__}")
    facts: dict[str, Any] = {}
    if content.get("box") is not None:
        facts["footprint"] = box(numbers(content["box"], 4, "box"))
    if content.get("time") is not None:
        year, month, day, hour, minute = numbers(content["time"], 5, "time")
        try:
            facts["acquired"] = datetime(int(year), int(month), int(day), int(hour), int(minute)).isoformat()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"'time' is no time: {error}") from error
    left = MAX_META
    for name, found in (
        ("center_tags", [content.get("center_tags")]),
        ("surrounding_tags", content.get("surrounding_tags")),
    ):
        if found is None or found == [None]:
            continue
        if not isinstance(found, list | tuple):
            raise ValueError(f"'{name}' must be a list")
        tags = []
        for entry in found:
            tags.append(plain_tags(entry, name))
            left -= sum(len(key) + len(value) + 8 for key, value in tags[-1].items()) + 4
            if left < 0:
                raise ValueError(f"its tags have more than {MAX_META} characters")
        facts[name] = tags[0] if name == "center_tags" else tags
    return facts


def numbers(value: Any, count: int, name: str) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise ValueError(f"'{name}' must be {count} numbers")
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        raise ValueError(f"'{name}' must be {count} numbers")
    return list(value)


def plain_tags(entry: Any, name: str) -> dict[str, str]:
    """Returns the tags of an object. Raises ValueError if they are not texts."""
    if not isinstance(entry, dict) or not all(isinstance(each, str) for pair in entry.items() for each in pair):
        raise ValueError(f"'{name}' must have a text for each tag")
    return dict(entry)
