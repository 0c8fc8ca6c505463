"""Folders whose names are labels: `--source imagefolder` and `--source millionaid`.

imagefolder    airport/12.jpg                                       "airport"
millionaid     water_area/lake/lake_12.jpg, unutilized_land/rock_land/P001.jpg
               label: the deepest folder; all of them in KEY.json as "hierarchy"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from priorclip.common.output import get_logger
from priorclip.data_shards.sources.names import IMAGE_SUFFIXES, sample_key, stem_label
from priorclip.data_shards.sources.record import ImageFile, Record

log = get_logger(__name__)


def imagefolder(images: str | Path, split: str | None = None) -> list[Record]:
    """Reads a folder. The label is the folder of the image, or the stem of a file outside all class folders.

    With ``split`` it reads the images below ``IMAGES/SPLIT/``.
    """
    root, source = split_folder(images, split), Path(images).name
    records = []
    for name in image_names(root):
        folder = os.path.dirname(name)
        label = os.path.basename(folder) if folder else stem_label(name)
        records.append(Record(sample_key(name), ImageFile(str(root), name), [], label, split, source))
    return records


def millionaid(images: str | Path, split: str | None = None) -> list[Record]:
    """Reads Million-AID's nested classes (three levels, 51 scenes). Arguments as ``imagefolder``.

    Raises:
        ValueError: no image is in a class folder, as in the released test set, which has no labels
    """
    root = split_folder(images, split)
    records, bare = [], 0
    for name in image_names(root):
        levels = name.split("/")[:-1]
        bare += not levels
        extra = {"hierarchy": levels} if levels else {}
        label = levels[-1] if levels else None
        place = ImageFile(str(root), name)
        records.append(Record(sample_key(name), place, [], label, split, "millionaid", extra=extra))
    if bare == len(records):
        raise ValueError(f"{root}: no image is in a class folder, so there are no labels. Is this the test set?")
    if bare:
        log.warning("%s: %d images are outside all class folders and have no label", root, bare)
    return records


def split_folder(images: str | Path, split: str | None) -> Path:
    """Returns ``IMAGES``, or ``IMAGES/SPLIT``. Raises FileNotFoundError."""
    folder = Path(images)
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    if split is not None and not (folder / split).is_dir():
        raise FileNotFoundError(f"--split {split}: the image folder has no sub-folder {folder / split}")
    return folder / split if split is not None else folder


def image_names(root: Path) -> list[str]:
    """Returns the relative names of all images below a folder, sorted by folder. Raises FileNotFoundError if none.

    Hidden files are ignored, because macOS writes ``._12.jpg`` beside ``12.jpg``.
    """
    names = walk_names(root, lambda name: name.lower().endswith(IMAGE_SUFFIXES))
    if not names:
        raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {root}")
    return names


def walk_names(root: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Returns the relative names of the files below ``root`` whose base name is wanted. It follows links.

    It does not follow a link to a folder that contains the link, because each image would come forty times.
    """
    names: list[str] = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX")) and not is_link_loop(root, Path(folder) / name)
        ]
        relative = Path(folder).relative_to(root).as_posix()
        kept = [name for name in files if not name.startswith(".") and wanted(name)]
        names += kept if relative == "." else [f"{relative}/{name}" for name in kept]
    return sorted(names, key=lambda name: name.split("/"))


def is_link_loop(root: Path, path: Path) -> bool:
    """Tells whether a folder is a link to one of the folders above it, up to ``root``."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    above = (folder for folder in path.parents if folder.is_relative_to(root))
    if not any(folder.resolve().is_relative_to(target) for folder in above):
        return False
    log.warning("%s is a link to a folder that contains it, so it is not followed", path)
    return True


def _unreadable(error: OSError) -> None:
    raise error
