"""Checkpoints of a run: written aside, fsynced, checksummed, published by renaming; the newest that verifies resumes.

    checkpoints/step_00000100/            DeepSpeed's files, one set a rank
    checkpoints/step_00000100/buffers_rank_00000.pt   a rank's batch-norm statistics; DeepSpeed keeps only rank 0's
    checkpoints/step_00000100/averages_rank_00000.pt  a rank's piece of the moving average, where the run keeps one
    checkpoints/step_00000100/generators_rank_00000.pt   states of the generators that it draws from
    checkpoints/step_00000100/checksums.json   sha256 of each of them, world size, ZeRO stage and evaluation
    checkpoints/latest, checkpoints/best  names of the newest and of the best, for people and for DeepSpeed's own tools
    checkpoints/universal/step_00000100/  its state by parameter, made when another world size resumes from it

A folder is only called ``step_N`` once it is whole: until then its name has ``.partial`` in it. writer.py
writes them, reshape.py reads them into another world size or ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from priorclip.training.config import CheckpointConfig
from priorclip.training.engine.nvme import is_swapped, states_to_disk
from priorclip.training.ranks.rng_state import restore_rng_states

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Shape:
    """What a checkpoint's files depend on beside the model."""

    world_size: int
    zero_stage: int

    @staticmethod
    def of(engine: deepspeed.DeepSpeedEngine) -> Shape:
        return Shape(dist.get_world_size(), int(engine.zero_optimization_stage()))

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} under ZeRO {self.zero_stage}"


def publish(partial: Path, record: dict[str, Any], config: CheckpointConfig) -> Path:
    """Make a whole folder a checkpoint and retire what is not to be kept; returns its path.

    ``record`` becomes ``checksums.json``. A checkpoint of the same step that is there already is replaced.
    """
    final = partial.parent / f"step_{record['step']:08d}"
    replace_text(partial / CHECKSUMS, json.dumps(record, indent=1))
    sync_folder(partial)
    replaced = partial.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    replace_text(final.parent / "latest", final.name)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    retire(final, config)
    return final


def retire(newest: Path, config: CheckpointConfig) -> None:
    """Remove all but the newest checkpoints up to ``newest``, those of every so many steps, and the best.

    Later steps are removed too: they are torn, or of a run that was begun again here, and would else be resumed from.
    """
    whole = published(newest.parent)
    for later in [path for path in whole if path.name > newest.name]:
        logger.warning(
            "%s is removed: the run has gone on from an earlier step, and %s is its newest", later, newest.name
        )
        shutil.rmtree(later)
    kept = [path for path in whole if path.name <= newest.name]
    best = best_of(kept, config)
    if best:
        replace_text(newest.parent / "best", best.name)
    for old in kept[max(1, config.keep) :]:
        if old != best and not (config.keep_every and step_of(old) % config.keep_every == 0):
            shutil.rmtree(old)
    for converted in (newest.parent / "universal").glob("step_*"):
        if not (newest.parent / converted.name).exists():
            shutil.rmtree(converted)


def best_of(checkpoints: list[Path], config: CheckpointConfig) -> Path | None:
    """The one whose evaluation, made at its own step, is best by the figure that the run was told to judge by.

    Of equals the first: what comes later is no better.
    """
    scores = {path: score(record_of(path).get("evaluation", {}), config) for path in checkpoints}
    known = {path: value for path, value in scores.items() if value is not None}
    return max(sorted(known), key=lambda path: known[path]) if known else None


def score(evaluation: dict[str, float], config: CheckpointConfig) -> float | None:
    """What the best checkpoint has most of; None where the evaluation has no such figure."""
    value = evaluation.get(config.best or "")
    return None if value is None else (value if config.best_is == "max" else -value)


def record_of(checkpoint: Path) -> dict[str, Any]:
    """``checksums.json``, or nothing where it cannot be read."""
    try:
        return json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, sees the old or the new text and nothing between."""
    aside = path.with_name(f"{path.name}.writing")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def published(folder: Path) -> list[Path]:
    """Whole checkpoints in ``folder``, newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir() and not path.suffix), reverse=True)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text())["sha256"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    for name, wanted in expected.items():
        try:
            if digest(checkpoint / name) != wanted:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold. Rank 0 looks, all ranks get its answer."""
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        recover(folder)
        for candidate in published(folder):
            problem = fault(candidate)
            if problem is None:
                found = [str(candidate)]
                break
            logger.warning("%s is not used: %s; trying the one before it", candidate, problem)
    dist.broadcast_object_list(found)
    return Path(found[0]) if found[0] else None


def recover(folder: Path) -> None:
    """Give back the name of a checkpoint that was to be replaced when the run was killed, between two renames."""
    for replaced in folder.glob("step_*.replaced"):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Bring engine and generators to the checkpoint's state and return what the run saved with it.

    Raises:
        ValueError: DeepSpeed does not find its files.
    """
    record = record_of(checkpoint)
    mine = Shape.of(engine)
    written = Shape(record["world_size"], record.get("zero_stage", mine.zero_stage))
    # Without ZeRO rank 0 has saved all there is, for any number of ranks.
    if written != mine and not written.zero_stage == mine.zero_stage == 0:
        from priorclip.training.checkpoints.reshape import load_reshaped

        if is_swapped(engine):
            raise ValueError(
                f"{checkpoint} is of {written.world_size} ranks and ZeRO stage {written.zero_stage}: with offload"
                " to nvme only as many ranks and stage 3 resume it. Take zero3-offload, if only for a checkpoint"
            )
        state = load_reshaped(engine, checkpoint, written)
        restore_rng_states(checkpoint)
        return state
    with states_to_disk(engine):
        path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(f"{checkpoint}: DeepSpeed could not load it")
    if written == mine:
        own = checkpoint / buffers_name(dist.get_rank())
        buffers = torch.load(own, map_location="cpu", weights_only=True) if own.is_file() else {}
    else:
        buffers = averaged_buffers(checkpoint)
    set_buffers(engine.module, buffers)
    restore_rng_states(checkpoint)
    return state_of_run(client_state)


def state_of_run(client_state: dict[str, Any]) -> dict[str, Any]:
    """What the run gave to be saved; older checkpoints have it among DeepSpeed's own keys."""
    return client_state.get("run", client_state)


def buffers_name(rank: int) -> str:
    return f"buffers_rank_{rank:05d}.pt"


def buffers_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the model remembers beside parameters: batch-norm statistics, which each rank gathers alone."""
    persistent = set(model.state_dict().keys())
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}


def set_buffers(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)


def averaged_buffers(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Means over the ranks that wrote them; counts, which are whole numbers, are the largest."""
    files = sorted(checkpoint.glob("buffers_rank_*.pt"))
    ranks = [torch.load(path, map_location="cpu", weights_only=True) for path in files]
    merged = {}
    for name in ranks[0] if ranks else ():
        values = torch.stack([rank[name] for rank in ranks])
        merged[name] = values.mean(0) if values.is_floating_point() else values.amax(0)
    return merged
