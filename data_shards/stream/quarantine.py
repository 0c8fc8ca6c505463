"""The book of bad samples: counted per reason, written down, and a stop where they are too many.

    {"shard": "data/b.tar", "key": "airport/12", "reason": "unreadable image", "detail": "OSError: ..."}

The ranks of a run append to one file, which holds a sample once for each reason, however many epochs meet it and
however often the run is resumed: what other ranks have added is read before each append.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from pathlib import Path

log = logging.getLogger(__name__)

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
SHARDS_NAMED = 5
LOGGED = 20  # bad samples that the log tells of; all of them are in the file


class TooManyBadSamples(RuntimeError):
    """More bad samples than ``max_bad_share`` allows; the message names the worst shards and reasons."""


class Quarantine:
    """Bad samples of one rank.

    Args:
        path: JSON-lines file to append ``{"shard", "key", "reason", "detail"}`` to; None keeps the counts only

    Attributes:
        skipped: reads that were bad by reason, over the life of the stream; a resumed run counts anew, in the epoch
            it resumes in as well

    Raises:
        OSError: the file cannot be written; said at once and not when the first bad sample comes
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()  # (shard, key) of this epoch: a replacement may meet one again
        self._epoch = -1
        self._told = 0
        self._book = QuarantineFile(path) if path else None

    def add(self, rows: list[dict[str, str]], epoch: int, allowed: float) -> None:
        """Take the rows of one batch. Raises TooManyBadSamples beyond ``allowed`` samples in an epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards.clear()
            self._seen.clear()
        if not rows:
            return
        self.skipped.update(row["reason"] for row in rows)
        for row in rows:
            place = row["shard"], row["key"]
            self._shards[row["shard"]] += place not in self._seen
            self._seen.add(place)
            self._told += 1
            level = logging.WARNING if self._told <= LOGGED else logging.DEBUG
            log.log(level, "bad sample %s in %s: %s (%s)", row["key"], row["shard"], row["reason"], row["detail"])
        if self._book:
            self._write(self._book, rows)
        if self._shards.total() > allowed:
            raise TooManyBadSamples(self._complaint(allowed))

    def _write(self, book: QuarantineFile, rows: list[dict[str, str]]) -> None:
        """A disk that fills up in the middle of a run costs the list, not the run: the counts go on."""
        try:
            book.add(rows)
        except OSError as error:
            log.error("%s cannot be written any more (%s): bad samples are counted and not listed", self.path, error)
            self._book = None

    def _complaint(self, allowed: float) -> str:
        worst = ", ".join(f"{shard} ({count})" for shard, count in self._shards.most_common(SHARDS_NAMED))
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
        return (
            f"{self._shards.total()} bad samples in epoch {self._epoch}, more than data.max_bad_share allows "
            f"({allowed:g} on this rank), in {worst}. Reasons: {reasons}. Run `python -m data_shards verify` on the "
            f"shards{f', see {self.path}' if self.path else ''}."
        )


def allowed_bad_samples(share: float, samples: int, world_size: int) -> float:
    """Bad samples of one rank in an epoch that ``share`` of all samples allows.

    A rank sees a random part of the epoch: three standard deviations more than its part are no sign of a worse share,
    nor are three samples more, for the square root is too little where the part is one sample or less.
    """
    part = share * samples / world_size
    return part if world_size == 1 else min(share * samples, part + 3 * math.sqrt(part) + 3)


class QuarantineFile:
    """The file that all ranks append to. Raises OSError, naming the option, where it cannot be written."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._known: set[int] = set()
        self._read = 0  # bytes of the file that are in ``_known``
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, APPEND, 0o644))
        except OSError as error:
            raise OSError(f"data.quarantine: {path} cannot be written ({error}): name another file") from error

    def add(self, rows: list[dict[str, str]]) -> None:
        """Append the rows that the file has not, by one write, so that lines of several ranks do not mix."""
        self._catch_up()
        fresh = {row_hash(row): row for row in rows if row_hash(row) not in self._known}
        if not fresh:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh.values())
        data = text.encode("utf-8", "backslashreplace")  # a key's odd bytes as \udcff, which JSON reads back
        handle = os.open(self.path, APPEND, 0o644)
        try:
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)
        self._known |= fresh.keys()

    def _catch_up(self) -> None:
        """Learn the whole lines that were added since the last time."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:  # moved away while the run goes on: begin another
            self._known.clear()
            self._read = 0
            return
        lines, _, _ = data.rpartition(b"\n")
        self._read += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            try:
                self._known.add(row_hash(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                continue  # not ours, or torn by a full disk


def row_hash(row: dict[str, str]) -> int:
    """64 bits of shard, key and reason: 50,000 bad samples, 1 % of five million, are known in five megabytes."""
    text = "\n".join((row["shard"], row["key"], row["reason"]))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
