"""The key, the scene and the file of a file name in an annotation.

sample_key("train/airport_1.v2.tif")      train/airport_1_v2
stem_label("denseresidential12.tif")      denseresidential
stem_label("00815.jpg")                   None: RSICD has such names and airport_1.jpg too
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from priorclip.common.safe_paths import UnsafePath, join_under
from priorclip.data_shards.format.class_names import normalized
from priorclip.data_shards.format.sample import BadSample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2")

UNWRITABLE = re.compile("[\\0\ud800-\udc7f\udd00-\udfff]")  # \\udc80 to \\udcff are bytes that are no UTF-8


def sample_key(name: str) -> str:
    """Returns the key of a relative path: without suffix, "..", and dots in the base name, which would end the key."""
    folders, _, base = safe_key(name).rpartition("/")
    return "/".join([*folders.split("/"), Path(base).stem.replace(".", "_") or "_"]).lstrip("/")


def safe_key(key: str) -> str:
    """Returns a key that can be the name of a member of a tar, and leads nobody out of the folder where he unpacks it.

    It has no "/" at the start, no "..", no NUL byte and no half of a surrogate pair. Bytes that are not UTF-8 stay.
    """
    plain = UNWRITABLE.sub("_", slashes(key))
    return "/".join(part for part in plain.split("/") if part not in ("", ".", "..")) or "_"


def stem_label(name: str) -> str | None:
    """Returns the scene in a name: ``airport`` of ``airport_1.jpg``, ``park`` of ``park12.tif``, None of a number."""
    stem = re.sub(r"[\s_\-]*\(?\d+\)?$", "", Path(slashes(name)).stem)
    return stem.lower() if re.search(r"[A-Za-z]", stem) else None


def slashes(name: str) -> str:
    """Returns a name with ``/`` between its parts, as annotations made on Windows do not have it."""
    return name.replace("\\", "/")


def find_image(folder: Path, name: str) -> Path:
    """Returns the path of an image that an annotation names, which is a file under ``folder``.

    The annotation may name another folder, another suffix (RSITMD: tif for jpg) or have backslashes. If no file
    exists, it returns the literal path, so that packing counts it as a missing file.

    Raises:
        BadSample: the name leads out of the folder, or is a URL or a command. See common/safe_paths.py
    """
    literal = image_path(folder, name)
    flat = folder / Path(slashes(name)).name
    other = (suffix for lower in IMAGE_SUFFIXES for suffix in (lower, lower.upper()))
    for path in (literal, image_path(folder, slashes(name)), flat, *map(literal.with_suffix, other)):
        if os.path.exists(path):  # False too for a name that is too long
            return path
    return literal


def image_path(folder: Path, name: str) -> Path:
    """Returns ``folder / name``; an absolute name is allowed if it lies under ``folder``. Raises BadSample."""
    for root in (folder.absolute(), folder.resolve()) if os.path.isabs(name) else ():
        if Path(name).is_relative_to(root):
            name = str(Path(name).relative_to(root))
            break
    try:
        return join_under(folder, name, f"an annotation of {folder}")
    except UnsafePath as error:
        raise BadSample("refused file name", str(error)) from error


def make_labeller(table: Mapping[str, str]) -> Callable[..., str | None]:
    """Returns a function (file name, label of the annotation) -> label from the table, the annotation or the stem.

    A class must have one spelling: if a stem says ``airport`` and the table says ``Airport`` for other images, the
    function returns the table's spelling.
    """
    spelling = {normalized(label): label for label in table.values()}
    labels = {str(Path(slashes(name))): label for name, label in table.items()}

    def label_of(name: str, annotated: str | None = None) -> str | None:
        name = str(Path(slashes(name)))
        found = labels.get(name) or labels.get(Path(name).name) or annotated or stem_label(name)
        return spelling.get(normalized(found), found) if found else None

    return label_of


def split_paths(value: str | Sequence[str] | None) -> list[str]:
    """Returns the paths of an option that takes one path, several comma-separated paths, or a list."""
    if value is None:
        return []
    if not isinstance(value, str):
        return list(value)
    return [value] if Path(value).exists() else [piece.strip() for piece in value.split(",")]


def pair_paths(option: str, value: str | Sequence[str] | None, others: str, count: int) -> list[str]:
    """Returns ``count`` paths, one for each file of ``--others``. A single path is repeated."""
    pieces = split_paths(value)
    if len(pieces) == 1:
        return pieces * count
    if len(pieces) != count:
        raise ValueError(
            f"--{option} has {len(pieces)} paths, --{others} has {count}: give one for all, or one for each"
        )
    return pieces
