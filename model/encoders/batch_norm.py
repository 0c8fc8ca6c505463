"""Batch normalisation whose statistics stay float32 while its weights train in half precision.

DeepSpeed casts parameters to bfloat16 or float16 and leaves buffers alone, as it should: a running variance rounded to
8 bits stops moving. But torch normalises half inputs only with weights of the statistics' type. So the weights are cast
where they are used; their gradient comes back in their own type.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics(model: nn.Module) -> None:
    """Let every batch norm of the model take half precision weights beside float32 statistics, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.__class__ = mixed(type(module))  # type: ignore[arg-type]


@cache  # type: ignore[arg-type]
def mixed(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """``kind`` (torch's or timm's batch norm) whose ``weight`` and ``bias`` read in the statistics' type."""

    def read(name: str) -> property:
        def value(self: _BatchNorm) -> Tensor | None:
            parameter = self._parameters[name]
            assert isinstance(self.running_mean, torch.Tensor)
            return None if parameter is None else parameter.to(self.running_mean.dtype)

        return property(value)

    return type(kind.__name__, (kind,), {"weight": read("weight"), "bias": read("bias")})
