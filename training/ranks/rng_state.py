"""States of a rank's random number generators: Python's, NumPy's, torch's and its accelerator's.

    state = rng_states()         # tensors and plain numbers, for torch.load(weights_only=True)
    set_rng_states(state)              # the next draws are those that followed rng_states()

Our own steps are seeded by their number (``distributed.seed_step``). But a library, or a user's task, may draw from the
global generators too. So a checkpoint keeps their states for each rank.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from priorclip.common.safe_load import load_tensors


def rng_states_name(rank: int) -> str:
    return f"generators_rank_{rank:05d}.pt"


def rng_states() -> dict[str, Any]:
    """States of this process's generators."""
    numbers = np.random.get_state(legacy=False)
    assert isinstance(numbers, dict)
    key = torch.from_numpy(numbers["state"]["key"].astype(np.int64))
    states = {
        "python": random.getstate(),
        "numpy": {**numbers, "state": {**numbers["state"], "key": key}},
        "torch": torch.get_rng_state(),
    }
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        states["accelerator"] = accelerator.get_rng_state().cpu()
    return states


def set_rng_states(states: dict[str, Any]) -> None:
    """Sets this process's generators; the accelerator's only if both runs have an accelerator."""
    version, words, rest = states["python"]
    random.setstate((version, tuple(words), rest))
    numbers = states["numpy"]
    np.random.set_state({**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].numpy()}})
    torch.set_rng_state(states["torch"])
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu" and "accelerator" in states:
        accelerator.set_rng_state(states["accelerator"])


def restore_rng_states(checkpoint: Path) -> None:
    """Sets the states that a checkpoint has of this rank. A rank that is not in the checkpoint keeps its states."""
    path = checkpoint / rng_states_name(dist.get_rank())
    if path.is_file():
        set_rng_states(load_tensors(path))
