"""``metrics.jsonl`` read back, as a run that was killed left it: one JSON object a line, the last perhaps cut short.

    records(folder)                # [{"step": 1, "time": ..., "train/loss": 0.71}, ...]
    last_record(folder)            # without reading more than its end

No torch is imported here: `cluster faults` looks into the file of a run that goes on, many times a second.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
END_BYTES = 1 << 16  # a record lists the seconds of each step since the one before


def records(folder: Path) -> list[dict[str, Any]]:
    """All whole records in their order; none where there is no file."""
    try:
        lines = (folder / NAME).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := parsed(line)) is not None]


def last_record(folder: Path) -> dict[str, Any] | None:
    """The last line that is whole and ended, None where there is none."""
    try:
        with (folder / NAME).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - END_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    return next((record for line in reversed(lines) if (record := parsed(line)) is not None), None)


def parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for what is none, as a crash or a full disk leave it."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record
    return None
