"""What files beside foreign tars say about their texts and labels: the WebDataset layout of CLIP Benchmark.

    ROOT/dataset_type.txt        "retrieval": each line of KEY.txt is a caption; otherwise a classification set
         classnames.txt          the name of class 0, 1, 2 ..., one a line, for the number in KEY.cls
         test/nshards.txt 0.tar 1.tar

Both files may also lie in the folder of the tars. A folder that `data_shards pack` wrote has captions and names in
KEY.json, so nothing else is read there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from priorclip.common.output import get_logger
from priorclip.common.untrusted_json import read_regular
from priorclip.data_shards.format.class_names import unique_classes

log = get_logger(__name__)

TYPE, NAMES = "dataset_type.txt", "classnames.txt"
MAX_BYTES = 1 << 22
NOT_READ = ("multilabel",)  # labels in KEY.npy


@dataclass(frozen=True)
class Layout:
    """How to read the samples of a folder.

    Args:
        caption_lines: each line of KEY.txt is a caption
        names: class names by the number in KEY.cls; empty if KEY.cls holds the name itself
    """

    caption_lines: bool = False
    names: tuple[str, ...] = ()


PLAIN = Layout()


def find_layout(folder: Path) -> Layout:
    """Returns the layout of a folder of tars.

    Raises:
        ValueError: a file is too large or no UTF-8, or the labels are of a kind that we do not read
    """
    return read_layout(str(folder), lambda name: read_beside(folder, name))


def read_layout(folder: str, read: Callable[[str], bytes | None]) -> Layout:
    """Returns the layout of a folder; ``read`` returns a file beside its tars. Raises as `find_layout`."""
    kind = decoded(read(TYPE), folder, TYPE).strip().lower()
    if kind in NOT_READ:
        raise ValueError(
            f"{folder} is a '{kind}' set of CLIP Benchmark, whose labels are in .npy files: these are not read. Write "
            "captions or labels into KEY.json, or remove dataset_type.txt to read the images alone"
        )
    names = tuple(line.strip() for line in decoded(read(NAMES), folder, NAMES).splitlines())
    while names and not names[-1]:
        names = names[:-1]
    if len(unique_classes(names)) < len(names):
        log.warning("%s has a name several times for %s: such classes count as one", NAMES, folder)
    return Layout(kind == "retrieval", names)


def decoded(data: bytes | None, folder: str, name: str) -> str:
    """Returns the text, "" without the file. Raises ValueError if it is no UTF-8."""
    try:
        return (data or b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} of {folder} is not UTF-8 text: {error}") from error


def read_beside(folder: Path, name: str) -> bytes | None:
    """Returns the content of a file in the folder of the tars, or else in the folder above; None if there is none."""
    for place in (folder, folder.absolute().parent):
        path = place / name
        if path.is_file():
            return read_regular(path, MAX_BYTES)
    return None
