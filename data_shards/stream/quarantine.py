"""Counts bad samples by reason, lists them in a file, and stops the run if there are too many.

    {"shard": "data/b.tar", "key": "airport/12", "reason": "unreadable image", "detail": "OSError: ..."}

All ranks of a run append to one file. It holds a sample once for each reason, also after many epochs and resumes: a
rank reads the lines of the other ranks before it appends. The limit counts samples by their number, because a key can
be unknown (the index is damaged) or stand for several samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from pathlib import Path

from priorclip.common.output import get_logger

log = get_logger(__name__)

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
LISTED = ("shard", "key", "reason", "detail")
SHARDS_NAMED = 5
LOGGED = 20  # bad samples in the log at level WARNING; the file lists all


class TooManyBadSamples(RuntimeError):
    """There are more bad samples than ``max_bad_share`` allows. The message names the worst shards and reasons."""


class Quarantine:
    """Bad samples of one rank.

    Args:
        path: JSON-lines file that gets ``{"shard", "key", "reason", "detail"}``; None keeps only the counts

    Attributes:
        skipped: bad reads by reason since the start of the stream; a resumed run starts at 0

    Raises:
        OSError: the file cannot be written; raised at the start, not at the first bad sample
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._seen: set[str] = set()  # samples of this epoch: a replacement may be the same sample
        self._epoch = -1
        self._logged = 0
        self._file = QuarantineFile(path) if path else None

    def add(self, rows: list[dict[str, str]], epoch: int, allowed: float) -> None:
        """Adds the rows of one batch. Raises TooManyBadSamples above ``allowed`` samples in an epoch.

        A row has the fields of the file, and ``sample``, the number of the sample in its source.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards.clear()
            self._seen.clear()
        if not rows:
            return
        self.skipped.update(row["reason"] for row in rows)
        for row in rows:
            self._shards[row["shard"]] += row["sample"] not in self._seen
            self._seen.add(row["sample"])
            self._logged += 1
            level = logging.WARNING if self._logged <= LOGGED else logging.DEBUG
            log.log(level, "bad sample %s in %s: %s (%s)", row["key"], row["shard"], row["reason"], row["detail"])
        if self._file:
            self._write(self._file, [{name: row[name] for name in LISTED} for row in rows])
        if self._shards.total() > allowed:
            raise TooManyBadSamples(self._message(allowed))

    def _write(self, file: QuarantineFile, rows: list[dict[str, str]]) -> None:
        """Appends rows. If the disk is full, the run goes on with the counts and without the list."""
        try:
            file.add(rows)
        except OSError as error:
            log.error("%s cannot be written (%s): bad samples are now counted and not listed", self.path, error)
            self._file = None

    def _message(self, allowed: float) -> str:
        worst = ", ".join(f"{shard} ({count})" for shard, count in self._shards.most_common(SHARDS_NAMED))
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
        return (
            f"{self._shards.total()} bad samples in epoch {self._epoch}, more than data.max_bad_share allows "
            f"({allowed:g} on this rank), in {worst}. Reasons: {reasons}. Run `python -m data_shards verify "
            f"--decode true` on the shards{f', see {self.path}' if self.path else ''}."
        )


def allowed_bad_samples(share: float, samples: int, world_size: int) -> float:
    """Returns the number of bad samples of one rank in an epoch that ``share`` of all samples allows.

    A rank reads a random part of the epoch. So its limit is three standard deviations above its part, plus three
    samples, because the standard deviation is too small if the part is one sample or less.
    """
    part = share * samples / world_size
    return part if world_size == 1 else min(share * samples, part + 3 * math.sqrt(part) + 3)


class QuarantineFile:
    """The file to which all ranks append. Raises OSError, which names the option, if it cannot be written."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._known: set[int] = set()
        self._read = 0  # bytes of the file that ``_known`` covers
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, APPEND, 0o644))
        except OSError as error:
            raise OSError(f"data.quarantine: {path} cannot be written ({error}): name another file") from error

    def add(self, rows: list[dict[str, str]]) -> None:
        """Appends new rows in one write, so that lines of several ranks do not mix."""
        self._catch_up()
        fresh = {row_hash(row): row for row in rows if row_hash(row) not in self._known}
        if not fresh:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh.values())
        data = text.encode("utf-8", "backslashreplace")  # invalid bytes of a key become \udcff, which JSON can read
        handle = os.open(self.path, APPEND, 0o644)
        try:
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)
        self._known |= fresh.keys()

    def _catch_up(self) -> None:
        """Reads the complete lines that were added since the last call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:  # somebody moved it during the run: start a new file
            self._known.clear()
            self._read = 0
            return
        lines, _, _ = data.rpartition(b"\n")
        self._read += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            try:
                self._known.add(row_hash(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                continue  # not our line, or cut by a full disk


def row_hash(row: dict[str, str]) -> int:
    """Returns a 64-bit hash of shard, key and reason. 50,000 bad samples, 1 % of 5 million, take 5 MB."""
    text = "\n".join((row["shard"], row["key"], row["reason"]))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
