"""Checkpoints of a run with optimizer states on an NVMe disk: the same files as plain ZeRO-3.

DeepSpeed copies the files of the disk beside a checkpoint, under names that another process cannot find, and leaves out
Adam's step, the learning rate and states that are too small for the disk. A run cannot resume exactly from them. So we
read the states into memory while a checkpoint is taken; any other setting can resume from it. When a checkpoint is
loaded, we write the states back to the disk, one sub-group after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


def is_swapped(engine: deepspeed.DeepSpeedEngine) -> bool:
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def states_in_memory(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Within it, ``engine.save_checkpoint`` finds the states in memory and copies no files."""
    if not is_swapped(engine):
        yield
        return
    optimizer: Any = engine.optimizer
    tensors: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for place, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        if optimizer._swappable_optimizer_subgroup(place):
            optimizer._optimizer_states_and_gradient_swap_in(place)
            own = [flat, *(value for value in optimizer.optimizer.state[flat].values() if value.ndim)]
            tensors += own
            copies += [tensor.detach().clone() for tensor in own]
            optimizer._release_swap_buffers(place)
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.data = copy
    engine.zero_nvme_offload_optimizer = lambda: False
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer
        for tensor in tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype)


@contextmanager
def states_to_disk(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Within it, ``engine.load_checkpoint`` writes the states of a ZeRO-3 checkpoint to the disk."""
    if not is_swapped(engine):
        yield
        return
    optimizer: Any = engine.optimizer
    engine.zero_nvme_offload_optimizer = lambda: False
    optimizer.load_state_dict = lambda state_dict_list, **_: restore(optimizer, state_dict_list[dist.get_rank()])
    try:
        yield
    finally:
        del engine.zero_nvme_offload_optimizer, optimizer.load_state_dict


def restore(optimizer: Any, saved: dict[str, Any]) -> None:
    """Sets this rank's masters, moments, steps and learning rates; DeepSpeed makes the parameters from the masters."""
    optimizer.loss_scaler, optimizer.overflow = saved["loss_scaler"], saved["overflow"]
    optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    base, written = optimizer.optimizer, saved["optimizer_state_dict"]
    for group, old in zip(base.param_groups, written["param_groups"], strict=True):
        group.update({name: value for name, value in old.items() if name != "params"})
    for place, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(place)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(place)
        flat.data.copy_(saved["fp32_flat_groups"][place])
        for name, value in written["state"][place].items():
            if name in base.state[flat]:
                base.state[flat][name].copy_(value)
            else:  # before the first step there are none
                base.state[flat][name] = value.clone()
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(place)
    optimizer.reset_swap_buffers()
