"""The gradient norm of each part of a model, also if ZeRO leaves a rank only its share of the gradients.

    squares = squared_norms(engine, lambda name: name.split(".")[0])    # {"vision": 0.83, "text": 0.11, ...}

Call it between the backward pass and ``engine.step()``, which frees the gradients. A rank returns the share that it
holds. The sum over the ranks is the squared norm of the step's gradient, before clipping and without the loss scale of
fp16. No gradient is gathered: DeepSpeed's ``safe_get_full_grad`` would need one collective for each parameter.

    ZeRO 0       each rank has the whole gradient and returns its square divided by the world size
    ZeRO 1, 2    a slice of the flattened gradients: DeepSpeed's ``_hp_mapping`` of a parameter has its part of it
    ZeRO 3       a slice of every parameter: DeepSpeed's ``safe_get_local_grad``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_grad
from torch import Tensor, nn

PartOf = Callable[[str], str]


@torch.no_grad()
def squared_norms(engine: deepspeed.DeepSpeedEngine, part_of: PartOf) -> dict[str, float]:
    """Returns this rank's share of the squared gradient norm of each part. All ranks have the same parts in order."""
    if getattr(engine.optimizer, "cpu_offload", False) or getattr(engine.optimizer, "offload_optimizer", False):
        get_accelerator().synchronize()  # gradients are still being copied to the host
    held: dict[str, list[Tensor]] = defaultdict(list)
    weights: dict[str, list[float]] = defaultdict(list)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        gradient, whole = held_gradient(parameter)
        held[part] += [] if gradient is None else [gradient]
        weights[part] += [] if gradient is None else [1 / engine.world_size if whole else 1.0]
    scale = loss_scale(engine)
    squares = {part: squared_norm(tensors, weights[part]) for part, tensors in held.items()}
    return {part: float(square) / scale**2 for part, square in squares.items()}


def held_gradient(parameter: nn.Parameter) -> tuple[Tensor | None, bool]:
    """Returns the part of a parameter's gradient on this rank, and whether every rank has the whole gradient."""
    whole = getattr(parameter, "_hp_grad", None)  # of DeepSpeed's optimizer for bf16 with float32 accumulation
    if whole is not None:
        return whole, True
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter), False
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = parameter._hp_mapping
        return (None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)), False  # type: ignore[attr-defined]
    return parameter.grad, True


def squared_norm(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Weighted sum of squares, in float64 over norms in float32; not finite if a gradient is not."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm([each.float() for each in tensors])).double()
    return (norms.square() * norms.new_tensor(weights)).sum()


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """The factor of the loss under fp16, otherwise 1."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0) or 1.0) if engine.fp16_enabled() else 1.0
