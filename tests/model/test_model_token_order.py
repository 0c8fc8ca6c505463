"""The image embedding does not depend on the order of the backbone's tokens, if the model has no positions after it.

PriorITR and PriorCLIP on a backbone that is no ViT are such models. A float64 version of PriorITR's image side, in
plain loops, shows what is read in each mode of belief.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny
from torch import Tensor

from priorclip.model.build import build_model
from priorclip.model.config import BeliefConfig, FusionConfig, PAEConfig
from priorclip.model.encoders.vision import ImageEncoder, VisualTokens

BELIEFS = {
    "soft": BeliefConfig(),
    "hard": BeliefConfig(mode="hard", k=3),
    "none": BeliefConfig(mode="none"),
    "hard, released": BeliefConfig(mode="hard", k=3, compat="released"),
    "none, released": BeliefConfig(mode="none", compat="released"),
}
MODELS: dict[str, dict[str, Any]] = {
    "PriorITR on a ViT": {"kind": "prioritr", "vision": "vit"},
    "PriorITR on a ConvNeXt": {"kind": "prioritr", "vision": "convnext"},
    "PriorITR with two layers": {"kind": "prioritr", "vision": "swin", "pae": PAEConfig(2, 1, 2, 0.0)},
    "PriorCLIP without fusion layers": {"vision": "swin", "fusion": FusionConfig(width=24, layers=0, heads=2)},
    "PriorCLIP with two fusion layers": {"vision": "swin", "fusion": FusionConfig(width=24, layers=2, heads=2)},
    "PriorCLIP on a ConvNeXt": {"vision": "convnext", "fusion": FusionConfig(width=24, layers=2, heads=2)},
}


def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@cache
def built(name: str) -> Any:
    torch.manual_seed(0)
    return build_model(tiny(**MODELS[name])).double().eval().requires_grad_(False)


def encoder_of(model: Any) -> ImageEncoder:
    return model.vision if model.config.kind == "prioritr" else model.visual.encoder


@cache
def tokens_of(name: str) -> VisualTokens:
    return encoder_of(built(name)).tokens(images())


def embed(name: str, belief: BeliefConfig, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, d) and belief (B, L) of the images, with the tokens of image b in the order of row b."""
    model, (tokens, pooled, grid) = built(name), tokens_of(name)
    model.config.belief = belief
    if model.config.kind == "priorclip":
        model.visual.belief = belief
    moved = VisualTokens(tokens.gather(1, orders.unsqueeze(-1).expand_as(tokens)), pooled, grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_of(model), "tokens", lambda pixels: moved, raising=True)
        return model.encode_image(images()), model.belief_map(images()).flatten(1)


def orders_of(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """The order of the grid and, for each image, another one: (B, L) both."""
    count, length = tokens_of(name).tokens.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    moved = torch.stack([torch.randperm(length, generator=generator) for _ in range(count)])
    return torch.arange(length).expand(count, -1), moved


@pytest.mark.parametrize("belief", BELIEFS)
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_tokens_changes_nothing(name: str, belief: str, seed: int) -> None:
    """Belief moves with its tokens."""
    stay, moved = orders_of(name, seed)
    (expected, before), (found, after) = (embed(name, BELIEFS[belief], orders) for orders in (stay, moved))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(after, before.gather(1, moved), rtol=0, atol=1e-10)
