"""The folders of checkpoints: published by renaming, kept or removed as the configuration says.

    checkpoints/step_00000100/            files of DeepSpeed, one set per rank, and ours (common/checkpoint_files.py)
    checkpoints/step_00000100/checksums.json   SHA-256 of each of them, world size, ZeRO stage and evaluation
    checkpoints/latest, checkpoints/best  names of the newest and of the best, for people and for DeepSpeed's own tools
    checkpoints/universal/step_00000100/  its state by parameter, made when another world size resumes from it

A folder gets the name ``step_N`` when it is complete; before that its name has ``.partial`` in it. writer.py writes
checkpoints, load.py reads them, and reshape.py reads them into another world size or ZeRO stage.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from priorclip.common.checkpoint_files import CHECKSUMS, find_checkpoints, read_record
from priorclip.common.files import fsync, write_text
from priorclip.training.config import CheckpointConfig

logger = logging.getLogger(__name__)

UNFINISHED = re.compile(r"step_\d+\.(partial.*|replaced)")


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
    write_text(partial / CHECKSUMS, json.dumps(record, indent=1))
    fsync(partial)
    replaced = partial.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    write_text(final.parent / "latest", final.name)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    remove_old(final, config)
    return final


def remove_old(newest: Path, config: CheckpointConfig) -> None:
    """Removes checkpoints except the last ``keep``, those at multiples of ``keep_every``, and the best.

    Checkpoints of later steps are removed too, because the run would resume from them: they are damaged, or the run
    started again in this directory.
    """
    complete = find_checkpoints(newest.parent)
    for later in [path for path in complete if path.name > newest.name]:
        logger.warning(
            "%s is removed: the run continued from an earlier step, and its newest checkpoint is %s", later, newest.name
        )
        shutil.rmtree(later)
    earlier = [path for path in complete if path.name <= newest.name]
    best = find_best(earlier, config)
    if best:
        write_text(newest.parent / "best", best.name)
    for old in earlier[max(1, config.keep) :]:
        if old != best and not (config.keep_every and step_of(old) % config.keep_every == 0):
            shutil.rmtree(old)
    for converted in (newest.parent / "universal").glob("step_*"):
        if not (newest.parent / converted.name).exists():
            shutil.rmtree(converted)


def remove_unfinished(folder: Path, except_for: str) -> None:
    """Removes checkpoints that a killed process was writing or replacing."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name) and path.name != except_for:
            shutil.rmtree(path, ignore_errors=True)


def recover_replaced(folder: Path) -> None:
    """Renames a checkpoint back if the process was killed between the two renames of `publish`."""
    for replaced in folder.glob("step_*.replaced"):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))


def find_best(checkpoints: list[Path], config: CheckpointConfig) -> Path | None:
    """Returns the checkpoint with the best evaluation at its own step by ``config.best``; of equal ones the first."""
    scores = {path: score(read_record(path).get("evaluation", {}), config) for path in checkpoints}
    known = {path: value for path, value in scores.items() if value is not None}
    return max(sorted(known), key=lambda path: known[path]) if known else None


def score(evaluation: dict[str, float], config: CheckpointConfig) -> float | None:
    """Returns the figure ``config.best``, negated if the smallest is best; None if the evaluation does not have it."""
    value = evaluation.get(config.best or "")
    return None if value is None else (value if config.best_is == "max" else -value)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
