"""Compares belief with a slow float64 version of the paper's formula in plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from priorclip.model.config import BeliefConfig
from priorclip.model.networks.belief import apply_belief, belief_map, belief_rank, soft_weights


def reference_rank(scores: list[float]) -> list[int]:
    """Rank: 1 + number of higher entries + number of equal entries before it."""
    return [
        1 + sum(1 for other in scores if other > mine) + sum(1 for other in scores[:place] if other == mine)
        for place, mine in enumerate(scores)
    ]


def reference_softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def reference_soft(tokens: np.ndarray, instruction: np.ndarray) -> np.ndarray:
    out = np.empty_like(tokens)
    for b in range(len(tokens)):
        scores = [float(sum(token * instruction[b])) for token in tokens[b]]
        beliefs, ranks = reference_softmax(scores), reference_rank(scores)
        for place in range(len(scores)):
            out[b, place] = tokens[b, place] * (beliefs[place] + 1 / math.sqrt(ranks[place]))
    return out


def reference_released(tokens: np.ndarray, instruction: np.ndarray) -> np.ndarray:
    """As in the authors' code: argsort index instead of the rank, then L2 over the token axis."""
    out = np.empty_like(tokens)
    for b in range(len(tokens)):
        scores = [float(sum(token * instruction[b])) for token in tokens[b]]
        beliefs = reference_softmax(scores)
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        for place in range(len(scores)):
            out[b, place] = tokens[b, place] * (beliefs[place] + 1 / math.sqrt(order[place] + 1))
        out[b] /= np.maximum(np.sqrt((out[b] ** 2).sum(0, keepdims=True)), 1e-12)
    return out


def draw(batch: int = 3, length: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, length, width, dtype=torch.float64), torch.randn(batch, width, dtype=torch.float64)


def test_soft_belief_is_the_papers_formula():
    tokens, instruction = draw()
    found = apply_belief(tokens, instruction, BeliefConfig(mode="soft"))
    np.testing.assert_allclose(found.numpy(), reference_soft(tokens.numpy(), instruction.numpy()), rtol=1e-12)


def test_released_belief_is_the_authors_code_and_is_not_the_papers():
    tokens, instruction = draw()
    found = apply_belief(tokens, instruction, BeliefConfig(mode="soft", compat="released"))
    np.testing.assert_allclose(found.numpy(), reference_released(tokens.numpy(), instruction.numpy()), rtol=1e-12)
    assert not torch.allclose(soft_weights(tokens, instruction, "released"), soft_weights(tokens, instruction, "paper"))


def test_example_of_the_module():
    tokens, instruction = torch.tensor([[[0.0], [2.0], [1.0]]]), torch.ones(1, 1)
    assert belief_rank(tokens[..., 0]).tolist() == [[3, 1, 2]]
    torch.testing.assert_close(
        belief_map(tokens, instruction), torch.tensor([[0.0900, 0.6652, 0.2447]]), atol=1e-4, rtol=0
    )
    expected = torch.tensor([[0.0900 + 3**-0.5, 1.6652, 0.2447 + 2**-0.5]])
    torch.testing.assert_close(soft_weights(tokens, instruction), expected, atol=1e-4, rtol=0)


def test_hard_belief_keeps_the_most_believed_in_order():
    tokens, instruction = draw()
    kept = apply_belief(tokens, instruction, BeliefConfig(mode="hard", k=4))
    for b in range(len(tokens)):
        scores = (tokens[b] @ instruction[b]).tolist()
        best = sorted(range(len(scores)), key=lambda place: -scores[place])[:4]
        assert torch.equal(kept[b], tokens[b, best])


def test_hard_belief_refuses_more_tokens_than_there_are():
    tokens, instruction = draw(length=7)
    with pytest.raises(ValueError, match=r"belief\.k is 8, but the visual encoder gives 7 tokens"):
        apply_belief(tokens, instruction, BeliefConfig(mode="hard", k=8))
    with pytest.raises(ValueError, match=r"needs belief\.k"):
        BeliefConfig(mode="hard")


def test_no_belief_leaves_tokens_alone():
    tokens, instruction = draw()
    assert apply_belief(tokens, instruction, BeliefConfig(mode="none")) is tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_ranks_are_a_permutation_and_ties_go_by_position(values: list[int]):
    ranks = belief_rank(torch.tensor([values], dtype=torch.float64))[0].tolist()
    assert sorted(ranks) == list(range(1, len(values) + 1))
    assert ranks == reference_rank([float(value) for value in values])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_soft_belief_follows_a_permutation_of_the_tokens(length: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, length, width, dtype=torch.float64, generator=generator)
    instruction = torch.randn(2, width, dtype=torch.float64, generator=generator)
    order = torch.randperm(length, generator=generator)
    weights = soft_weights(tokens, instruction)
    torch.testing.assert_close(soft_weights(tokens[:, order], instruction), weights[:, order])
    torch.testing.assert_close(belief_map(tokens, instruction).sum(1), torch.ones(2, dtype=torch.float64))


def test_one_token_is_believed_in_fully():
    tokens = torch.randn(2, 1, 3)
    torch.testing.assert_close(apply_belief(tokens, torch.randn(2, 3), BeliefConfig()), 2 * tokens)


def test_rank_survives_the_underflow_of_belief():
    tokens = torch.tensor([[[0.0], [-500.0], [-400.0]]])  # exp(-400) and exp(-500) are both 0 in float32
    weights = soft_weights(tokens, torch.ones(1, 1))
    torch.testing.assert_close(weights, torch.tensor([[2.0, 3**-0.5, 2**-0.5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_get_float32_belief(dtype: torch.dtype):
    tokens, instruction = (x.to(dtype) for x in draw(width=64))
    assert belief_map(tokens, instruction).dtype == torch.float32
    exact = F.softmax(torch.einsum("bld,bd->bl", tokens.double(), instruction.double()), -1)
    torch.testing.assert_close(belief_map(tokens, instruction).double(), exact, atol=1e-5, rtol=1e-4)
    assert apply_belief(tokens, instruction, BeliefConfig()).dtype == dtype
