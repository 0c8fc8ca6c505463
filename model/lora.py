"""LoRA through ``peft``: low-rank adapters in the linear layers of the encoders; exports have them merged in.

    adapt(model, LoraConfig(rank=8))                # encoders frozen but for A and B; the rest trains as before
    merged = merge(state, model.config, lora)       # a state dict with adapters -> one without, of the plain model

A linear layer computes W x + (alpha / rank) B A x, with A (rank, in), B (out, rank); B starts at zero, so the model
starts as it was. Pointwise convolutions are adapted likewise. Source: LoRA, arXiv 2106.09685.
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
    """Put adapters into the encoders that are trained, in place.

    Raises ValueError where the targets name no layer of an encoder.
    """
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    for encoder in encoders(model):
        targets = target_layers(encoder.model, lora.targets)
        settings = Settings(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
        )
        inject_adapter_in_model(settings, encoder.model, adapter_name=ADAPTER)


def encoders(model: nn.Module) -> list[Any]:
    """The encoders of the model that are trained."""
    found = [module for module in model.modules() if isinstance(module, ImageEncoder | TextEncoder)]
    return [encoder for encoder in found if any(parameter.requires_grad for parameter in encoder.parameters())]


def target_layers(backbone: nn.Module, targets: list[str] | None) -> list[str]:
    """Names of the linear layers and pointwise convolutions that are trained and whose last part is among the targets;
    null: of all. A locked layer (``unlocked``) gets none, nor does one whose adapter would never be computed."""
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
            f"lora.targets {targets}: {type(backbone).__name__} has no such layer that is trained; it has "
            f"{', '.join(known)}"
        )
    return chosen


def bypassed(backbone: nn.Module, name: str) -> bool:
    """Whether the layer's weight is used without the layer: timm's attention with a bias of its own for queries (EVA,
    BEiT, Swin V2), and torch's own attention."""
    parent, _, last = name.rpartition(".")
    owner = backbone.get_submodule(parent)
    return (last == "qkv" and getattr(owner, "q_bias", None) is not None) or isinstance(owner, nn.MultiheadAttention)


def merge(state: Mapping[str, Tensor], config: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same: W + (alpha / rank) B A.

    Args:
        state: whole weights of a model that was adapted, by its names
        config: of that model
        lora: what it was adapted with
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
