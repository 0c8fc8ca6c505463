"""Persistent buffers of a model: batch-norm statistics, which each rank computes alone.

saved = get_buffers(engine.module)         # {"1.running_mean": tensor, ...}, not copied
set_buffers(engine.module, saved)
average_batch_norms(engine.module, world_size)      # before an evaluation
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def get_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers that are in the model's state dict."""
    persistent = set(model.state_dict().keys())
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name in persistent}


def set_buffers(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Copies values into the model's buffers of these names."""
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)


def average_batch_norms(model: torch.nn.Module, world_size: int) -> None:
    """Replaces the running means and variances by their means over the ranks. A collective."""
    if world_size == 1:
        return
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            dist.all_reduce(buffer)
            buffer /= world_size
