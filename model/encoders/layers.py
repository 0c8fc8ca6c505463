"""The layers of an encoder, counted from its input: for learning rates that fall with depth, and to freeze layers.

    layers_of(backbone)           # {"patch_embed.proj.weight": 0, "blocks.0.norm1.weight": 1, ... "blocks.11...": 12}
    lock(backbone, 2, "vit")      # only the last two layers are trained
    keep_locked(backbone)         # in eval mode: no dropout, batch norms use their stored statistics

timm models name their layers (``group_matcher``). A transformers encoder has embeddings, then one layer for each number
in its list of layers; modules after the list belong to the last layer.
"""

from __future__ import annotations

import re
from typing import Any

from timm.models import group_parameters
from torch import nn

NUMBERED = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")


def layers_of(backbone: Any) -> dict[str, int]:
    """Returns the layer of each parameter by name, 0 next to the input."""
    if hasattr(backbone, "group_matcher"):
        return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    names = [name for name, _ in backbone.named_parameters()]
    numbered = {name: int(found[1]) + 1 for name in names if (found := NUMBERED.search(name))}
    last = max(numbered.values(), default=0)
    before = True  # parameters come in the order of their use: embeddings, layers, the rest
    layers: dict[str, int] = {}
    for name in names:
        before = before and name not in numbered
        layers[name] = numbered.get(name, 0 if before else last)
    return layers


def lock(backbone: nn.Module, unlocked: int, name: str | None) -> None:
    """Freezes all but the last ``unlocked`` layers of the encoder ``name``.

    Raises ValueError if it has fewer layers.
    """
    layers = layers_of(backbone)
    count = max(layers.values()) + 1
    if unlocked > count:
        raise ValueError(f"unlocked is {unlocked}, but '{name}' has {count} layers")
    for parameter_name, parameter in backbone.named_parameters():
        parameter.requires_grad_(layers[parameter_name] >= count - unlocked)


def keep_locked(backbone: nn.Module) -> None:
    """Puts every module that has no trained parameter, itself or below it, into eval mode."""
    for module in backbone.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
