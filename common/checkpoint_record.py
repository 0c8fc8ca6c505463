"""The record of a checkpoint, checksums.json: what its files must be, and the SHA-256 of the record itself.

    {"step": 100, "world_size": 2, "zero_stage": 2, "evaluation": {"mean_recall": 41.7},
     "sha256": {"mp_rank_00_model_states.pt": "ba2cf1b1..."}, "record_sha256": "7d8494a0..."}

``record_sha256`` is the SHA-256 of the other values, as JSON with sorted keys. So a flipped bit anywhere in the record
is found, or it changes white space only. Version 0.1 wrote no ``record_sha256``. Such a record is read if it has no
unknown key, because one flipped bit in the name of that key must not turn a sealed record into an old one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from priorclip.common.files import write_text
from priorclip.common.untrusted_json import read_object

CHECKSUMS = "checksums.json"
SEAL = "record_sha256"
MAX_BYTES = 1 << 28  # of a record: 100 bytes for each file, of which a rank writes four and a parameter four
SHA256 = re.compile(r"[0-9a-f]{64}")
NEEDED = {"step", "world_size", "sha256"}
KNOWN = {*NEEDED, "zero_stage", "evaluation"}
ZERO_STAGES = range(4)


def seal(record: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the values of a record, except its own."""
    values = {name: value for name, value in record.items() if name != SEAL}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record with its own checksum, complete or not at all."""
    write_text(path, json.dumps({**record, SEAL: seal(record)}, indent=1))


def load_sealed(path: Path) -> dict[str, Any]:
    """Returns a record whose own checksum is right, if it has one.

    Raises:
        OSError: the file cannot be read
        ValueError: it is no regular file, too large, no JSON object, or does not match its own checksum
    """
    record = read_object(path, MAX_BYTES)
    if SEAL in record and record[SEAL] != seal(record):
        raise ValueError("it does not match its own checksum")
    return record


def load_record(checkpoint: Path) -> dict[str, Any]:
    """Returns the record of a checkpoint, with every value checked.

    Raises:
        OSError: the file cannot be read
        ValueError: it is damaged, or the record of another step
    """
    record = load_sealed(checkpoint / CHECKSUMS)
    problem = find_problem(record) or find_problem_of_files(record["sha256"])
    if problem:
        raise ValueError(problem)
    if checkpoint.name != f"step_{record['step']:08d}":
        raise ValueError(f"it is the record of step {record['step']}")
    return record


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Returns the record of a checkpoint, or an empty dict if it cannot be read."""
    try:
        return load_record(checkpoint)
    except (OSError, ValueError):
        return {}


def find_problem(record: Mapping[str, Any]) -> str | None:
    """Returns the first value of a record that nobody would write, or None."""
    if missing := NEEDED - record.keys():
        return f"it has no {', '.join(sorted(missing))}"
    if unknown := record.keys() - KNOWN - {SEAL}:
        return f"it has the unknown key {min(unknown)!r}"
    for name, least in (("step", 0), ("world_size", 1)):
        if type(record[name]) is not int or record[name] < least:
            return f"its {name} is {record[name]!r}"
    if record.get("zero_stage", 0) not in ZERO_STAGES:
        return f"its zero_stage is {record['zero_stage']!r}"
    evaluation = record.get("evaluation", {})
    if not isinstance(evaluation, dict) or not all(isinstance(each, int | float) for each in evaluation.values()):
        return "its evaluation is not a list of figures"
    return None


def find_problem_of_files(sums: Any) -> str | None:
    """Returns what is wrong with the checksums by file name, or None."""
    if not isinstance(sums, dict):
        return "its sha256 is not a list of files"
    for name, sha256 in sums.items():
        if Path(name).name != name or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            return f"its checksum of {name!r} is {sha256!r}"
    return None
