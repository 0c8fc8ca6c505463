"""What a prior learns from masks of drawn scenes: which places show the thing that the captions name.

    logits (B, h, w) of the places; target: the share of each place that the mask covers
    loss = binary cross-entropy + 1 - Dice         Dice = (2 sum p t + 1) / (sum p + sum t + 1), of each image

Held-out figure: ``mask_iou``, intersection over union of the thing in the pixels of the image, mean over the images.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from priorclip.data_shards import EvalBatches
from priorclip.model.localization import cell_shares


class MaskObjective:
    """Loss of a batch, and figures of held-out images."""

    def __init__(self, held_out: EvalBatches | None, device: torch.device) -> None:
        self.held_out, self.device = held_out, device

    def step(self, engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch (images, masks) and its parts."""
        logits = engine(batch["images"]).float()
        return mask_loss(logits, batch["masks"])

    def evaluate(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Returns the figures of the held-out images; empty without any. A collective."""
        if self.held_out is None:
            return {}
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.held_out.images():
            logits = engine(batch["images"].to(self.device)).float()
            kept = batch["index"] >= 0
            found = intersections_over_unions(logits[kept.to(self.device)], batch["masks"][kept].to(self.device))
            total += torch.stack([found.sum(), torch.tensor(len(found), device=self.device)]).double()
        dist.all_reduce(total)
        return {"mask_iou": float(100 * total[0] / total[1])}


def mask_loss(logits: Tensor, masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of logits (B, h, w) against masks (B, S, S), uint8, and its parts."""
    shares = cell_shares(masks.double() / 255, (logits.shape[1], logits.shape[2])).to(logits)
    entropy, right = binary_cross_entropy_with_logits(logits, shares), logits.sigmoid().flatten(1)
    shares = shares.flatten(1)
    dice = 1 - ((2 * (right * shares).sum(1) + 1) / (right.sum(1) + shares.sum(1) + 1)).mean()
    return entropy + dice, {"mask_entropy": entropy.detach(), "dice_loss": dice.detach()}


def intersections_over_unions(logits: Tensor, masks: Tensor) -> Tensor:
    """Returns the intersection over union (n,) of the n images whose mask (B, S, S), uint8, shows the thing at all.

    The logits (B, h, w) are interpolated to the pixels; a pixel belongs to the thing from a half on, in both.
    """
    pixels = interpolate(logits[:, None], masks.shape[1:], mode="bilinear", align_corners=False)[:, 0] > 0
    truth = masks >= 128
    both, either = (pixels & truth).sum((1, 2)), (pixels | truth).sum((1, 2))
    return (both / either)[truth.any(2).any(1)]
