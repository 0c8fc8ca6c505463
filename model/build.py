"""From a configuration to a model, and from a model to the optimizer's parameter groups."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from model.clip import PlainCLIP
from model.config import ModelConfig
from model.priorclip import PriorCLIP
from model.prioritr import PriorITR

log = logging.getLogger(__name__)

# Vectors hold no direction to decay: tokens that are learned as such, and tables of positions.
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
)


KINDS = {"priorclip": PriorCLIP, "prioritr": PriorITR, "clip": PlainCLIP}


def build_model(config: ModelConfig, vocab_size: int | None = None) -> PriorCLIP | PriorITR | PlainCLIP:
    """The model of the configuration, with the weights it names.

    Args:
        config: what to build; it is not changed, ``model.config`` is the resolved copy
        vocab_size: tokens of the tokenizer; sizes a text encoder that starts at random
    """
    model: Any = KINDS[config.kind](config, vocab_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    log.info("%s: %.1f M parameters, %.1f M trained", config.kind, total / 1e6, trained / 1e6)
    return model


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay: norms, biases, scales, positions, learned tokens."""
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter itself
        if len(shape) <= 1 or any(part in name for part in UNDECAYED):
            names.add(name)
    return names


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimizer, trained parameters only: with weight decay and without."""
    without = undecayed(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {
            "name": "decay",
            "params": [p for n, p in trained if n not in without],
            "weight_decay": weight_decay,
        },
        {"name": "no_decay", "params": [p for n, p in trained if n in without], "weight_decay": 0.0},
    ]
