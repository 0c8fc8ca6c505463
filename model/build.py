"""Builds a model from its configuration, and the optimizer's parameter groups from a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from priorclip.common.output import get_logger
from priorclip.model.config import ModelConfig
from priorclip.model.encoders.layers import layers_of
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.networks.clip import PlainCLIP
from priorclip.model.networks.priorclip import PriorCLIP
from priorclip.model.networks.prioritr import PriorITR

log = get_logger(__name__)

# Parameters without weight decay besides norms and biases: learned tokens, tables of positions, scales.
UNDECAYED = (
    "cls_token",
    "class_token",
    "reg_token",
    "dist_token",
    "pos_embed",
    "position_embedding",
    "relative_position_bias_table",
    "logit_scale",
    "attribution_scale",
    "logit_bias",
)


KINDS = {"priorclip": PriorCLIP, "prioritr": PriorITR, "clip": PlainCLIP}


def build_model(config: ModelConfig, vocab_size: int | None = None) -> PriorCLIP | PriorITR | PlainCLIP:
    """Builds the model of the configuration, with the weights that it names.

    Args:
        config: is not changed; ``model.config`` is the resolved copy
        vocab_size: tokens of the tokenizer, for a text encoder that starts at random
    """
    model: Any = KINDS[config.kind](config, vocab_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info("%s: %.1f M parameters, %.1f M trained", config.kind, total / 1e6, trained / 1e6)
    return model


def undecayed(model: nn.Module) -> set[str]:
    """Returns the names of parameters without weight decay: norms, biases, scales, positions, learned tokens."""
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter
        if len(shape) <= 1 or any(part in name for part in UNDECAYED):
            names.add(name)
    return names


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Returns groups of the trained parameters for the optimizer: with and without weight decay, by learning rate.

    Args:
        model: the model; its encoders are found by their type
        weight_decay: of the parameters that decay
        lr: learning rate outside the encoders; needed with layer_decay
        layer_decay: layer l of an encoder with L layers has lr * layer_decay ** (L - l), l = 0 next to the input (BEiT,
            arXiv 2106.08254, as in timm); 1: two groups with the optimizer's learning rate
    """
    without = undecayed(model)
    scales = layer_scales(model, layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(name, 1.0), name not in without), []).append(parameter)
    made: list[dict[str, Any]] = []
    for (scale, decays), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        name = ("decay" if decays else "no_decay") + ("" if scale == 1 else f"_{scale:.4g}")
        group: dict[str, Any] = {
            "name": name,
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
        }
        if layer_decay != 1:
            if lr is None:
                raise ValueError("layer_decay needs the learning rate: give lr")
            if not parameters:
                continue
            group["lr"] = lr * scale
        made.append(group)
    return made


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Returns the learning rate of each parameter of an encoder as a factor of the run's."""
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, not {layer_decay}")
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        if layer_decay < 1 and isinstance(module, ImageEncoder | TextEncoder):
            layers = layers_of(module.model)
            count = max(layers.values()) + 1
            scales |= {f"{prefix}.model.{name}": layer_decay ** (count - layer) for name, layer in layers.items()}
    return scales
