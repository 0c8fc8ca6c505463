"""Belief in the fusion layers of a backbone that is no ViT, against a slow float64 version; its effect in a ViT."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_models import tiny
from torch import nn

from priorclip.model.build import build_model
from priorclip.model.config import BeliefConfig, FusionConfig, ModelConfig
from priorclip.model.networks.belief import apply_belief
from priorclip.model.networks.instructed_vision import InstructedBackbone
from priorclip.model.networks.priorclip import PriorCLIP

BELIEFS = {
    "soft": BeliefConfig(),
    "hard": BeliefConfig(mode="hard", k=2),
    "none": BeliefConfig(mode="none"),
    "released": BeliefConfig(compat="released"),
}
Arrays = dict[str, np.ndarray]


def config(vision: str, belief: str) -> ModelConfig:
    return tiny(vision=vision, belief=BELIEFS[belief], fusion=FusionConfig(width=24, layers=2, heads=2))


def one_model(vision: str) -> Callable[[str], PriorCLIP]:
    """The model with each belief and the same weights, float64."""
    torch.manual_seed(0)
    weights = build_model(config(vision, "soft")).state_dict()

    def build(belief: str) -> PriorCLIP:
        model = build_model(config(vision, belief)).eval()
        model.load_state_dict(weights)
        assert isinstance(model, PriorCLIP)
        return model.double()

    return build


def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def layer_norm(x: np.ndarray, weights: Arrays, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: Arrays, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: value * (1 + math.erf(value / math.sqrt(2))) / 2)(x)


def ranked(scores: np.ndarray) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))


def factors(scores: np.ndarray, belief: str) -> np.ndarray:
    """M_l + 1/sqrt(R_l), written with loops."""
    powers = [math.exp(score - max(scores)) for score in scores]
    order = ranked(scores)
    places = order if belief == "released" else [order.index(place) for place in range(len(scores))]
    return np.array(
        [power / sum(powers) + 1 / math.sqrt(place + 1) for power, place in zip(powers, places, strict=True)]
    )


def read(tokens: np.ndarray, f: np.ndarray, weights: Arrays, belief: str, heads: int = 2) -> np.ndarray:
    """Two fusion layers on tokens (L, d) with an instruction (d,), one token at a time."""
    scores = np.array([float(sum(token * f)) for token in tokens])
    if belief == "hard":
        tokens = np.stack([tokens[place] for place in ranked(scores)[:2]])
    x = np.concatenate([f[None], tokens])
    for n in range(2):
        normed = layer_norm(x, weights, f"{n}.norm1")
        memory = normed.copy()
        if belief in ("soft", "released"):
            memory[1:] = [row * factor for row, factor in zip(normed[1:], factors(scores, belief), strict=True)]
        if belief == "released":
            memory[1:] /= np.sqrt((memory[1:] ** 2).sum(0))
        parts = [linear(normed, weights, f"{n}.attention.query"), *(
            linear(memory, weights, f"{n}.attention.{name}") for name in ("key", "value")
        )]  # fmt: skip
        q, k, v = (part.reshape(len(x), heads, -1) for part in parts)
        rows = np.zeros_like(q)
        for i in range(len(x)):
            for h in range(heads):
                logits = np.array([q[i, h] @ k[j, h] for j in range(len(x))]) / math.sqrt(q.shape[-1])
                attention = np.exp(logits - logits.max())
                rows[i, h] = sum(a * v[j, h] for j, a in enumerate(attention / attention.sum()))
        x = x + linear(rows.reshape(len(x), -1), weights, f"{n}.attention.merge")
        hidden = gelu(linear(layer_norm(x, weights, f"{n}.norm2"), weights, f"{n}.mlp.0"))
        x = x + linear(hidden, weights, f"{n}.mlp.2")
    return x[0]


def test_fusion_layers_read_tokens_weighed_by_belief():
    build = one_model("convnext")
    found = {}
    for belief in BELIEFS:
        model = build(belief)
        visual = model.visual
        assert isinstance(visual, InstructedBackbone)
        weights = {name: value.numpy() for name, value in visual.layers.state_dict().items()}
        with torch.no_grad():
            prior = model.prior(images())
            tokens, f = visual.narrow(visual.encoder.tokens(images()).tokens), visual.instruction(prior)
            found[belief] = visual(images(), prior)
            slow = np.stack([
                read(each.numpy(), one.numpy(), weights, belief) for each, one in zip(tokens, f, strict=True)
            ])  # fmt: skip
            wanted = visual.norm(torch.from_numpy(slow) + tokens.mean(1))
        torch.testing.assert_close(found[belief], wanted, rtol=1e-10, atol=1e-10)
    names = list(BELIEFS)
    for place, one in enumerate(names):
        for other in names[:place]:
            assert not torch.allclose(found[one], found[other], atol=1e-3), (one, other)


def test_without_fusion_layers_the_mean_is_taken_under_belief():
    """norm(f + mean), where soft belief weights the mean or hard belief selects its tokens, one token at a time."""
    settings = config("convnext", "soft")
    settings.fusion.layers = 0
    torch.manual_seed(0)
    visual = build_model(settings).double().eval().visual
    assert isinstance(visual, InstructedBackbone)
    assert not any("layers" in name for name in visual.state_dict() if not name.startswith("encoder"))
    with torch.no_grad():
        prior = 3 * torch.randn(3, visual.instruction.in_features).double()
        tokens, f = visual.narrow(visual.encoder.tokens(images()).tokens), visual.instruction(prior)
        for belief in ("soft", "hard", "none"):
            visual.belief = BELIEFS[belief]
            means = []
            for each, one in zip(tokens.numpy(), f.numpy(), strict=True):
                scores = np.array([float(sum(token * one)) for token in each])
                kept = ranked(scores)[: 2 if belief == "hard" else None]
                factor = factors(scores, "soft") if belief == "soft" else np.ones(len(each))
                means.append(sum(factor[n] * each[n] for n in kept) / sum(factor[n] for n in kept))
            wanted = visual.norm(f + torch.from_numpy(np.stack(means)))
            torch.testing.assert_close(visual(images(), prior), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_the_instruction_and_the_tokens_through_the_weights(recompute: bool, monkeypatch):
    """Detached weights change the gradients; recomputing activations changes nothing."""
    model = one_model("convnext")("soft").train()
    model.set_grad_checkpointing(recompute)
    visual = model.visual
    prior = model.prior(images())
    inputs = [visual.instruction.weight, visual.narrow.weight]

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(visual(images(), prior).square().sum(), inputs))

    whole = gradients()
    from priorclip.model.networks import instructed_vision as instructed

    weight_tokens = instructed.weight_tokens
    monkeypatch.setattr(
        instructed,
        "weight_tokens",
        lambda tokens, weights, compat: weight_tokens(tokens, weights.detach(), compat),
    )
    for found, cut in zip(whole, gradients(), strict=True):
        assert float((found - cut).norm() / found.norm()) > 1e-4
    monkeypatch.undo()
    model.set_grad_checkpointing(False)
    for found, plain in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(found, plain)


def test_a_vit_keeps_soft_belief_in_its_residual_stream_only():
    """The first LayerNorm removes the factors (docs/model.md), but not the channel scaling of released belief."""
    build = one_model("vit")
    model = build("soft")
    vit = model.visual.encoder.model
    norm = vit.blocks[0].norm1
    torch.manual_seed(1)
    tokens, f = torch.randn(2, 9, norm.weight.numel()).double(), torch.randn(2, norm.weight.numel()).double()
    assert isinstance(norm, nn.LayerNorm)
    kinds = {belief: apply_belief(tokens, f, BELIEFS[belief]) for belief in ("soft", "released")}
    torch.testing.assert_close(norm(kinds["soft"]), norm(tokens), atol=1e-3, rtol=0)
    assert not torch.allclose(norm(kinds["released"]), norm(tokens), atol=0.1)
    seen = [build(belief).encode_image(images()) for belief in ("soft", "none")]
    assert not torch.allclose(*seen, atol=1e-3)
