"""The book of bad samples: counted per reason, written down, and a stop where they are too many."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from pathlib import Path

log = logging.getLogger(__name__)

SHARDS_NAMED = 5
TOLD = 20  # bad samples that the log tells of; all of them are in the file


class TooManyBadSamples(RuntimeError):
    """More bad samples than ``max_bad_share`` allows; the message names the worst shards and reasons."""


class Quarantine:
    """Bad samples of one rank.

    Args:
        path: JSON-lines file to append ``{"shard", "key", "reason", "detail"}`` to; None keeps the counts only

    Attributes:
        skipped: bad samples by reason, over the life of the stream
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._epoch = -1
        self._told = 0

    def add(self, rows: list[dict[str, str]], epoch: int, allowed: float) -> None:
        """Take the rows of one batch. Raises TooManyBadSamples beyond ``allowed`` samples in an epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards.clear()
        if not rows:
            return
        self.skipped.update(row["reason"] for row in rows)
        self._shards.update(row["shard"] for row in rows)
        for row in rows:
            self._told += 1
            level = logging.WARNING if self._told <= TOLD else logging.DEBUG
            log.log(level, "bad sample %s in %s: %s (%s)", row["key"], row["shard"], row["reason"], row["detail"])
        if self.path:
            append(self.path, rows)
        if self._shards.total() > allowed:
            raise TooManyBadSamples(self._complaint(allowed))

    def _complaint(self, allowed: float) -> str:
        worst = ", ".join(f"{shard} ({count})" for shard, count in self._shards.most_common(SHARDS_NAMED))
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
        return (
            f"{self._shards.total()} bad samples in epoch {self._epoch}, more than data.max_bad_share allows "
            f"({allowed:g} on this rank), in {worst}. Reasons: {reasons}. Run `python -m data_shards verify` on the "
            f"shards{f', see {self.path}' if self.path else ''}."
        )


def allowance(share: float, samples: int, world_size: int) -> float:
    """Bad samples of one rank in an epoch that ``share`` of all samples allows.

    A rank sees a random part of the epoch: three standard deviations more than its part are no sign of a worse share.
    """
    part = share * samples / world_size
    return part if world_size == 1 else min(share * samples, part + 3 * math.sqrt(part))


def append(path: str, rows: list[dict[str, str]]) -> None:
    """Append rows by one write, so that lines of several ranks do not mix."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(handle)
