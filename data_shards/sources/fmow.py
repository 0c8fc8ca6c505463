"""Functional Map of the World: `--source fmow`.

    train/airport/airport_0/airport_0_0_rgb.jpg      the picture
    train/airport/airport_0/airport_0_0_rgb.json     {"bounding_boxes": [{"ID", "box": [x, y, w, h], "category"}], ...}

A record is a picture with the categories of its boxes, or one box with ``crop_margin``: 0.5 keeps half of the box's
longer side around it. Acquisition data (``gsd``, ``timestamp``, ``country_code``, ...) goes into KEY.json.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import open_image, upright_rgb
from priorclip.data_shards.sources.annotation_fields import check, read_side_file, shown, take
from priorclip.data_shards.sources.folder import split_folder, walk_names
from priorclip.data_shards.sources.names import sample_key
from priorclip.data_shards.sources.record import ImageFile, Record, read_file

KINDS = {"rgb": ("_rgb",), "msrgb": ("_msrgb",), "both": ("_rgb", "_msrgb")}
FACTS = ("gsd", "timestamp", "country_code", "cloud_cover", "utm", "location_id")
NO_CLASS = "false_detection"  # category of evaluation boxes that are none of the 62 classes
CROP_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of a picture, cropped when it is read.

    Args:
        folder, name: the picture, as in ImageFile
        box: left, top, width, height in pixels
        margin: share of the box's longer side to keep on each side of the box
    """

    folder: str = field(repr=False)
    name: str
    box: tuple[float, float, float, float]
    margin: float

    def load(self, record: Record) -> Record:
        with open_image(read_file(ImageFile(self.folder, self.name).path)) as image:
            picture = upright_rgb(image)
        left, top, width, height = self.box
        around = self.margin * max(width, height)
        edges = (
            max(0, round(left - around)),
            max(0, round(top - around)),
            min(picture.width, round(left + width + around)),
            min(picture.height, round(top + height + around)),
        )
        if edges[0] >= edges[2] or edges[1] >= edges[3]:
            raise BadSample("box outside the image", f"{self.box} of {picture.width} x {picture.height} pixels")
        buffer = io.BytesIO()
        picture.crop(edges).save(buffer, "JPEG", quality=CROP_QUALITY, subsampling=0)
        return replace(record, image=buffer.getvalue())


def fmow(
    images: str | Path, split: str | None = None, kind: str = "rgb", crop_margin: float | None = None
) -> list[Record]:
    """Reads fMoW's folders.

    Args:
        images: folder with train, val, ... or one of these folders
        split: sub-folder to read: train, val, test or seq
        kind: rgb (pan-sharpened), msrgb (RGB of the multispectral bands), or both, as in RS5M
        crop_margin: crop each box with this margin; None keeps whole pictures

    Raises:
        ValueError: the JSON of a picture is missing or has no boxes
    """
    if kind not in KINDS:
        raise ValueError(f"--fmow-kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if crop_margin is not None and crop_margin < 0:
        raise ValueError(f"--crop-margin must be at least 0, not {crop_margin}")
    root = split_folder(images, split)
    names = walk_names(root, lambda name: name.lower().endswith(".jpg") and Path(name).stem.endswith(KINDS[kind]))
    if not names:
        raise FileNotFoundError(f"no fMoW picture (CLASS/CLASS_N/CLASS_N_M{KINDS[kind][0]}.jpg) below {root}")
    records: list[Record] = []
    for name in names:
        facts, boxes = annotation(root / Path(name).with_suffix(".json"))
        key = sample_key(name)
        if crop_margin is None:
            place = ImageFile(str(root), name)
            records.append(_record(key, place, [box["category"] for box in boxes], split, facts))
            continue
        for number, box in enumerate(boxes):
            crop = Crop(str(root), name, tuple(box["box"]), crop_margin)
            suffix = f"-box{number}" if len(boxes) > 1 else ""
            records.append(_record(key + suffix, crop, [box["category"]], split, facts))
    return records


def annotation(path: Path) -> tuple[dict, list[dict]]:
    """Returns (facts to keep, boxes) of a picture's JSON. Raises ValueError, which names the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: each fMoW picture needs a JSON file of its name beside it")
    content = read_side_file(path)
    found = content.get("bounding_boxes") if isinstance(content, dict) else None
    entries = [found] if isinstance(found, dict) else take(content, "bounding_boxes", list, str(path))
    boxes = [read_box(entry, f"{path}, box {number}") for number, entry in enumerate(entries, 1)]
    if not boxes:
        raise ValueError(f"{path} has no bounding box")
    return {name: content[name] for name in FACTS if content.get(name) is not None}, boxes


def read_box(entry: Any, where: str) -> dict[str, Any]:
    """Returns the ``box`` (left, top, width, height) and its ``category``. Raises ValueError, which names the field."""
    sides = take(entry, "box", list, where)
    if len(sides) != 4:
        raise ValueError(f"{where}: 'box' must be four numbers, not {shown(sides)}")
    box = tuple(check(side, float, f"{where}: a number of 'box'") for side in sides)
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{where}: 'box' must be finite, not {shown(sides)}")
    return {"box": box, "category": take(entry, "category", str, where)}


def _record(key: str, place: ImageFile | Crop, categories: Sequence[str], split: str | None, facts: dict) -> Record:
    scenes = list(dict.fromkeys(name for name in categories if name != NO_CLASS))
    extra = {**facts, "labels": scenes} if len(scenes) > 1 else dict(facts)
    return Record(key, place, [], scenes[0] if len(scenes) == 1 else None, split, "fmow", extra=extra)
