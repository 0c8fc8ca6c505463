"""Reads ``metrics.jsonl``: one JSON object a line. A killed run may leave its last line incomplete.

    records(folder)                # [{"step": 1, "time": ..., "train/loss": 0.71}, ...]
    last_record(folder)            # reads only the end of the file

Does not import torch: `cluster faults` reads the file of a running run many times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
END_BYTES = 1 << 16  # a record lists the seconds of each step since the last record


def records(folder: Path) -> list[dict[str, Any]]:
    """All complete records in their order; none if there is no file."""
    try:
        lines = (folder / NAME).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := parse_line(line)) is not None]


def last_record(folder: Path) -> dict[str, Any] | None:
    """The last complete record that ends with a line feed; None if there is none."""
    try:
        with (folder / NAME).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - END_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    return next((record for line in reversed(lines) if (record := parse_line(line)) is not None), None)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if a crash or a full disk left the line incomplete."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record
    return None
