"""Loads a checkpoint into the engine: the newest one whose checksums match and which holds no code.

    found = find_newest_good(run / "checkpoints")      # a collective, as is the next
    state = load_checkpoint(engine, found)             # {"stream": {...}, ...}

Another world size or ZeRO stage goes through reshape.py. A checkpoint is not trusted: common/safe_load.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed as dist

from priorclip.common.checkpoint_files import average_buffers, find_checkpoints, find_damage, rank_file
from priorclip.common.checkpoint_record import load_record
from priorclip.common.output import get_logger
from priorclip.common.safe_load import UnsafeFile, load_tensors, only_safe_loads, refuse_unsafe
from priorclip.training.checkpoints.files import SET_ASIDE, Shape, find_best, recover_replaced, set_aside
from priorclip.training.checkpoints.reshape import load_reshaped, run_state
from priorclip.training.config import CheckpointConfig
from priorclip.training.engine.buffers import set_buffers
from priorclip.training.engine.nvme import is_swapped, states_to_disk
from priorclip.training.ranks.rng_state import restore_rng_states

logger = get_logger(__name__)
T = TypeVar("T")


class NoGoodCheckpoint(ValueError):
    """There are checkpoints, and none of them can be read."""


def find_newest_good(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose checksums match, None if there are no checkpoints. A collective.

    Rank 0 searches, and all ranks get its answer or its error. Newer ones that cannot be read are set aside.

    Raises:
        NoGoodCheckpoint: there are checkpoints, and none can be read
        OSError: the folder cannot be listed
        UnsafeFile: a file of it could run code
    """
    return on_rank_0(lambda: search_newest(folder))


def find_best_good(folder: Path, config: CheckpointConfig) -> Path | None:
    """Returns the best checkpoint by ``config.best`` whose checksums match, or None. A collective."""
    return on_rank_0(lambda: search(folder, lambda checkpoints: find_best(checkpoints, config))[0])


def set_all_aside(folder: Path) -> None:
    """Sets all checkpoints aside, because the run starts over. A collective. Raises OSError if that fails."""

    def work() -> None:
        recover_replaced(folder)
        for checkpoint in find_checkpoints(folder):
            logger.warning("%s is set aside as %s: the run starts over", checkpoint, set_aside(checkpoint))

    on_rank_0(work)


def on_rank_0(work: Callable[[], T]) -> T:
    """Returns the result of ``work`` on rank 0, or raises its error, on every rank. A collective."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (OSError, ValueError, UnsafeFile) as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def search_newest(folder: Path) -> Path | None:
    found, damages = search(folder, lambda checkpoints: checkpoints[0] if checkpoints else None)
    if found is None and damages:
        listed = "; ".join(f"{path.name}: {damage}" for path, damage in damages.items())
        raise NoGoodCheckpoint(
            f"{folder} has checkpoints, and none of them can be read ({listed}). The run does not start over by itself,"
            " because they may be worth repair. Restore one, or start over with --run.checkpoint.resume false, which"
            f" moves them to {folder / SET_ASIDE}"
        )
    for path in damages:
        try:
            logger.warning("%s is kept as %s", path, set_aside(path))
        except OSError as error:
            logger.warning("%s stays where it is: %s", path, error)
    return found


def search(folder: Path, choose: Callable[[list[Path]], Path | None]) -> tuple[Path | None, dict[Path, str]]:
    """Returns the first good checkpoint in the order of ``choose``, and what is wrong with those before it.

    Raises:
        OSError: the folder cannot be listed
        UnsafeFile: a file of the good one could run code
    """
    recover_replaced(folder)
    candidates = find_checkpoints(folder)
    damages: dict[Path, str] = {}
    while (candidate := choose(candidates)) is not None:
        damage = find_damage(candidate)
        if damage is None:
            refuse_unsafe(candidate)
            return candidate, damages
        logger.warning("%s is not used: %s. The next one is tried", candidate, damage)
        damages[candidate] = damage
        candidates.remove(candidate)
    return None, damages


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> dict[str, Any]:
    """Sets engine and random number generators to the checkpoint's state. Returns what the run saved with it.

    A collective.

    Raises:
        ValueError: DeepSpeed does not find its files, or offload to NVMe cannot resume from this checkpoint
        UnsafeFile: a file could run code
    """
    record = load_record(checkpoint)
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
