"""Tensors of all ranks, with gradients that make the mean over ranks exact.

Each rank computes the loss of its own rows against everybody's columns. The gradient of a gathered feature therefore
has a part on every rank; the backward passes here sum those parts (a reduce-scatter for a gather, an all-reduce for a
sum). With that, averaging parameter gradients over ranks, as DeepSpeed does, gives the gradient of the mean over ranks
of the losses, to the last term.

All of it is the identity in a process without torch.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 names them so, and warns at each call by the names of before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """Ranks of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among the ranks of the default process group; 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_integers(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (W * B, ...), in the order of ranks, no gradient. B must be the same on all ranks."""
    size = world_size()
    if size == 1:
        return x
    gathered = x.new_empty((size * x.shape[0], *x.shape[1:]))
    all_gather(gathered, x.contiguous())
    return gathered


class GatherRows(torch.autograd.Function):
    """(B, d) of every rank -> (W * B, d); backward: sum over ranks of the gradient of this rank's rows."""

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
    """Elementwise sum of every rank's tensor; backward: sum over ranks of the gradient."""

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
    """The tensor itself; backward: mean over ranks of the gradient, so that every rank has the whole of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        mean = gradients[0] / world_size()
        dist.all_reduce(mean)
        return mean


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks, differentiable."""
    return x if world_size() == 1 else GatherRows.apply(x)  # type: ignore[no-any-return]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over ranks, differentiable."""
    return x if world_size() == 1 else SumOverRanks.apply(x)  # type: ignore[no-any-return]


def average_gradient(x: Tensor) -> Tensor:
    """x, the same on all ranks, with a gradient that is the same too.

    For what follows backward and is not linear: a clamp that looks at the gradient's sign must see that of the whole.
    """
    return x if world_size() == 1 else AverageGradient.apply(x)  # type: ignore[no-any-return]


def log_sum_over_ranks(x: Tensor) -> Tensor:
    """log of the sum over ranks of exp(x), elementwise, no gradient. Not a number where a rank's x is not."""
    if world_size() == 1:
        return x
    top = x.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    total = (x - top).exp()
    dist.all_reduce(total)
    return total.log() + top


def own_share(x: Tensor) -> Tensor:
    """(W * B, ...) in the order of ranks -> this rank's (B, ...)."""
    size = world_size()
    return x if size == 1 else x.chunk(size)[rank()]
