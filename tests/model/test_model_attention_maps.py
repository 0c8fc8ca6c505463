"""Attention and gradient maps against the layers' own outputs and finite differences; belief that is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny

from priorclip.model import build_model
from priorclip.model.attention_maps import (
    attention_map,
    attention_weights,
    exact_copy,
    gradient_map,
    last_attention,
    token_grid,
)
from priorclip.model.config import BeliefConfig, FusionConfig
from priorclip.model.networks.belief import keep_top
from priorclip.model.networks.pae import MultiHeadAttention
from priorclip.model.networks.rivals import GivenBelief, UniformBelief, scattered
from priorclip.model.networks.two_towers import TwoTowers

KINDS = {
    "vit": {"vision": "vit"},
    "registers": {"vision": "registers"},
    "convnext": {"vision": "convnext"},
    "itr": {"kind": "prioritr", "vision": "swin"},
}


def model_of(name: str, **changes: Any) -> TwoTowers:
    torch.manual_seed(3)
    return build_model(tiny(**{**KINDS[name], **changes}), vocab_size=64).eval()


def images(count: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_weights_are_those_by_which_the_layer_reads(name: str) -> None:
    """The reference is the layer's own output: its values, weighed and merged, must give it."""
    model = model_of(name).double()
    found = last_attention(model)
    assert found is not None
    layer: Any = found[0]
    width = model.visual.width  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(2, 7, width, dtype=torch.float64, generator=generator)
    if isinstance(layer, MultiHeadAttention):
        query = memory[:, :1]
        wanted, values = layer(query, memory), layer.split_heads(layer.value(memory))
        merge = layer.merge
    else:
        query = memory
        wanted = layer(memory)
        values = layer.qkv(memory).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)[2]
        merge = layer.proj
    read = attention_weights(layer, query, memory) @ values
    torch.testing.assert_close(merge(read.transpose(1, 2).flatten(2)), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_attention_lies_on_the_grid_and_sums_to_one(name: str) -> None:
    model = exact_copy(model_of(name))
    found = attention_map(model, images())
    assert found is not None
    assert found.shape == (3, *token_grid(model, images()))
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    assert not torch.allclose(found[0], found[1], atol=1e-6)


def test_the_attention_of_a_vit_is_that_of_its_first_token() -> None:
    """One product of the first token's query and a patch's key at a time, before their softmax."""
    model = exact_copy(model_of("vit"))
    block: Any = model.visual.encoder.model.blocks[-1]  # type: ignore[union-attr]
    seen: list[torch.Tensor] = []
    hook = block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images(1))
        hook.remove()
        qkv = block.attn.qkv(seen[0][0]).unflatten(-1, (3, block.attn.num_heads, -1))
        found = attention_map(model, images(1))
    assert found is not None
    rows = []
    for head in range(block.attn.num_heads):
        query = block.attn.q_norm(qkv[0, 0, head])
        scores = torch.stack([query @ block.attn.k_norm(each) * block.attn.scale for each in qkv[:, 1, head]])
        rows.append(scores.softmax(0)[-found.numel() :])
    mean = torch.stack(rows).mean(0)
    torch.testing.assert_close(found.flatten(), mean / mean.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_dropped_tokens_have_no_attention(name: str) -> None:
    model = exact_copy(model_of(name, belief=BeliefConfig(mode="hard", k=3)))
    found, belief = attention_map(model, images()), model.belief_map(images())
    assert found is not None
    kept = belief.flatten(1).topk(3).indices.sort().values
    assert [row.nonzero().flatten().tolist() for row in found.flatten(1)] == kept.tolist()


def test_a_model_without_such_a_layer_has_no_map() -> None:
    assert attention_map(model_of("convnext", fusion=FusionConfig(width=24, layers=0, heads=2)), images()) is None
    assert attention_map(model_of("convnext", kind="clip"), images()) is None


@pytest.mark.parametrize("name", ["vit", "itr"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    model = exact_copy(model_of(name))
    pixels = images(2).double() / 255
    texts = torch.nn.functional.normalize(torch.randn(2, 16, dtype=torch.float64), dim=-1)
    found = gradient_map(model, pixels, texts, (64, 64))  # each pixel a cell
    for image, row, column in ((0, 5, 7), (1, 40, 33)):
        size = 0.0
        for channel in range(3):
            step = torch.zeros_like(pixels)
            step[image, channel, row, column] = 1e-5
            with torch.no_grad():
                above, below = ((model(pixels + sign * step)["image_features"] * texts).sum() for sign in (1, -1))
            size += abs(float(above - below)) / 2e-5
        assert float(found[image, row, column]) == pytest.approx(size, rel=1e-4)
    coarse = gradient_map(model, pixels, texts, (4, 4))
    torch.testing.assert_close(coarse, found.unflatten(2, (4, 16)).unflatten(1, (4, 16)).mean((2, 4)))


def test_gradients_pass_frozen_encoders_of_the_copy_only() -> None:
    model = model_of("convnext")
    model.visual.encoder.config.trainable = False  # type: ignore[union-attr]
    copied = exact_copy(model)
    assert gradient_map(copied, images(), torch.ones(3, 16) / 4).min() > 0
    assert not model.visual.encoder.config.trainable  # type: ignore[union-attr]
    assert next(model.parameters()).dtype == torch.float32


def factors(shares: list[float]) -> list[float]:
    """The factors of a given belief by loops: M + the mean of 1/sqrt(R) over the ranks of equal shares."""
    total, length = sum(shares), len(shares)
    ordered = sorted(shares, reverse=True)
    found = []
    for place, share in enumerate(shares):
        ranks = [rank + 1 for rank, other in enumerate(ordered) if other == share]
        rank_term = sum(rank**-0.5 for rank in ranks) / len(ranks)
        nudge = 1e-6 * scattered(length).index(place) / length
        found.append((share / total if total else 1 / length) + rank_term + nudge)
    return found


def test_given_belief_is_soft_belief_of_the_map() -> None:
    given = GivenBelief()
    rows = [[0.0, 0.5, 0.25, 0.25, 0.0, 1.0], [0.0] * 6, [1.0] * 6, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    given.shares = torch.tensor(rows, dtype=torch.float64)
    tokens = torch.randn(4, 6, 8, dtype=torch.float64)
    found = given(tokens, tokens[:, 0])
    torch.testing.assert_close(found, torch.tensor([factors(row) for row in rows], dtype=torch.float64))
    even = UniformBelief()(tokens, tokens[:, 0])
    torch.testing.assert_close(found[1:3], even[1:3], atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match=r"shape \(4, 6\) is given to tokens \(4, 5\)"):
        given(tokens[:, 1:], tokens[:, 0])


def test_hard_belief_keeps_the_highest_of_a_given_map() -> None:
    given = GivenBelief()
    given.shares = torch.tensor([[0.0, 0.2, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    tokens = torch.arange(10.0)[None, :, None].expand(-1, -1, 4)
    kept = keep_top(tokens, tokens[:, 0], 5, given)[0, :, 0].int().tolist()
    assert kept[:2] == [2, 1]
    assert sorted(kept[2:]) != [0, 3, 4]  # equal ones are taken from all over the image
