"""Reads JSON annotations, and says which field of which entry is missing or of the wrong kind.

    content = read_json(path)                                    # also with the byte order mark of Windows
    take(entry, "filename", str, "set.json, entry 3")            # its text
    take(entry, "sentences", list, "set.json, entry 3", [])      # [] if it is absent or null
    ValueError: set.json, entry 3: 'filename' must be text, not 815

Somebody else may have written the annotation, so any value can stand where a name is expected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from priorclip.common.untrusted_json import read_regular

KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
SHOWN = 60  # characters of a value in a message
MAX_SIDE_FILE = 16 << 20  # bytes
REQUIRED: Any = object()


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file in UTF-8 or UTF-16, with or without a mark. Raises ValueError, OSError."""
    return parse_json(path.read_bytes(), path)


def read_side_file(path: Path) -> Any:
    """Returns the content of a small JSON file beside an image, which nobody named. Raises ValueError, OSError."""
    return parse_json(read_regular(path, MAX_SIDE_FILE), path)


def parse_json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def take(entry: Any, name: str, kind: type, where: str, default: Any = REQUIRED) -> Any:
    """Returns a field of an object.

    Args:
        entry: the object
        name: of the field
        kind: str, int, float (whole numbers too), list or dict
        where: file and entry, for the message
        default: for a field that is absent or null; without it the field is needed

    Raises:
        ValueError: the field is missing or of another kind, or ``entry`` is no object
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object with '{name}', not {shown(entry)}")
    value = entry.get(name)
    if value is None and default is not REQUIRED:
        return default
    if name not in entry:
        raise ValueError(f"{where} has no '{name}': {shown(entry)}")
    return check(value, kind, f"{where}: '{name}'")


def check(value: Any, kind: type, what: str) -> Any:
    """Returns a value of the kind; true and false are no numbers. Raises ValueError that begins with ``what``."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} must be {KINDS[kind]}, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Returns a value as JSON, cut to a few characters."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
