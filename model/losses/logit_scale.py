"""Learned scales (1 / temperature) of the losses, clamped in the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def log_scale(start: float, learned: bool) -> nn.Parameter:
    """Returns log(start) as a parameter (1,). If it is not learned, it has no gradient but stays in checkpoints."""
    return nn.Parameter(torch.tensor([math.log(start)]), requires_grad=learned)


class ClampBelow(torch.autograd.Function):
    """min(x, limit), whose gradient still moves x back inside.

    The gradient of a plain clamp is zero outside, so a parameter that steps over the limit stays there. Clamping the
    parameter in place does not help under ZeRO: the fp32 master weights are another, partitioned tensor and overwrite
    the clamped copy. Here the gradient passes below the limit. At or over the limit it passes if descent lowers x.
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
    """Returns exp(min(log_scale, limit)) as a scalar (), at least float32.

    The parameter has shape (1,) because DeepSpeed cannot broadcast a parameter without dimensions.
    """
    dtype = torch.promote_types(log_scale.dtype, torch.float32)
    return ClampBelow.apply(log_scale.to(dtype).reshape(()), limit).exp()  # type: ignore[no-any-return]
