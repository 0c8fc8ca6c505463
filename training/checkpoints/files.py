"""The folders of checkpoints: published by renaming, kept or removed as the configuration says.

    checkpoints/step_00000100/            files of DeepSpeed, one set per rank, and ours (common/checkpoint_files.py)
    checkpoints/step_00000100/checksums.json   SHA-256 of each of them and of itself, world size, ZeRO stage, evaluation
    checkpoints/latest, checkpoints/best  names of the newest and of the best, for people and for DeepSpeed's own tools
    checkpoints/universal/step_00000100/  its state by parameter, made when another world size resumes from it

    checkpoints/set-aside/step_00000100/  one that could not be read, for people: no run reads or removes it

A folder gets the name ``step_N`` when it is complete; before that its name has ``.partial-TOKEN`` in it. writer.py
writes checkpoints, load.py reads them, and reshape.py reads them into another world size or ZeRO stage. A run removes
folders of these exact names only, and of the ``step_N`` only those whose record it can read.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch.distributed as dist

from priorclip.common.checkpoint_files import find_checkpoints, step_of
from priorclip.common.checkpoint_record import CHECKSUMS, read_record, write_record
from priorclip.common.files import fsync, write_text
from priorclip.common.output import get_logger
from priorclip.training.config import CheckpointConfig

logger = get_logger(__name__)

# Exactly the names that this file gives. A user's own copies beside the checkpoints have other names.
UNFINISHED = re.compile(r"step_\d{8,}\.(partial|replaced)-[0-9a-f]{8}")
REPLACED = re.compile(r"(step_\d{8,})\.replaced(-[0-9a-f]{8})?")  # version 0.1 wrote no token
SET_ASIDE = "set-aside"
SOURCE = "source.json"  # the record of a converted copy
OLD_SOURCE = "source.sha256"  # the same of version 0.1


@dataclass(frozen=True)
class Shape:
    """World size and ZeRO stage, which the files of a checkpoint depend on."""

    world_size: int
    zero_stage: int

    @staticmethod
    def of(engine: deepspeed.DeepSpeedEngine) -> Shape:
        return Shape(dist.get_world_size(), int(engine.zero_optimization_stage()))

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} under ZeRO {self.zero_stage}"


def publish(partial: Path, record: dict[str, Any], config: CheckpointConfig) -> Path:
    """Gives a complete folder its final name and removes old checkpoints. Returns the new path.

    ``record`` becomes ``checksums.json``. An existing checkpoint of the same step is replaced.
    """
    final = partial.parent / f"step_{record['step']:08d}"
    write_record(partial / CHECKSUMS, record)
    fsync(partial)
    if final.exists() and not read_record(final):
        set_aside(final)
    replaced = with_token(final, "replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    write_text(final.parent / "latest", final.name)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        remove_old(final, config)
    except OSError as error:
        logger.warning("old checkpoints could not be removed: %s", error)
    return final


def remove_old(newest: Path, config: CheckpointConfig) -> None:
    """Removes checkpoints before the last ``keep``, except those at multiples of ``keep_every`` and the best.

    A checkpoint whose record cannot be read stays and does not count, because nobody knows whether it is the best one.
    """
    known = [path for path in find_checkpoints(newest.parent) if path.name <= newest.name and read_record(path)]
    best = find_best(known, config)
    if best:
        write_text(newest.parent / "best", best.name)
    for old in known[max(1, config.keep) :]:
        if old != best and not (config.keep_every and step_of(old) % config.keep_every == 0):
            discard(old)
    for converted in find_checkpoints(newest.parent / "universal"):
        if not (newest.parent / converted.name).exists() and is_converted(converted):
            discard(converted)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. Its name goes first, so that a half-removed one is never taken for a whole one."""
    removed = with_token(checkpoint, "partial")
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def set_aside(checkpoint: Path) -> Path:
    """Moves a checkpoint to ``checkpoints/set-aside``, where no run reads or removes it. Returns its new path."""
    folder = checkpoint.parent / SET_ASIDE
    folder.mkdir(exist_ok=True)
    names = (f"{checkpoint.name}.{number}" if number else checkpoint.name for number in itertools.count())
    place = next(folder / name for name in names if not os.path.lexists(folder / name))
    checkpoint.rename(place)
    return place


def with_token(checkpoint: Path, state: Literal["partial", "replaced"]) -> Path:
    """Returns a sibling ``step_N.STATE-TOKEN``. The token is of this call, because a killed run may still write."""
    return checkpoint.with_name(f"{checkpoint.name}.{state}-{uuid.uuid4().hex[:8]}")


def is_converted(folder: Path) -> bool:
    """Whether a folder is a copy that convert.py made."""
    return (folder / SOURCE).is_file() or (folder / OLD_SOURCE).is_file()


def remove_unfinished(folder: Path, except_for: str) -> None:
    """Removes checkpoints that a killed process was writing, replacing or removing."""
    for parent in (folder, folder / "universal"):
        for path in parent.iterdir() if parent.is_dir() else ():
            if UNFINISHED.fullmatch(path.name) and path.name != except_for:
                shutil.rmtree(path, ignore_errors=True)


def recover_replaced(folder: Path) -> None:
    """Renames a checkpoint back if the process was killed between the two renames of `publish`."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = REPLACED.fullmatch(path.name)
        if match and not (folder / match[1]).exists():
            path.rename(folder / match[1])


def find_best(checkpoints: list[Path], config: CheckpointConfig) -> Path | None:
    """Returns the checkpoint with the best evaluation at its own step by ``config.best``; of equal ones the first."""
    scores = {path: score(read_record(path).get("evaluation", {}), config) for path in checkpoints}
    known = {path: value for path, value in scores.items() if value is not None}
    return max(sorted(known), key=lambda path: known[path]) if known else None


def score(evaluation: dict[str, float], config: CheckpointConfig) -> float | None:
    """Returns the figure ``config.best``, negated if the smallest is best; None if the evaluation does not have it."""
    value = evaluation.get(config.best or "")
    return None if value is None else (value if config.best_is == "max" else -value)
