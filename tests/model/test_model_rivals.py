"""The rivals of soft belief against slow float64 versions in plain loops, alone and in both models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_belief import reference_rank, reference_softmax
from tiny_models import tiny
from torch import Tensor

from priorclip.model.belief_config import PAPER_MODES, RIVAL_MODES, BeliefConfig
from priorclip.model.build import build_model
from priorclip.model.config import FusionConfig, PAEConfig
from priorclip.model.networks.belief import apply_belief, soft_weights
from priorclip.model.networks.rivals import DropoutBelief, build_rival

WIDTH = 5
BY_CONTENT = [mode for mode in RIVAL_MODES if mode != "random"]


def rival(mode: str, width: int = WIDTH) -> Any:
    torch.manual_seed(1)
    return build_rival(BeliefConfig(mode=mode), width).double().eval()  # type: ignore[arg-type,union-attr]


def draw(batch: int = 3, length: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)
    return tokens, torch.randn(batch, WIDTH, dtype=torch.float64, generator=generator)


def dot(one: np.ndarray, other: np.ndarray) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(one, other, strict=True))


def soft(scores: list[float]) -> list[float]:
    ranks, beliefs = reference_rank(scores), reference_softmax(scores)
    return [belief + 1 / math.sqrt(rank) for belief, rank in zip(beliefs, ranks, strict=True)]


def attention(tokens: np.ndarray, f: np.ndarray, layer: Any) -> list[float]:
    query = layer.query.detach().numpy()
    return [len(tokens) * share for share in reference_softmax([dot(t, query) / math.sqrt(len(f)) for t in tokens])]


def gate(tokens: np.ndarray, f: np.ndarray, layer: Any) -> list[float]:
    w, v = layer.token.weight.detach().numpy(), layer.instruction.weight.detach().numpy()
    inner = [dot([dot(row, t) for row in w], [dot(row, f) for row in v]) / math.sqrt(len(f)) for t in tokens]  # type: ignore[arg-type]
    return [1 / (1 + math.exp(-x - layer.bias.item())) for x in inner]


def entropy(tokens: np.ndarray, f: np.ndarray, layer: Any) -> list[float]:
    scores = [dot(t, f) for t in tokens]
    sure = 1 + sum(m * math.log(m) for m in reference_softmax(scores)) / math.log(len(scores))
    factors = soft(scores)
    return [sure * factor + (1 - sure) * sum(factors) / len(factors) for factor in factors]


def dropout(tokens: np.ndarray, f: np.ndarray, layer: Any) -> list[float]:
    draws = [[dot(t, f * kept / (1 - layer.dropout)) for t in tokens] for kept in layer.kept.squeeze(1).numpy()]
    beliefs = np.array([reference_softmax(scores) for scores in draws])
    ratios = []
    for column in beliefs.T:
        mean = sum(column) / len(column)
        variance = sum((x - mean) ** 2 for x in column) / (len(column) - 1)
        ratios.append(mean / math.sqrt(variance + (0.01 / len(tokens)) ** 2))
    return [len(tokens) * ratio / sum(ratios) for ratio in ratios]


def evidential(tokens: np.ndarray, f: np.ndarray, layer: Any) -> list[float]:
    evidence = [math.log1p(math.exp(dot(t, f))) for t in tokens]
    strength = sum(e + 1 for e in evidence)
    uncertainty = len(tokens) / strength
    return [len(tokens) * e / strength + uncertainty for e in evidence]


def uniform(tokens: np.ndarray, f: np.ndarray, layer: Any) -> list[float]:
    factors = soft([dot(t, f) for t in tokens])
    return [sum(factors) / len(factors)] * len(factors)


SLOW = {f.__name__: f for f in (attention, gate, entropy, dropout, evidential, uniform)}


def test_there_is_a_slow_version_of_each_rival():
    assert {*SLOW, "random"} == set(RIVAL_MODES)


@pytest.mark.parametrize("mode", SLOW)
def test_factors_equal_the_slow_version(mode: str):
    tokens, instruction = draw()
    layer = rival(mode)
    expected = [SLOW[mode](*pair, layer) for pair in zip(tokens.numpy(), instruction.numpy(), strict=True)]
    np.testing.assert_allclose(layer(tokens, instruction).detach().numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("mode", BY_CONTENT)
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_factors_move_with_their_tokens(mode: str, length: int, seed: int):
    tokens, instruction = draw(2, length, seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    factors = rival(mode)(tokens, instruction)
    torch.testing.assert_close(rival(mode)(tokens[:, order], instruction), factors[:, order])
    assert factors.isfinite().all()
    assert (factors > 0).all()


@pytest.mark.parametrize("mode", ["attention", "dropout", "evidential"])
def test_the_factors_have_mean_one(mode: str):
    torch.testing.assert_close(rival(mode)(*draw()).mean(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("mode", RIVAL_MODES)
def test_gradients_are_exact(mode: str):
    tokens, instruction = (x.requires_grad_() for x in draw(2, 4))
    layer = rival(mode)
    inputs = (tokens, instruction, *layer.parameters())
    assert torch.autograd.gradcheck(lambda *rest: layer(tokens, instruction), inputs, check_undefined_grad=False)


@pytest.mark.parametrize("size", [0.0, 1e3])
@pytest.mark.parametrize("mode", RIVAL_MODES)
def test_extreme_instructions_give_finite_factors_and_gradients(mode: str, size: float):
    tokens, instruction = draw()
    instruction = (instruction * size).float().requires_grad_()
    layer = rival(mode).float().train()
    factors = layer(tokens.float(), instruction)
    assert factors.isfinite().all()
    assert (factors >= 0).all()
    if factors.requires_grad:
        found = torch.autograd.grad(factors.square().sum(), instruction, allow_unused=True)[0]
        assert found is None or found.isfinite().all()


def test_entropy_weighs_nothing_if_the_instruction_is_unsure_and_is_soft_belief_if_it_is_sure():
    tokens, instruction = draw()
    layer = rival("entropy")
    equal = layer(tokens, torch.zeros_like(instruction))
    torch.testing.assert_close(equal, equal[:, :1].expand_as(equal))
    torch.testing.assert_close(
        layer(tokens, 1e3 * instruction), soft_weights(tokens, 1e3 * instruction), rtol=1e-6, atol=0
    )


def test_example_of_the_module():
    tokens, instruction = torch.tensor([[[0.0], [2.0], [1.0]]], dtype=torch.float64), torch.ones(1, 1).double()
    for mode, factors in (
        ("entropy", [0.99, 1.23, 1.06]),
        ("evidential", [0.71, 1.31, 0.97]),
        ("uniform", [1.09, 1.09, 1.09]),
    ):
        np.testing.assert_allclose(rival(mode, 1)(tokens, instruction)[0], factors, atol=6e-3)


def test_random_belief_has_softs_factors_of_other_tokens():
    tokens, instruction = draw(length=25)
    layer, straight = rival("random"), soft_weights(*draw(length=25))
    seen = layer(tokens, instruction)
    torch.testing.assert_close(seen.sort(dim=1).values, straight.sort(dim=1).values)
    assert float((seen != straight).double().mean()) > 0.8
    assert torch.equal(layer(tokens, instruction), seen)
    layer.train()
    assert not torch.equal(layer(tokens, instruction), layer(tokens, instruction))
    torch.testing.assert_close(layer(tokens, instruction).sort(dim=1).values, straight.sort(dim=1).values)


def test_dropped_channels_are_drawn_anew_in_training_and_stay_in_evaluation():
    tokens, instruction = draw()
    layer = DropoutBelief(WIDTH, 1000, 0.3).double()
    assert not torch.equal(layer(tokens, instruction), layer(tokens, instruction))
    trained = layer(tokens, instruction)
    layer.eval()
    assert torch.equal(layer(tokens, instruction), layer(tokens, instruction))
    # So many draws of either kind agree: the share of dropped channels and their scale are the same.
    torch.testing.assert_close(layer(tokens, instruction), trained, rtol=0.3, atol=0.03)


def built(kind: str, mode: str) -> Any:
    torch.manual_seed(0)
    parts = {"fusion": FusionConfig(width=24, layers=1, heads=2), "pae": PAEConfig(1, 1, 2, 0.0)}
    belief = BeliefConfig(mode=mode, k=2)  # type: ignore[arg-type]
    vision = "vit" if kind == "vit" else "swin"
    return build_model(tiny("prioritr" if kind == "prioritr" else "priorclip", vision, belief=belief, **parts)).eval()


def images(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


KINDS = ("priorclip", "vit", "prioritr")


@pytest.mark.parametrize("kind", KINDS)
def test_only_learned_rivals_add_weights_and_each_mode_gives_another_embedding(kind: str):
    models = {mode: built(kind, mode) for mode in (*PAPER_MODES, *RIVAL_MODES)}
    weights, seen = models["gate"].state_dict(), []
    for mode, model in models.items():
        added = set(model.state_dict()) - set(models["none"].state_dict())
        assert bool(added) == (mode in ("attention", "gate")), (mode, added)
        assert all(".rival." in f".{name}" for name in added)
        model.load_state_dict(weights, strict=False)
        seen.append(model.encode_image(images()).detach())
    for n, one in enumerate(seen):
        for other in seen[:n]:
            assert float((one - other).norm()) > 1e-5


@pytest.mark.parametrize("mode", RIVAL_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_rival_learns_and_the_map_is_its_factors(kind: str, mode: str):
    model = built(kind, mode)
    belief = model.belief_map(images()).flatten(1)
    torch.testing.assert_close(belief.sum(1), torch.ones(3))
    loss = (model.encode_image(images()) * torch.linspace(-1, 1, model.config.embed_dim)).sum()
    rivals = {name: value for name, value in model.named_parameters() if ".rival." in f".{name}"}
    for found in torch.autograd.grad(loss, list(rivals.values())) if rivals else ():
        assert found.abs().max() > 0


@pytest.mark.parametrize("mode", RIVAL_MODES)
def test_prioritr_reads_the_token_of_the_highest_factor_or_the_mean(mode: str, monkeypatch):
    model = built("prioritr", mode).double()
    visual, instruction = model.project(images())
    weights = model.rival(visual.tokens, instruction)
    local = model.spatial(visual.tokens * weights.unsqueeze(-1), instruction)
    rows = [
        tokens.mean(0) if mode == "uniform" else tokens[w.argmax()] for tokens, w in zip(local, weights, strict=True)
    ]
    torch.testing.assert_close(model.read_spatial(visual.tokens, instruction), torch.stack(rows))


@pytest.mark.parametrize("mode", RIVAL_MODES)
def test_an_image_has_one_embedding_whatever_its_batch(mode: str):
    model = built("prioritr", mode)
    whole = model.encode_image(images())
    torch.testing.assert_close(model.encode_image(images()[1:2]), whole[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", RIVAL_MODES)
def test_half_precision_tokens_get_float32_factors(mode: str):
    tokens, instruction = (x.bfloat16() for x in draw())
    layer = rival(mode).bfloat16()
    assert layer(tokens, instruction).dtype == torch.float32
    assert apply_belief(tokens, instruction, BeliefConfig(mode=mode), layer).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_options_that_make_no_sense_are_named():
    for words, message in (
        ({"mode": "firm"}, r"belief\.mode must be soft, hard or none, or one of attention, gate"),
        ({"mode": "gate", "compat": "released"}, r"belief\.compat 'released' has no mode 'gate'"),
        ({"draws": 1}, r"belief\.draws must be at least 2"),
        ({"dropout": 1.0}, r"belief\.dropout must lie in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            BeliefConfig(**words)  # type: ignore[arg-type]
