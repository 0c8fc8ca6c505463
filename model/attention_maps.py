"""What a model looks at, without belief: the attention of its instruction, and the gradient of its similarity.

    attention_map(model, images)               # (B, h, w), rows sum to 1, or None if the model has no such attention
    gradient_map(model, images, texts)         # (B, h, w), how much each place changes the similarity to the texts

The attention is that of the instruction in the last layer that has one, as a mean over the heads: the first token of
PriorCLIP, the signal of PriorITR's Spatial-PAE. A token that hard belief dropped has 0.

The gradient is taken with respect to the pixels (Simonyan et al. 2014, arXiv 1312.6034), as its size, summed over the
channels and averaged over each cell of the grid of visual tokens. So it needs no layer of a certain kind.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.localization import overlap
from priorclip.model.networks.belief import order_descending
from priorclip.model.networks.instructed_vision import InstructedBackbone, InstructedViT
from priorclip.model.networks.pae import MultiHeadAttention
from priorclip.model.networks.prioritr import PriorITR
from priorclip.model.networks.two_towers import TwoTowers


def exact_copy(model: TwoTowers) -> TwoTowers:
    """Returns a float64 copy in which gradients reach the pixels through frozen encoders too.

    In float64 small beliefs do not underflow to equal values. The copy remembers no features on disk.
    """
    copied = copy.deepcopy(model).double().eval()
    for module in copied.modules():
        if isinstance(module, ImageEncoder):
            module.feature_cache = None
            module.config.trainable = True
    return copied.requires_grad_(False)


def token_grid(model: TwoTowers, images: Tensor) -> tuple[int, int]:
    """Returns the grid (h, w) of visual tokens."""
    if model.has_belief:
        height, width = model.belief_map(images[:1]).shape[1:]
        return height, width
    encoder = next(module for module in model.modules() if isinstance(module, ImageEncoder))
    return encoder.tokens(images[:1]).grid


def attention_weights(module: nn.Module, query: Tensor, memory: Tensor) -> Tensor:
    """Returns the weights (B, heads, Q, L) of a `MultiHeadAttention` or timm's `Attention`, whose query is memory."""
    if isinstance(module, MultiHeadAttention):
        q, k = module.split_heads(module.query(query)), module.split_heads(module.key(memory))
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
    attention: Any = module
    heads = attention.qkv(memory).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(heads[0]), attention.k_norm(heads[1])
    return (q @ k.transpose(-2, -1) * attention.scale).softmax(dim=-1)


def last_attention(model: TwoTowers) -> tuple[nn.Module, int] | None:
    """Returns the attention by which the instruction reads the visual tokens, and how many entries precede them."""
    if isinstance(model, PriorITR):
        return (model.spatial.layers[-1].cross_attention.attention, 0) if model.has_belief else None  # type: ignore[union-attr, return-value]
    visual = getattr(model, "visual", None)
    if isinstance(visual, InstructedBackbone) and len(visual.layers):
        return visual.layers[-1].attention, 1  # type: ignore[union-attr, return-value]
    if isinstance(visual, InstructedViT):
        vit: Any = visual.encoder.model
        attention = vit.blocks[-1].attn
        if visual.belief.compat == "released" and visual.belief.mode == "hard":
            return None  # it drops prefix tokens too, so places of patches are not known
        return (attention, 1 + vit.num_prefix_tokens) if hasattr(attention, "qkv") else None
    return None


@torch.no_grad()
def attention_map(model: TwoTowers, images: Tensor) -> Tensor | None:
    """Returns the instruction's attention in its last layer over the grid, (B, h, w), rows sum to 1.

    Args:
        model: in eval mode
        images: (B, 3, H, W), uint8 or float in [0, 1]
    Returns:
        None if the model has no instruction, or no layer in which it attends
    """
    found = last_attention(model)
    if found is None:
        return None
    attention, before = found
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0], inputs[1] if isinstance(module, MultiHeadAttention) else inputs[0]))

    hook = attention.register_forward_pre_hook(note)
    try:
        model(images)
    finally:
        hook.remove()
    weights = attention_weights(attention, *seen[-1]).mean(1)[:, 0, before:]
    belief = model.belief_map(images)
    places = order_descending(belief.flatten(1))[:, : weights.shape[1]]
    if weights.shape[1] == belief[0].numel():
        places = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    spread = torch.zeros_like(belief.flatten(1)).scatter(1, places, weights)
    return (spread / spread.sum(1, keepdim=True)).view_as(belief)


def gradient_map(model: TwoTowers, images: Tensor, texts: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Returns the size of the gradient of the similarity with respect to the pixels, in each cell, (B, h, w).

    Args:
        model: an `exact_copy`
        images: (B, 3, H, W), uint8 or float in [0, 1]
        texts: the feature that each image is compared with, (B, d)
        grid: cells (h, w); None takes the grid of visual tokens
    """
    pixels = (images.double() / 255 if images.dtype == torch.uint8 else images.double()).requires_grad_()
    with torch.enable_grad():
        features = model(pixels)["image_features"]
        assert features is not None
        (gradient,) = torch.autograd.grad((features * texts.to(features.dtype)).sum(), pixels)
    size = gradient.abs().sum(1)
    height, width = grid or token_grid(model, images)
    rows, columns = overlap(size.shape[1], height).to(size), overlap(size.shape[2], width).to(size)
    return rows @ size @ columns.T
