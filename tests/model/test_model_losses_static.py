"""The losses never ask the device for a value: their shapes are known before, and what is not there counts nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import loss_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from priorclip.model.config import LossConfig
from priorclip.model.losses.attribution import STATIC_CLASSES, AttributionLoss, SummedCrossEntropy
from priorclip.model.losses.pairs import number_groups
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.objective import RetrievalObjective

CLASSES = 12  # 4 of them are in the batch of the reference
# Operators with a result or a shape that the processor does not know before the device has computed it: each makes the
# processor wait. torch.cuda.set_sync_debug_mode("error") refuses the same ones.
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "histc", "repeat_interleave",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes each operator that would make the processor wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
            for index in args[1:2] if isinstance(index, list | tuple) for each in index
        )  # fmt: skip
        if name in WAITING or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def waits_of(run: Callable[[], Tensor]) -> list[str]:
    with Waits() as waits:
        run().backward()
    return waits.found


def features(size: int = 12, width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    data = reference.batch(size, width)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    return data["image"].requires_grad_(), data["text"].requires_grad_(), scale, data["ids"], data["labels"]


@pytest.mark.parametrize("kind", ["contrastive", "hard", "sigmoid"])
@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_loss_and_its_gradient_wait_for_nothing(kind: str, compat: Any, chunk: int | None) -> None:
    image, text, scale, ids, labels = features()
    outputs: dict[str, Tensor | None] = {
        "image_features": image, "text_features": text, "logit_scale": scale, "attribution_scale": scale * 2,
        "logit_bias": torch.tensor(-4.0, dtype=torch.float64, requires_grad=True) if kind == "sigmoid" else None,
    }  # fmt: skip
    loss = RetrievalLoss(
        lambda_cs=1.0, chunk=chunk, compat=compat, kind="sigmoid" if kind == "sigmoid" else "contrastive",
        equal_captions="ignored", hard_negatives=0.5 if kind == "hard" else 0.0, classes=CLASSES,
    )  # fmt: skip
    words = torch.arange(24).view(12, 2) % 5
    assert waits_of(lambda: loss(outputs, ids, labels, words)[0]) == []


def test_what_waits_is_found() -> None:
    """The counting itself: without the number of classes, the loss asks which classes are in the batch."""
    image, text, scale, _, labels = features()
    found = waits_of(lambda: AttributionLoss()(image, text, scale, labels))
    assert {"_unique2", "index"} <= set(found)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 6), min_size=1, max_size=9),
    compat=st.sampled_from(["paper", "released"]),
    chunk=st.sampled_from([None, 1, 3, 20]),
    seed=st.integers(0, 99),
)
def test_all_classes_give_the_loss_of_the_classes_of_the_batch(
    labels: list[int], compat: Any, chunk: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        normalize(torch.randn(len(labels), 4, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    ]
    inputs.append(torch.tensor(9.0, dtype=torch.float64, requires_grad=True))
    plain, static = (AttributionLoss(chunk, compat, classes) for classes in (None, CLASSES))
    found, expected = static(*inputs, torch.tensor(labels)), plain(*inputs, torch.tensor(labels))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_an_unlabelled_sample_that_is_not_finite_stays_out_and_a_labelled_one_does_not() -> None:
    image, text, scale, _, labels = features()
    unlabelled, labelled = int((labels == -1).nonzero()[0]), int((labels >= 0).nonzero()[0])
    for place, spoils in ((unlabelled, False), (labelled, True)):
        spoilt = image.detach().clone()
        spoilt[place] = torch.nan
        spoilt.requires_grad_()
        loss = AttributionLoss(classes=CLASSES)(spoilt, text, scale, labels)
        gradient = torch.autograd.grad(loss, spoilt)[0]
        assert bool(loss.isnan()) == bool(gradient.isnan().any()) == spoils


def test_shards_without_scenes_have_a_loss_of_zero() -> None:
    """RS5M as it is published: the stream has no class, and no sample a label."""
    image, text, scale, _, labels = features()
    objective = RetrievalObjective(LossConfig(lambda_cs=1.0), torch.device("meta"), classes=0)
    loss = objective.loss.attribution(image, text, scale, torch.full_like(labels, -1))
    assert loss.item() == 0
    assert all((each == 0).all() for each in torch.autograd.grad(loss, (image, text, scale)))


@pytest.mark.parametrize("side", [1, 3, 20])
@pytest.mark.parametrize("times", [False, True])
def test_rows_that_are_left_out_get_no_gradient(side: int, times: bool) -> None:
    """The function by itself: value and gradients are those of the other rows alone."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randn(size, 4, dtype=torch.float64, generator=generator) for size in (5, 3))
    inputs = [rows.requires_grad_(), columns.requires_grad_(), torch.tensor(2.0, dtype=torch.float64).requires_grad_()]
    target, kept = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([True, False, True, True, False])
    log_times = torch.tensor([0.0, 0.7, 1.1], dtype=torch.float64) if times else None
    found = SummedCrossEntropy.apply(*inputs, target, side, log_times, kept)
    expected = SummedCrossEntropy.apply(rows[kept], *inputs[1:], target[kept], side, log_times)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_too_many_classes_are_taken_from_the_batch() -> None:
    """Otherwise 12 samples would be compared with thousands of empty centres."""
    image, text, scale, _, labels = features()
    loss = AttributionLoss(classes=STATIC_CLASSES + 1)
    assert "_unique2" in waits_of(lambda: loss(image, text, scale, labels))
    assert torch.equal(loss(image, text, scale, labels), AttributionLoss()(image, text, scale, labels))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 4), min_size=1, max_size=20))
def test_groups_are_those_of_unique(ids: list[int]) -> None:
    numbers, counts = number_groups(torch.tensor(ids))
    _, expected, expected_counts = torch.tensor(ids).unique(return_inverse=True, return_counts=True)
    assert torch.equal(numbers, expected)
    assert torch.equal(counts[: len(expected_counts)], expected_counts)
    assert counts.shape == numbers.shape
    assert counts.sum() == len(ids)


def test_the_objective_knows_the_classes_where_waiting_costs() -> None:
    kinds = {device: RetrievalObjective(LossConfig(), torch.device(device), classes=3) for device in ("cpu", "meta")}
    assert {device: each.loss.attribution.classes for device, each in kinds.items()} == {"cpu": None, "meta": 3}
