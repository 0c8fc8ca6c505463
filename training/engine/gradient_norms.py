"""The gradient norm of each part of a model, also where ZeRO leaves a rank only its share of the gradients.

    squares = squared_norms(engine, lambda name: name.split(".")[0])    # {"vision": 0.83, "text": 0.11, ...}

It is asked between the backward pass and ``engine.step()``, which frees the gradients. What a rank returns is what it
holds: summed over the ranks they are the squared norms of the step's gradient, before clipping, the loss scale of fp16
taken out. No rank gathers a gradient for it, as deepspeed's ``safe_get_full_grad`` would, one collective a parameter.

    ZeRO 0       each rank has the whole gradient, and gives a W-th of its square
    ZeRO 1, 2    a slice of the flattened gradients: deepspeed's ``_hp_mapping`` of a parameter has the part in it
    ZeRO 3       a slice of every parameter: deepspeed's ``safe_get_local_grad``
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
    """This rank's share of the squared gradient norm of each part; the same parts, in the same order, on every rank."""
    if getattr(engine.optimizer, "cpu_offload", False) or getattr(engine.optimizer, "offload_optimizer", False):
        get_accelerator().synchronize()  # the copies to the host are under way
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
    """What this rank has of a parameter's gradient, and whether that is all of it, as every rank then has it."""
    whole = getattr(parameter, "_hp_grad", None)  # of deepspeed's optimizer for bf16 with float32 accumulation
    if whole is not None:
        return whole, True
    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter), False
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = parameter._hp_mapping
        return (None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)), False  # type: ignore[attr-defined]
    return parameter.grad, True


def squared_norm(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """Weighted sum of squares, in float64 over norms in float32; not finite where a gradient is not."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm([each.float() for each in tensors])).double()
    return (norms.square() * norms.new_tensor(weights)).sum()


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """What fp16 has multiplied the loss with, 1 else."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0) or 1.0) if engine.fp16_enabled() else 1.0
