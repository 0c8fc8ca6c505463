"""The section `losses`: time, memory and rounding of the losses over N pairs, beside open_clip's ClipLoss.

measure_losses({"size": 4096, "matmul": "high"}, settings)["losses"]["contrastive"]
-> {"seconds": [...], "peak_bytes": 4.0e8, "ratio": 0.7, "bf16": {"loss_error": 2e-5, "gradient_error": 2e-3}, ...}

The features have 512 numbers and are random, with the text of a pair near its image. An error is that of features in
bf16 or float32 against the same loss over the features in float64: of the loss, relative to it; of the gradient in all
features, the norm of the difference relative to the norm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.open_clip_step import NOT_INSTALLED, is_installed
from benchmarks.gpu.timing import Step, repeated, settings_device, with_peak
from priorclip.model.losses.attribution import AttributionLoss
from priorclip.model.losses.contrastive import ContrastiveLoss
from priorclip.model.losses.sigmoid import SigmoidLoss

WIDTH, CLASSES = 512, 30
SCALE, SIGMOID_SCALE, SIGMOID_BIAS = 1 / 0.07, 10.0, -10.0  # where the models start
NOISE = 3.0  # a similarity of 0.3 in a pair, as early in a training: neither is the loss 0 nor chance
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEER = "open_clip's ClipLoss"
PEER_IS = "contrastive"  # the same function, and in float64 without N x N logits, which would take 50 GB at 32,768
Loss = Callable[[Tensor, Tensor], Tensor]


def measure_losses(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of each loss by name. ``ratio`` is its time over that of ClipLoss, in turn."""
    device = settings_device(settings)
    torch.set_float32_matmul_precision(case["matmul"])
    image, text, labels = draw_features(case["size"], device)
    losses = losses_of(image.device, case["size"], labels)
    steps, figures = {}, {}
    for name, loss in losses.items():
        leaves = [each.to(DTYPES[settings["precision"]]).requires_grad_() for each in (image, text)]
        steps[name], peak = with_peak(device, backward_of(loss, leaves))
        figures[name] = {"peak_bytes": peak, **errors(loss, losses[PEER_IS if name == PEER else name], image, text)}
    seconds = repeated(steps, 1, settings["repeats"], device)
    for name, found in seconds.items():
        figures[name]["seconds"] = found
        if PEER in seconds:
            figures[name]["ratio"] = statistics.median(a / b for a, b in zip(found, seconds[PEER], strict=True))
    return {"width": WIDTH, "features": settings["precision"], "losses": figures,
            "peer_missing": None if is_installed() else NOT_INSTALLED}  # fmt: skip


def draw_features(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images and texts (N, d), L2-normalised in float64, and scenes (N,)."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(size, WIDTH, generator=draw, dtype=torch.float64)
    text = image + NOISE * torch.randn(size, WIDTH, generator=draw, dtype=torch.float64)
    both = [torch.nn.functional.normalize(each, dim=1).to(device) for each in (image, text)]
    return both[0], both[1], torch.randint(CLASSES, (size,), generator=draw).to(device)


def losses_of(device: torch.device, size: int, labels: Tensor) -> dict[str, Loss]:
    """Returns the losses as functions of both features. On a GPU with shapes that do not depend on the batch."""
    ids = torch.arange(size, device=device)

    def number(value: float, like: Tensor) -> Tensor:
        return torch.tensor(value, device=device, dtype=torch.promote_types(like.dtype, torch.float32))

    contrastive, sigmoid = ContrastiveLoss(), SigmoidLoss()
    attribution = AttributionLoss(classes=None if device.type == "cpu" else CLASSES)
    losses: dict[str, Loss] = {
        "contrastive": lambda image, text: contrastive(image, text, number(SCALE, image), ids),
        "sigmoid": lambda image, text: sigmoid(
            image, text, number(SIGMOID_SCALE, image), number(SIGMOID_BIAS, image), ids
        ),
        "attribution": lambda image, text: attribution(image, text, number(SCALE, image), labels),
    }
    if is_installed():
        from open_clip.loss import ClipLoss

        clip = ClipLoss(cache_labels=True)
        losses[PEER] = lambda image, text: clip(image, text, number(SCALE, image))
    return losses


def backward_of(loss: Loss, leaves: list[Tensor]) -> Callable[[], Step]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(*leaves).backward()

    return lambda: step


def errors(loss: Loss, reference: Loss, image: Tensor, text: Tensor) -> dict[str, dict[str, float]]:
    """Returns the errors of features in each number format, against the reference in float64."""
    right, gradient = with_gradient(reference, image, text, torch.float64)
    found = {}
    for name, dtype in DTYPES.items():
        value, rounded = with_gradient(loss, image, text, dtype)
        found[name] = {
            "loss_error": abs(value - right) / abs(right),
            "gradient_error": float((rounded - gradient).norm() / gradient.norm()),
        }
    return found


def with_gradient(loss: Loss, image: Tensor, text: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Returns the loss and its gradient (2, N, d) in float64, of features rounded to the dtype."""
    leaves = [each.to(dtype).requires_grad_() for each in (image, text)]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    return float(value.detach()), torch.stack(gradients).double()
