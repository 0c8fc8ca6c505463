"""Tensors of all ranks, with gradients that make the mean over ranks exact.

Each rank computes the loss of its own rows against the columns of all ranks. So every rank has a part of the gradient
of a gathered feature. The backward passes here sum those parts (reduce-scatter for a gather, all-reduce for a sum).
DeepSpeed averages parameter gradients over ranks, which then gives the exact gradient of the mean loss over ranks.

In a process without torch.distributed, all of these functions are the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed them and warns at each call of the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """Returns the number of ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this process in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_integers(x: Tensor) -> Tensor:
    """Gathers (B, ...) of all ranks -> (W * B, ...) in rank order, without gradient. B is the same on all ranks."""
    size = world_size()
    if size == 1:
        return x
    gathered = x.new_empty((size * x.shape[0], *x.shape[1:]))
    all_gather(gathered, x.contiguous())
    return gathered


class GatherRows(torch.autograd.Function):
    """Gathers (B, d) of all ranks -> (W * B, d); backward: sum over ranks of the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_integers(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty((gradient.shape[0] // world_size(), *gradient.shape[1:]))
        reduce_scatter(own, gradient)
        return own


class SumOverRanks(torch.autograd.Function):
    """Elementwise sum of the tensors of all ranks; backward: sum over ranks of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class AverageGradient(torch.autograd.Function):
    """The tensor itself; backward: mean over ranks of the gradient, the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mean = gradients[0] / world_size()
        dist.all_reduce(mean)
        return mean


def gather_rows_with_gradient(x: Tensor) -> Tensor:
    """Gathers the rows (B, d) of all ranks -> (W * B, d), differentiable."""
    return x if world_size() == 1 else GatherRows.apply(x)  # type: ignore[no-any-return]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sums over ranks, differentiable."""
    return x if world_size() == 1 else SumOverRanks.apply(x)  # type: ignore[no-any-return]


def average_gradient(x: Tensor) -> Tensor:
    """Returns x, which is the same on all ranks, and makes its gradient the same on all ranks.

    A clamp that depends on the sign of the gradient needs the gradient of the global batch.
    """
    return x if world_size() == 1 else AverageGradient.apply(x)  # type: ignore[no-any-return]


def log_sum_over_ranks(x: Tensor) -> Tensor:
    """Returns the log of the sum over ranks of exp(x), elementwise, without gradient. A NaN of one rank reaches all."""
    if world_size() == 1:
        return x
    top = x.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = (x - top).exp()
    dist.all_reduce(total)
    return total.log() + top


def own_share(x: Tensor) -> Tensor:
    """Takes this rank's (B, ...) from (W * B, ...) in rank order."""
    size = world_size()
    return x if size == 1 else x.chunk(size)[rank()]
