"""The image embedding does not depend on the order of the backbone's tokens, if the model has no positions after it.

PriorITR and PriorCLIP on a backbone that is no ViT are such models. A slow float64 version of PriorITR's image side
shows what is read in each mode of belief. It sorts the tokens by belief, as the paper's figure does.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_fusion import Arrays, factors, gelu, layer_norm, linear, ranked
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
# The weight of a token is a function of its place in the grid, so the order matters.
SOFT_RELEASED = BeliefConfig(compat="released")
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


@pytest.mark.parametrize("name", MODELS)
def test_only_soft_belief_of_the_released_code_depends_on_the_order(name: str) -> None:
    stay, moved = orders_of(name, 0)
    expected, found = (embed(name, SOFT_RELEASED, orders)[0] for orders in (stay, moved))
    assert (found - expected).abs().max() > 1e-4


def attend(queries: np.ndarray, memory: np.ndarray, weights: Arrays, name: str, heads: int) -> np.ndarray:
    """Multi-head attention, one query and one head at a time."""
    q, k, v = (
        linear(x, weights, f"{name}.{part}").reshape(len(x), heads, -1)
        for x, part in ((queries, "query"), (memory, "key"), (memory, "value"))
    )
    rows = np.zeros_like(q)
    for i in range(len(q)):
        for h in range(heads):
            powers = [math.exp(q[i, h] @ k[j, h] / math.sqrt(q.shape[-1])) for j in range(len(k))]
            rows[i, h] = sum(power / sum(powers) * v[j, h] for j, power in enumerate(powers))
    return linear(rows.reshape(len(q), -1), weights, f"{name}.merge")


def block(queries: np.ndarray, y: np.ndarray, weights: Arrays, name: str, heads: int) -> np.ndarray:
    y = layer_norm(y + attend(queries, y, weights, f"{name}.attention", heads), weights, f"{name}.norm1")
    hidden = gelu(layer_norm(linear(y, weights, f"{name}.ffn.0"), weights, f"{name}.ffn.1"))
    return layer_norm(y + linear(hidden, weights, f"{name}.ffn.3"), weights, f"{name}.norm2")


def read_by_belief(tokens: np.ndarray, f: np.ndarray, belief: BeliefConfig) -> np.ndarray:
    """The tokens (L, d) that enter the Spatial-PAE: sorted by belief, unless there is none."""
    scores = np.array([float(sum(token * f)) for token in tokens])
    if belief.mode == "none":
        return tokens
    if belief.mode == "hard":
        return np.stack([tokens[place] for place in ranked(scores)[: belief.k]])
    factor = factors(scores, belief.compat)
    weighted = np.stack([factor[place] * tokens[place] for place in range(len(tokens))])
    if belief.compat == "released":
        weighted = weighted / np.sqrt(sum(token**2 for token in weighted))
    return weighted[ranked(scores)]


def slow_embedding(grid: np.ndarray, pooled: np.ndarray, prior: np.ndarray, weights: Arrays, config: Any) -> np.ndarray:
    """PriorITR's embedding (d,) of one image from its backbone's tokens (L, C) and global (C,), its prior's (P,)."""
    tokens, overall = (linear(x, weights, "vision_projection") for x in (grid, pooled))
    f = linear(prior, weights, "prior_projection")
    if config.belief.compat == "released":
        tokens = np.concatenate([overall[None], tokens])
    y = read_by_belief(tokens, f, config.belief)
    for n in range(config.pae.spatial_layers):
        name = f"spatial.layers.{n}"
        signals = np.stack([linear(f, weights, f"{name}.signal")] * len(y))
        y = block(y, y, weights, f"{name}.self_attention", config.pae.heads)
        y = block(signals, y, weights, f"{name}.cross_attention", config.pae.heads)
    read = sum(y) / len(y) if config.belief.mode == "none" else y[0]
    embedding = overall + linear(read, weights, "image_head")
    return embedding / math.sqrt(sum(embedding**2))


@pytest.mark.parametrize("belief", [*BELIEFS, "soft, released"])
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].get("kind") == "prioritr"])
def test_prioritr_reads_the_token_of_highest_belief_or_the_mean(name: str, belief: str) -> None:
    model, (tokens, pooled, _) = built(name), tokens_of(name)
    found, _ = embed(name, {**BELIEFS, "soft, released": SOFT_RELEASED}[belief], orders_of(name, 0)[0])
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    rows = (x.numpy() for x in (tokens, pooled, model.prior(images())))
    expected = np.stack([slow_embedding(*row, weights, model.config) for row in zip(*rows, strict=True)])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)
