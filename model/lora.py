"""LoRA by ``peft``: low-rank adapters in the linear layers of the encoders; exports contain merged weights.

    adapt(model, LoraConfig(rank=8))                # in the encoders only A and B are trained; the rest as before
    merged = merge(state, model.config, lora)       # state dict with adapters -> state dict of the plain model

A linear layer computes W x + (alpha / rank) B A x, with A (rank, in), B (out, rank); B starts at zero, so the
model's outputs do not change at the start. Pointwise convolutions are adapted in the same way.

Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from priorclip.model.build import build_model
from priorclip.model.config import LoraConfig, ModelConfig
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder

ADAPTER = "default"


def adapt(model: nn.Module, lora: LoraConfig) -> None:
    """Puts adapters into the trained encoders, in place.

    Raises ValueError if the targets name no layer of an encoder.
    """
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    for encoder in trained_encoders(model):
        targets = target_layers(encoder.model, lora.targets)
        settings = Settings(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
        )
        inject_adapter_in_model(settings, encoder.model, adapter_name=ADAPTER)


def trained_encoders(model: nn.Module) -> list[Any]:
    """Returns the encoders that have a trained parameter."""
    found = [module for module in model.modules() if isinstance(module, ImageEncoder | TextEncoder)]
    return [encoder for encoder in found if any(parameter.requires_grad for parameter in encoder.parameters())]


def target_layers(backbone: nn.Module, targets: list[str] | None) -> list[str]:
    """Returns the names of trained linear layers and pointwise convolutions whose last part is in ``targets``.

    None: of all. Frozen layers and layers that are never called are left out. Raises ValueError if none is left.
    """
    names = [
        name
        for name, module in backbone.named_modules()
        if (
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)
        )
        and module.weight.requires_grad
        and not bypassed(backbone, name)
    ]
    chosen = [name for name in names if targets is None or name.rpartition(".")[2] in targets]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"lora.targets {targets}: {type(backbone).__name__} has no such trained layer; it has {', '.join(known)}"
        )
    return chosen


def bypassed(backbone: nn.Module, name: str) -> bool:
    """Tells whether the weight is used without calling the layer, so that an adapter would have no effect.

    So do timm's attention with a separate bias for queries (EVA, BEiT, Swin V2) and torch's attention.
    """
    parent, _, last = name.rpartition(".")
    owner = backbone.get_submodule(parent)
    return (last == "qkv" and getattr(owner, "q_bias", None) is not None) or isinstance(owner, nn.MultiheadAttention)


def merge(state: Mapping[str, Tensor], config: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """Returns the weights of the equivalent model without adapters: W + (alpha / rank) B A.

    Args:
        state: all weights of an adapted model
        config: of that model
        lora: the options of its adapters
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = copy.deepcopy(config)
    for encoder in (settings.vision, settings.prior, settings.text):
        encoder.weights = encoder.remember = None
    model = build_model(settings)
    adapt(model, lora)
    model.load_state_dict(dict(state))
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    return {name: value.detach() for name, value in model.state_dict().items()}
