"""Selects the records to pack: without evaluation images and duplicates. See leakage.py and duplicates.py in dedupe/.

    records -> hashes (.pack/prints, if needed) -> excluded.jsonl, duplicates.jsonl -> the other records

The selection depends only on records and options, so each task of an array and each restarted run selects the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from priorclip.data_shards.dedupe.duplicates import (
    MODES,
    count_duplicates,
    duplicate_rows,
    find_duplicates,
    merge_duplicates,
)
from priorclip.data_shards.dedupe.hash_columns import hash_records
from priorclip.data_shards.dedupe.image_hashes import EXACT, PERCEPTUAL
from priorclip.data_shards.dedupe.leakage import EvaluationImages, count_leaks, find_leaks, leak_rows
from priorclip.data_shards.dedupe.near_hashes import MAX_DISTANCE
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool
from priorclip.data_shards.sources import Record


@dataclass(frozen=True)
class Selection:
    """The records to pack, and a row for each record that is left out; None if the option is off."""

    records: list[Record]
    duplicates: list[dict[str, Any]] | None = None
    excluded: list[dict[str, Any]] | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


def check_duplicate_options(mode: str, near: int | None) -> None:
    """Raises ValueError for an unknown mode or an impossible distance."""
    if mode not in MODES:
        raise ValueError(f"--duplicates must be one of {', '.join(MODES)}, not {mode!r}")
    if near is not None and mode == "keep":
        raise ValueError("--near-duplicates needs --duplicates drop or merge")
    check_distance("--near-duplicates", near)


def check_distance(option: str, distance: int | None) -> None:
    if distance is not None and not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"{option} must be a number of bits (of 64), 0 to {MAX_DISTANCE}, not {distance}")


def select_records(
    records: list[Record],
    folder: Path,
    mode: str,
    near: int | None,
    evaluation: EvaluationImages | None,
    max_pixels: int,
    pool: WorkerPool,
    share: TaskShare,
) -> Selection:
    """Leaves out evaluation images, then duplicates.

    Args:
        records: all records
        folder: stores the hashes for a restarted run
        mode: keep, drop or merge duplicates
        near: largest number of different hash bits of two duplicates; None compares bytes only
        evaluation: images to leave out
        max_pixels: larger images are compared by their bytes only
        pool: computes the hashes
        share: parts of the hashes that this task computes first
    """
    if mode == "keep" and evaluation is None:
        return Selection(records)
    perceptual = near is not None or (evaluation is not None and evaluation.kind == PERCEPTUAL)
    hashes = hash_records(records, folder, PERCEPTUAL if perceptual else EXACT, max_pixels, pool, share)
    keep = np.ones(len(records), bool)
    excluded = duplicates = None
    counts: dict[str, dict[str, int]] = {}
    if evaluation is not None:
        leaks = find_leaks(hashes, evaluation)
        excluded = leak_rows({leak.image: records[leak.image].key for leak in leaks}, leaks, evaluation)
        counts["excluded"] = count_leaks(excluded)
        keep[[leak.image for leak in leaks]] = False
    if mode != "keep":
        found = find_duplicates(hashes, near, keep)
        duplicates = duplicate_rows(records, found, mode == "merge")
        counts["duplicates"] = count_duplicates(duplicates)
        if mode == "merge":
            records = merge_duplicates(records, found)
        keep[[item.image for item in found]] = False
    return Selection([records[place] for place in np.nonzero(keep)[0].tolist()], duplicates, excluded, counts)
