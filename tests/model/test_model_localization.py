"""Measures of a map against a mask, compared with slow versions over pixels and with scikit-learn on pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from priorclip.model.localization import cell_shares, centre_map, measure_map

SEEDS = st.integers(0, 10_000)


def case(seed: int, values: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A map (h, w) with ties, and a mask of pixels (5 h, 4 w) of zeros and ones with at least one of each."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 5, 2)
    mask = rng.random((5 * height, 4 * width)) < rng.random()
    mask[0, 0], mask[-1, -1] = True, False
    return rng.integers(0, values, (height, width)).astype(float) + (rng.random() < 0.5), mask.astype(float)


def measures_of_pixels(scores: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The measures as a loop over pixels, each with the value of its cell."""
    wide = np.kron(scores, np.ones((mask.shape[0] // scores.shape[0], mask.shape[1] // scores.shape[1])))
    pixels = list(zip(wide.ravel().tolist(), mask.ravel().tolist(), strict=True))
    best = max(value for value, _ in pixels)
    hits = [thing for value, thing in pixels if value == best]
    total = sum(value for value, _ in pixels)
    things = sum(thing for _, thing in pixels)
    precision = before = 0.0
    for bar in sorted({value for value, _ in pixels}, reverse=True):
        found = [thing for value, thing in pixels if value >= bar]
        recall = sum(found) / things
        precision += (recall - before) * sum(found) / len(found)
        before = recall
    return {
        "pointing": sum(hits) / len(hits),
        "average_precision": precision,
        "energy": sum(value * thing for value, thing in pixels) / total if total else things / len(pixels),
    }


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_measures_are_those_of_all_pixels(seed: int) -> None:
    scores, mask = case(seed)
    found = measure_map(torch.tensor(scores), cell_shares(torch.tensor(mask), scores.shape))
    assert found == pytest.approx(measures_of_pixels(scores, mask), abs=1e-12)
    wide = np.kron(scores, np.ones((5, 4)))
    assert found["average_precision"] == pytest.approx(average_precision_score(mask.ravel(), wide.ravel()), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_properties_of_the_measures(seed: int) -> None:
    scores, mask = case(seed)
    shares = cell_shares(torch.tensor(mask), scores.shape)
    found = measure_map(torch.tensor(scores), shares)
    assert all(0 <= value <= 1 for value in found.values())
    even = measure_map(torch.full(scores.shape, 3.0), shares)
    assert even == pytest.approx(dict.fromkeys(even, float(mask.mean())), abs=1e-12)
    other = measure_map(torch.tensor(scores).exp() - 0.5, shares)  # a map that rises with the first
    assert (other["pointing"], other["average_precision"]) == (found["pointing"], found["average_precision"])
    scaled = measure_map(7 * torch.tensor(scores), shares)
    assert scaled == pytest.approx(found, abs=1e-12)
    best = measure_map(shares, shares)
    assert best["pointing"] == pytest.approx(float(shares.max()), abs=1e-12)
    assert best["energy"] >= float(mask.mean()) - 1e-12


def test_whole_cells_can_be_found_perfectly() -> None:
    shares = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert measure_map(shares, shares) == {"pointing": 1.0, "average_precision": 1.0, "energy": 1.0}
    assert measure_map(1 - shares, shares) == {
        "pointing": 0.0,
        "average_precision": pytest.approx(1 / 3),
        "energy": 0.0,
    }


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 7), st.integers(1, 7))
def test_cells_that_cut_pixels_take_them_in_part(seed: int, height: int, width: int) -> None:
    """The reference repeats each pixel so often that no cell cuts one."""
    mask = np.random.default_rng(seed).random((5, 6))
    fine = np.kron(mask, np.ones((height, width)))
    blocks = fine.reshape(height, 5, width, 6).mean(axis=(1, 3))
    np.testing.assert_allclose(cell_shares(torch.tensor(mask), (height, width)), blocks, atol=1e-12)


def test_the_centre_is_highest_in_the_middle_and_the_same_on_all_sides() -> None:
    bell = centre_map((5, 5))
    assert bell.argmax() == 12
    assert torch.equal(bell, bell.T)
    assert torch.equal(bell, bell.flip(0))
    assert bell[2, 3] / bell[2, 2] == pytest.approx(np.exp(-(0.2**2) / (2 * 0.25**2)))


@pytest.mark.parametrize(
    ("scores", "shares"),
    [
        (torch.tensor([[1.0, -0.1]]), torch.tensor([[1.0, 0.0]])),
        (torch.tensor([[1.0, torch.nan]]), torch.tensor([[1.0, 0.0]])),
        (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)),
        (torch.tensor([[1.0, 2.0]]), torch.ones(2, 1)),
    ],
)
def test_what_cannot_be_measured_is_refused(scores: torch.Tensor, shares: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="is measured against shares"):
        measure_map(scores, shares)
