"""Batch normalisation whose statistics stay float32 while its weights train in half precision.

DeepSpeed casts parameters to bfloat16 or float16 and does not cast buffers, which is right: a running variance with 8
bits stops moving. But torch normalises half precision inputs only with weights of the statistics' dtype. So the weights
are cast at each use, and their gradient has their own dtype.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics(model: nn.Module) -> None:
    """Lets every batch norm of the model use half precision weights with float32 statistics, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.__class__ = mixed_precision(type(module))  # type: ignore[arg-type]


@cache  # type: ignore[arg-type]
def mixed_precision(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """Returns a subclass of a batch norm whose ``weight`` and ``bias`` are read in the statistics' dtype."""

    def read(name: str) -> property:
        def value(self: _BatchNorm) -> Tensor | None:
            parameter = self._parameters[name]
            assert isinstance(self.running_mean, torch.Tensor)
            return None if parameter is None else parameter.to(self.running_mean.dtype)

        return property(value)

    return type(kind.__name__, (kind,), {"weight": read("weight"), "bias": read("bias")})
