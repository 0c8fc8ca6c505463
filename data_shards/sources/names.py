"""File names: the key, the scene and the file that a name in an annotation stands for.

sample_key("train/airport_1.v2.tif")      train/airport_1_v2
stem_label("denseresidential12.tif")      denseresidential
stem_label("00815.jpg")                   None: RSICD has such names beside airport_1.jpg
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from priorclip.data_shards.format.class_names import plain

if TYPE_CHECKING:
    from priorclip.data_shards.sources.record import Record

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


def sample_key(name: str) -> str:
    """A file's relative path -> key: no suffix, no dot in the base name (where a key would end), no way upwards."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")] or ["_"]
    parts[-1] = Path(parts[-1]).stem.replace(".", "_") or "_"
    return "/".join(parts)


def stem_label(name: str) -> str | None:
    """``airport_1.jpg`` -> ``airport``, ``denseresidential12.tif`` -> ``denseresidential``; None for bare numbers."""
    stem = re.sub(r"[\s_\-]*\(?\d+\)?$", "", Path(name).stem)
    return stem.lower() if re.search(r"[A-Za-z]", stem) else None


def find_image(folder: Path, name: str) -> Path:
    """The image's path, also where annotation and files disagree on the folder or the suffix (RSITMD: tif, jpg).

    Returns the literal path where nothing fits: packing then counts it as a missing file.
    """
    literal = folder / name
    if literal.exists():
        return literal
    flat = folder / Path(name).name
    other = (suffix for lower in IMAGE_SUFFIXES for suffix in (lower, lower.upper()))
    for path in (flat, *map(literal.with_suffix, other)):
        if path.exists():
            return path
    return literal


def keep_split(records: list[Record], split: str | None, path: Path) -> list[Record]:
    """Records of a split; ValueError that names the splits there are where it has none."""
    kept = [record for record in records if split is None or record.split == split]
    if not kept:
        splits = sorted({str(record.split) for record in records})
        raise ValueError(f"{path} has no record of the split {split!r}; it has: {', '.join(splits) or 'no record'}")
    return kept


def labeller(table: Mapping[str, str]) -> Callable[..., str | None]:
    """A function (file name, label of the annotation) -> label: the table's, the annotation's, or the stem's.

    A class must not have two spellings: where a stem says ``airport`` and the table calls other images ``Airport``, the
    table's spelling is taken.
    """
    spelling = {plain(label): label for label in table.values()}

    def label_of(name: str, annotated: str | None = None) -> str | None:
        found = table.get(name) or table.get(Path(name).name) or annotated or stem_label(name)
        return spelling.get(plain(found), found) if found else None

    return label_of


def listed(value: str | Sequence[str] | None) -> list[str]:
    """The pieces of an option that takes one path, several with commas between, or a list."""
    if value is None:
        return []
    if not isinstance(value, str):
        return list(value)
    return [value] if Path(value).exists() else [piece.strip() for piece in value.split(",")]


def paired(option: str, value: str | Sequence[str] | None, others: str, count: int) -> list[str]:
    """``value`` as ``count`` pieces, one for each of the files of ``--others``; a single one goes with all of them."""
    pieces = listed(value)
    if len(pieces) == 1:
        return pieces * count
    if len(pieces) != count:
        raise ValueError(f"--{option} names {len(pieces)} and --{others} {count}: give one for all, or one for each")
    return pieces


def prefixed(groups: Sequence[list[Record]]) -> list[Record]:
    """Records of several data sets in one list: their keys begin with the data set's name, so that none collide.

    Two sets of one name become ``rsicd`` and ``rsicd-2``. A single set keeps its keys.
    """
    if len(groups) == 1:
        return groups[0]
    taken: set[str] = set()
    joined: list[Record] = []
    for records in groups:
        base = sample_key(f"{records[0].source or 'set'}.x") if records else "set"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        for record in records:
            record.key = f"{name}/{record.key}"
        joined += records
    return joined
