"""Loads a checkpoint into the engine: the newest one whose checksums match and which holds no code.

    found = find_newest_good(run / "checkpoints")      # a collective, as is the next
    state = load_checkpoint(engine, found)             # {"stream": {...}, ...}

Another world size or ZeRO stage goes through reshape.py. A checkpoint is not trusted: common/safe_load.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from priorclip.common.checkpoint_files import average_buffers, find_checkpoints, find_damage, rank_file, read_record
from priorclip.common.safe_load import UnsafeFile, load_tensors, only_safe_loads, refuse_unsafe
from priorclip.training.checkpoints.files import Shape, find_best, recover_replaced
from priorclip.training.checkpoints.reshape import load_reshaped, run_state
from priorclip.training.config import CheckpointConfig
from priorclip.training.engine.buffers import set_buffers
from priorclip.training.engine.nvme import is_swapped, states_to_disk
from priorclip.training.ranks.rng_state import restore_rng_states

logger = logging.getLogger(__name__)


def find_newest_good(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose checksums match. Rank 0 searches; all ranks get its answer. A collective.

    Raises:
        UnsafeFile: a file of it could run code
    """
    return find_good(folder, lambda checkpoints: checkpoints[0] if checkpoints else None)


def find_best_good(folder: Path, config: CheckpointConfig) -> Path | None:
    """Returns the best checkpoint by ``config.best`` whose checksums match, as `find_newest_good` does."""
    return find_good(folder, lambda checkpoints: find_best(checkpoints, config))


def find_good(folder: Path, choose: Callable[[list[Path]], Path | None]) -> Path | None:
    found: str | None = None
    unsafe = ""
    if dist.get_rank() == 0:
        recover_replaced(folder)
        candidates = find_checkpoints(folder)
        while (candidate := choose(candidates)) is not None:
            damage = find_damage(candidate)
            if damage is None:
                found = str(candidate)
                try:
                    refuse_unsafe(candidate)
                except UnsafeFile as error:
                    unsafe = str(error)
                break
            logger.warning("%s is not used: %s. The next one is tried", candidate, damage)
            candidates.remove(candidate)
    answer = [found, unsafe]
    dist.broadcast_object_list(answer)
    if answer[1]:
        raise UnsafeFile(answer[1])
    return Path(answer[0]) if answer[0] else None


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Sets engine and random number generators to the checkpoint's state. Returns what the run saved with it.

    A collective.

    Raises:
        ValueError: DeepSpeed does not find its files, or offload to NVMe cannot resume from this checkpoint
        UnsafeFile: a file could run code
    """
    record = read_record(checkpoint)
    current = Shape.of(engine)
    written = Shape(record["world_size"], record.get("zero_stage", current.zero_stage))
    # Without ZeRO, rank 0 saves everything, for any number of ranks.
    if written != current and not written.zero_stage == current.zero_stage == 0:
        if is_swapped(engine):
            raise ValueError(
                f"{checkpoint} has {written.world_size} ranks and ZeRO stage {written.zero_stage}: with offload to nvme"
                " only the same number of ranks and stage 3 can resume from it. Use zero3-offload, at least until the"
                " next checkpoint"
            )
        state = load_reshaped(engine, checkpoint, written)
        restore_rng_states(checkpoint)
        return state
    with states_to_disk(engine), only_safe_loads():
        path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(f"{checkpoint}: DeepSpeed could not load it")
    if written == current:
        own = checkpoint / rank_file("buffers", dist.get_rank())
        buffers = load_tensors(own) if own.is_file() else {}
    else:
        buffers = average_buffers(checkpoint)
    set_buffers(engine.module, buffers)
    restore_rng_states(checkpoint)
    return run_state(client_state)
