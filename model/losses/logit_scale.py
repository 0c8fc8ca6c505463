"""Learned scales (1 / temperature) of the losses, clamped in the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def log_scale(start: float, learned: bool) -> nn.Parameter:
    """log(start) as a parameter (1,); one that is not learned keeps its place in checkpoints, but has no gradient."""
    return nn.Parameter(torch.tensor([math.log(start)]), requires_grad=learned)


class ClampBelow(torch.autograd.Function):
    """min(x, limit), whose gradient still moves x back inside.

    A plain clamp has gradient zero outside, so a parameter that steps over the limit stays there. Clamping the
    parameter in place does not help under ZeRO: the fp32 master is another, partitioned tensor, and overwrites the
    clamped copy. Here the gradient passes inside, and at or over the limit where descent along it lowers x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gradient = gradients[0]
        outward = (x >= ctx.limit) & (gradient < 0)
        return gradient.masked_fill(outward, 0), None


def clamped_exp(log_scale: Tensor, limit: float) -> Tensor:
    """exp(min(log_scale, limit)) as a scalar (), float32 at least.

    The parameter itself has shape (1,): DeepSpeed cannot broadcast one without dimensions.
    """
    dtype = torch.promote_types(log_scale.dtype, torch.float32)
    return ClampBelow.apply(log_scale.to(dtype).reshape(()), limit).exp()  # type: ignore[no-any-return]
