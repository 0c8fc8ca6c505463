"""Belief that is given with the images, before training: its factors, its way into each kind of model, its refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny
from torch import Tensor

from priorclip.model.belief_config import BeliefConfig
from priorclip.model.build import build_model
from priorclip.model.config import FusionConfig, ModelConfig
from priorclip.model.cost.summary import pair_flops
from priorclip.model.networks.rivals import GivenBelief, build_rival
from priorclip.retrieval.localization.interventions import believing

KINDS = {
    "vit": {},
    "fusion": {"vision": "convnext"},
    "no fusion": {"vision": "resnet", "fusion": FusionConfig(layers=0)},
    "prioritr": {"kind": "prioritr", "vision": "swin"},
}


def config(kind: str, given: str = "mask") -> ModelConfig:
    return tiny(**KINDS[kind], belief=BeliefConfig(mode="given", given=given))  # type: ignore[arg-type]


def slow_factors(shares: list[float]) -> list[float]:
    """M + the mean of 1/sqrt(rank) over the ranks that a token can have, in plain loops."""
    total = sum(shares)
    found = []
    for share in shares:
        better, equal = sum(each > share for each in shares), sum(each == share for each in shares)
        ranks = range(better + 1, better + equal + 1)
        found.append((share / total if total else 1 / len(shares)) + sum(1 / math.sqrt(r) for r in ranks) / equal)
    return found


def draw_masks(side: int, count: int = 3) -> Tensor:
    """Masks with full, empty and half covered places; the last one is empty."""
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for number in range(count - 1):
        masks[number, side // 4 : side // 4 + side // 2, : side // (2 + number)] = 255
    return masks


@pytest.mark.parametrize("given", ["mask", "complement"])
def test_factors_equal_the_slow_version(given: str) -> None:
    layer, masks = build_rival(BeliefConfig(mode="given", given=given), 5), draw_masks(64)  # type: ignore[arg-type]
    layer.masks = masks  # type: ignore[union-attr]
    found = layer(torch.randn(3, 16, 5, dtype=torch.float64), torch.randn(3, 5))  # type: ignore[misc]
    cells = masks.numpy().reshape(3, 4, 16, 4, 16).mean((2, 4)).reshape(3, 16) / 255
    wanted = [slow_factors((row if given == "mask" else 1 - row).tolist()) for row in cells]
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-6)


def test_noise_is_new_in_each_step_and_the_same_for_all_images_of_an_evaluation() -> None:
    layer = build_rival(BeliefConfig(mode="given", given="noise"), 5)
    assert layer is not None
    tokens, f = torch.randn(4, 9, 5), torch.randn(4, 5)
    one, other = layer.train()(tokens, f), layer(tokens, f)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one[0], one[1])
    still = layer.eval()(tokens, f)
    assert torch.equal(still, layer(tokens, f))
    assert torch.equal(still[0], still[3])
    ranks = sorted(1 / math.sqrt(r) for r in range(1, 10))
    for row in (one[0], still[0]):  # no two tokens share a rank
        belief = row - torch.tensor(ranks)[row.argsort().argsort()]
        assert float(belief.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_takes_the_place_of_belief(kind: str) -> None:
    """The reference is the same model with soft belief, whose belief is replaced as `belief-truth` does."""
    torch.manual_seed(0)
    model = build_model(config(kind)).double().eval()
    images, masks = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), draw_masks(64)
    plain = build_model(tiny(**KINDS[kind])).double().eval()  # type: ignore[arg-type]
    plain.load_state_dict(model.state_dict())
    outputs = model(images=images, masks=masks, return_belief=True)
    rows, columns = outputs["belief"].shape[1:]
    given = GivenBelief()
    given.shares = (masks.double() / 255).reshape(3, rows, 64 // rows, columns, 64 // columns).mean((2, 4)).flatten(1)
    with believing(plain, given):
        torch.testing.assert_close(outputs["image_features"], plain(images=images)["image_features"])
        torch.testing.assert_close(outputs["belief"], plain.belief_map(images))
    assert not torch.allclose(outputs["image_features"], plain(images=images)["image_features"], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_reach_the_mask_but_all_that_is_trained(kind: str) -> None:
    model = build_model(config(kind, "complement")).train()
    images, masks = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), draw_masks(64)
    model(images=images, masks=masks)["image_features"].square()[:, 0].sum().backward()
    instruction = model.prior_projection if kind == "prioritr" else model.visual.instruction
    assert float(instruction.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", ["vit", "prioritr"])
def test_images_without_masks_are_refused_and_no_mask_is_kept(kind: str) -> None:
    model = build_model(config(kind)).eval()
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    model(images=images, masks=draw_masks(64))
    for call in (lambda: model(images=images), lambda: model.belief_map(images)):
        with pytest.raises(ValueError, match=r"belief of this model is given \(belief.mode given, mask\)"):
            call()
    assert build_model(config(kind, "noise")).eval()(images=images)["image_features"].isfinite().all()


def test_flops_are_counted_without_masks() -> None:
    assert pair_flops(config("vit"), 64) == pair_flops(tiny(belief=BeliefConfig(mode="uniform")), 64) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [({"given": "truth"}, "belief.given must be mask, complement or noise, not 'truth'"),
     ({"mode": "given", "compat": "released"}, "'released' has no mode 'given'")],
)  # fmt: skip
def test_wrong_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeliefConfig(**values)
