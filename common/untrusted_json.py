"""Reads JSON that somebody else may have written: a size and a kind is believed only within limits.

    values = read_object(path, 1 << 20)                                   # a regular file of at most 1 MiB
    check_object(values, {"samples": whole(10**9), "classes": list_of(text(300))}, "data/manifest.json")

    ValueError: data/manifest.json: 'samples' must be a whole number from 0 to 1000000000, not 10000000000
    ValueError: data/manifest.json: 'classes', item 3 must be text of at most 300 characters, not 7

A number is never a boolean. Reading does not wait for a named pipe and does not read a device without end.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

Check = Callable[[Any, str], None]  # (value, name of the place); raises ValueError that begins with the name
SHOWN = 60  # characters of a value or a key in a message


def read_regular(path: Path, most: int) -> bytes:
    """Returns the content of a file.

    Raises:
        OSError: it cannot be read
        ValueError: it is no regular file, or has more than ``most`` bytes
    """
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is no regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return data


def read_object(path: Path, most: int) -> dict[str, Any]:
    """Returns the JSON object in a file of at most ``most`` bytes. Raises as `read_regular`, or ValueError."""
    return parse_object(read_regular(path, most), path)


def parse_object(data: bytes, source: object) -> dict[str, Any]:
    """Returns the JSON object in UTF-8 bytes. Raises ValueError that begins with ``source`` for anything else."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, not {shown(values)}")
    return values


def check_object(
    values: Any, fields: Mapping[str, Check], where: object, optional: Collection[str] = (), others: bool = False
) -> None:
    """Checks the fields of an object.

    Args:
        values: the object
        fields: the check of each field
        where: file and place, for the message
        optional: fields that may be absent
        others: whether it may have further fields

    Raises:
        ValueError: a field is absent, unknown, of another kind or beyond its limit; names the place and the field
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, not {shown(values)}")
    for name in fields:
        if name not in values and name not in optional:
            raise ValueError(f"{where} lacks '{name}'")
    for name, value in values.items():
        if name in fields:
            fields[name](value, f"{where}: '{name}'")
        elif not others:
            raise ValueError(f"{where} has an unknown field {shown(name)}")


def whole(most: int, least: int = 0) -> Check:
    """Returns a check for a whole number within limits."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{where} must be a whole number from {least} to {most}, not {shown(value)}")

    return check


def number(most: float, least: float = 0.0) -> Check:
    """Returns a check for a number within limits; NaN is none."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{where} must be a number from {least:g} to {most:g}, not {shown(value)}")

    return check


def text(most: int = 4096) -> Check:
    """Returns a check for text with at most ``most`` characters."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > most:
            raise ValueError(f"{where} must be text of at most {most} characters, not {shown(value)}")

    return check


def flag(value: Any, where: str) -> None:
    """Checks that a value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {shown(value)}")


def null_or(check: Check) -> Check:
    """Returns a check that also takes null."""
    return lambda value, where: None if value is None else check(value, where)


def anything(value: Any, where: str) -> None:
    """Takes any value: the size of the file bounds it."""


def list_of(check_item: Check) -> Check:
    """Returns a check for a list; the size of the file bounds its length."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {shown(value)}")
        for number, item in enumerate(value, 1):
            check_item(item, f"{where}, item {number}")

    return check


def map_of(check_item: Check) -> Check:
    """Returns a check for an object with any keys."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {shown(value)}")
        for name, item in value.items():
            check_item(item, f"{where}, {shown(name)}")

    return check


def shown(value: Any) -> str:
    """Returns a value for a message: a list or an object by its kind, everything else cut to a few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    found = json.dumps(value)
    return found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
