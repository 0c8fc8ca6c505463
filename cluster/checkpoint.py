"""Checkpoints of a run: written aside, fsynced, checksummed, published by renaming; the newest that verifies resumes.

    checkpoints/step_00000100/            DeepSpeed's files, one set a rank
    checkpoints/step_00000100/buffers_rank_00000.pt   a rank's batch-norm statistics; DeepSpeed keeps only rank 0's
    checkpoints/step_00000100/checksums.json   sha256 of each of them, and the world size that wrote them
    checkpoints/latest                    the name of the newest, for people and for DeepSpeed's own tools

A folder is only called ``step_N`` once it is whole: until then its name ends in ``.partial``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, client_state: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step_N`` for the engine's step N. A collective; returns the published path.

    ``client_state`` is what the run adds (data position, epoch); ``keep`` newest checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{engine.global_steps:08d}"
    partial = folder / f"{final.name}.partial"
    first = dist.get_rank() == 0
    if first:
        for torn in folder.glob("step_*.partial"):
            shutil.rmtree(torn)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, client_state=client_state, save_latest=False)
    save_buffers(engine.module, partial)
    dist.barrier()
    if first:
        seal(partial, dist.get_world_size())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        replace_text(folder / "latest", final.name)
        sync_folder(folder)
        retire(final, keep)
    dist.barrier()
    return final


def retire(newest: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints up to ``newest``, which was just written.

    Later steps are removed too: they are torn, or of a run that was begun again here, and would else be resumed from.
    """
    whole = published(newest.parent)
    for later in [path for path in whole if path.name > newest.name]:
        logger.warning(
            "%s is removed: the run has gone on from an earlier step, and %s is its newest", later, newest.name
        )
        shutil.rmtree(later)
    for old in [path for path in whole if path.name <= newest.name][max(1, keep) :]:
        shutil.rmtree(old)


def save_buffers(model: torch.nn.Module, folder: Path) -> None:
    """This rank's buffers beside DeepSpeed's files."""
    persistent = set(model.state_dict().keys())
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    if buffers:
        torch.save(buffers, folder / f"buffers_rank_{dist.get_rank():05d}.pt")


def load_buffers(model: torch.nn.Module, folder: Path) -> None:
    path = folder / f"buffers_rank_{dist.get_rank():05d}.pt"
    if path.is_file():
        buffers = dict(model.named_buffers())
        for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
            buffers[name].copy_(value)


def seal(folder: Path, world_size: int) -> None:
    """fsync every file and write their checksums beside them."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
    replace_text(folder / CHECKSUMS, json.dumps({"world_size": world_size, "sha256": sums}, indent=1))
    sync_folder(folder)


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
        record = json.loads((checkpoint / CHECKSUMS).read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    for name, expected in record["sha256"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                return f"{name} does not match its checksum"
    return None


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold. Rank 0 looks, all ranks get its answer."""
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        for candidate in published(folder):
            problem = fault(candidate)
            if problem is None:
                found = [str(candidate)]
                break
            logger.warning("%s is not used: %s; trying the one before it", candidate, problem)
    dist.broadcast_object_list(found)
    return Path(found[0]) if found[0] else None


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Bring the engine to the checkpoint's state and return the client state that was saved with it.

    Raises:
        ValueError: another world size wrote the checkpoint.
    """
    world_size = json.loads((checkpoint / CHECKSUMS).read_text())["world_size"]
    if world_size != dist.get_world_size():
        raise ValueError(
            f"{checkpoint} was written by {world_size} ranks and this run has {dist.get_world_size()}: resume with"
            f" {world_size}, or start a new run directory with --init_from EXPORT (weights carry over)"
        )
    path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(f"{checkpoint}: DeepSpeed could not load it")
    load_buffers(engine.module, checkpoint)
    return client_state
