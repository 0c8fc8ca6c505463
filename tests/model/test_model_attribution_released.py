"""The Attribution loss of the authors' code, `loss.compat: released`, beside that of the paper."""

from __future__ import annotations

import math

import loss_reference as reference
import pytest
import torch
from torch import Tensor

from priorclip.model.config import LossConfig
from priorclip.model.losses.attribution import AttributionLoss
from priorclip.model.losses.retrieval_loss import RetrievalLoss

UNBALANCED, BALANCED = [40, 12, 8, 4], [16, 16, 16, 16]
CHUNKS = [1, 3, 4, None]  # of 4 classes: one and three columns at a time, all in one block


def found(loss, counts: list[int], scale: float = 7.0, hidden: int = 0) -> list[Tensor]:
    """The value of a loss and its gradients in image, text and scale; ``hidden``: samples of unknown class."""
    data = reference.crowd(counts)
    image, text = data["image"].requires_grad_(), data["text"].requires_grad_()
    data["labels"][:hidden] = -1
    temperature = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    value = loss(image, text, temperature, data["labels"])
    return [value, *torch.autograd.grad(value, (image, text, temperature))]


def cosine(counts: list[int], *losses) -> float:
    """Of the gradients of two losses in the features of a batch with so many samples a class."""
    one, other = (torch.cat(found(loss, counts)[1:3]).flatten() for loss in losses)
    return torch.cosine_similarity(one, other, dim=0).item()


@pytest.mark.parametrize("hidden", [0, 9])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("counts", [UNBALANCED, BALANCED])
def test_released_equals_one_centre_for_each_sample(counts: list[int], chunk: int | None, hidden: int):
    mine = found(AttributionLoss(chunk, "released"), counts, hidden=hidden)
    theirs = found(reference.released_attribution, counts, hidden=hidden)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_gradients_agree_only_if_the_classes_are_balanced():
    """docs/model.md has the figures."""
    losses = AttributionLoss(), AttributionLoss(compat="released")
    assert cosine(BALANCED, *losses) == pytest.approx(1, abs=1e-12)
    assert cosine(UNBALANCED, *losses) == pytest.approx(0.914, abs=5e-4)


def test_the_closed_domains_code_has_a_third_gradient():
    """docs/model.md has the figures."""
    third = reference.closed_attribution
    assert cosine(BALANCED, AttributionLoss(), third) == pytest.approx(0.989, abs=5e-4)
    assert cosine(UNBALANCED, AttributionLoss(), third) == pytest.approx(0.815, abs=5e-4)
    assert cosine(UNBALANCED, AttributionLoss(compat="released"), third) == pytest.approx(0.959, abs=5e-4)


def test_balanced_values_differ_by_the_log_of_a_class():
    paper, released = (found(AttributionLoss(compat=compat), BALANCED)[0] for compat in ("paper", "released"))
    assert (released - paper).item() == pytest.approx(math.log(16), abs=1e-12)


@pytest.mark.parametrize("chunk", [2, None])
def test_released_needs_no_matrix_of_samples(chunk: int | None):
    """No tensor of the forward and backward passes has more numbers than (N, classes) or (N, d)."""
    counts, largest = [300, 150, 50, 12], 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    data = reference.crowd(counts)
    image, text = data["image"].requires_grad_(), data["text"].requires_grad_()
    with Watch():
        AttributionLoss(chunk, "released")(image, text, torch.tensor(9.0), data["labels"]).backward()
    assert largest == image.numel()


def test_the_option_reaches_the_loss():
    assert LossConfig().compat == RetrievalLoss().attribution.compat == "paper"
    assert RetrievalLoss(compat="released").attribution.compat == "released"
    for bad in (LossConfig, RetrievalLoss, AttributionLoss):
        with pytest.raises(ValueError, match="compat must be paper or released, not 'theirs'"):
            bad(compat="theirs")
