"""The layers of an encoder, counted from its input: for learning rates that fall with depth, and for locked towers.

    layers_of(encoder)      # {"patch_embed.proj.weight": 0, "blocks.0.attn.qkv.weight": 1, ... "blocks.11...": 12}
    lock(encoder, 2)        # only the last two layers are trained
    keep_locked(encoder)    # in eval mode: no dropout, batch norms on their stored statistics

timm models say themselves what their layers are (``group_matcher``). A transformers encoder has embeddings, then one
layer for each number in its list of layers; what follows the list belongs to the last.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from timm.models import group_parameters
from torch import nn

if TYPE_CHECKING:
    from priorclip.model.encoders.text import TextEncoder
    from priorclip.model.encoders.vision import ImageEncoder

NUMBERED = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")


def layers_of(encoder: ImageEncoder | TextEncoder) -> dict[str, int]:
    """The layer of each parameter of ``encoder.model``, 0 next to the input."""
    backbone: Any = encoder.model
    if hasattr(backbone, "group_matcher"):
        return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    names = [name for name, _ in backbone.named_parameters()]
    numbered = {name: int(found[1]) + 1 for name in names if (found := NUMBERED.search(name))}
    last = max(numbered.values(), default=0)
    before = True  # parameters come in the order in which they are used: embeddings, layers, what follows
    layers: dict[str, int] = {}
    for name in names:
        before = before and name not in numbered
        layers[name] = numbered.get(name, 0 if before else last)
    return layers


def lock(encoder: ImageEncoder | TextEncoder, unlocked: int) -> None:
    """Train the last ``unlocked`` layers only; what is locked has no gradient.

    Raises ValueError where there are fewer layers.
    """
    layers = layers_of(encoder)
    count = max(layers.values()) + 1
    if unlocked > count:
        raise ValueError(f"unlocked is {unlocked}, but '{encoder.config.name}' has {count} layers")
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(layers[name] >= count - unlocked)


def keep_locked(encoder: nn.Module) -> None:
    """Put every module without a trained parameter of its own or below it into eval mode."""
    for module in encoder.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
