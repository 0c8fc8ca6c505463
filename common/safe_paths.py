"""Joins a folder and a name that comes out of a data file: a manifest, an index, an annotation.

    join_under(Path("data/train"), "shard-000000.tar", "manifest.json")   # data/train/shard-000000.tar
    join_under(Path("data/train"), "airport/1.jpg", "labels.csv")         # data/train/airport/1.jpg
    join_under(Path("data/train"), "../../precious.txt", "manifest.json") # UnsafePath
    join_under(Path("data/train"), "pipe:id > X", "images.jsonl")         # UnsafePath

Somebody else may have written the data file, so a name in it is a plain file under a folder that the user named. Only
the command line may name other places. The result is one file: open it as it is, because braces and wildcards in a
name have no meaning. Symbolic links are followed, because users make them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

from priorclip.common.masking import masked

SCHEME = re.compile(r"(\.?/)*([a-z][a-z0-9+.-]*://|pipe:)", re.IGNORECASE)
ORDINARY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # such a name has no danger, and there can be millions
SHOWN = 120  # characters of a name in a message


class UnsafePath(ValueError):
    """A name in a data file that is not a plain file under the folder of the user."""


def join_under(folder: Path, name: object, source: object) -> Path:
    """Returns ``folder / name``, which is a path under the folder.

    Args:
        folder: a folder that the user named
        name: the name in the data file, with ``/`` between its parts; a backslash is kept
        source: the data file, for the message

    Raises:
        UnsafePath: the name is no text, empty, absolute, a URL, ``pipe:``, has a ``..`` part or a NUL byte
    """
    return folder / plain_name(name, source)


def plain_name(name: object, source: object) -> str:
    """Returns the name without empty and ``.`` parts, under the rules of ``join_under``. Raises UnsafePath."""
    if isinstance(name, str) and ORDINARY.fullmatch(name):
        return name
    reason = find_danger(name)
    if reason is None:
        assert isinstance(name, str)
        return "/".join(part for part in name.split("/") if part not in ("", "."))
    shown = masked(repr(name)[:2000])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    raise UnsafePath(f"{source}: the file name {shown} is refused because {reason}. Correct it or remove its entry")


def find_danger(name: object) -> str | None:
    """Returns the reason why a name out of a data file is refused, or None if it is a plain relative name."""
    if not isinstance(name, str):
        return "it is not text"
    if "\0" in name:
        return "it has a NUL byte"
    windows = PureWindowsPath(name)  # knows / and \ and drives
    if windows.anchor:
        return "it is an absolute path"
    if ".." in windows.parts:
        return "it leaves the folder by '..'"
    if not windows.parts:
        return "it is empty"
    if SCHEME.match(name):
        return "it is a URL or a command, which only the command line may name"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "it cannot be a file name: it has half of a surrogate pair"
    return None
