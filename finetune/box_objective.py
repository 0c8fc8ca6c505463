"""What a prior learns from boxes of drawn scenes: where the pieces are that the captions name. A detector of one class.

    place n with centre (x, y) predicts a score and the distances to the edges: box = (x - l, y - t, x + r, y + b)
    a place learns the smallest box around its centre; a box without a centre in it is learned by the nearest place
    loss = (focal loss of all places + generalised IoU loss of the places with a box) / places with a box

Held-out figures: average precision in percent over all boxes of all images, the sum of the precision at each right one
divided by the number of true boxes. ``box_ap50`` asks for an IoU of 0.5, ``box_ap`` is the mean for 0.5, 0.55 to 0.95.

Source: FCOS (Tian et al. 2019, arXiv 1904.01355), with one level and without its centre-ness. Losses, overlaps and
suppression are torchvision's.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from priorclip.common.late_imports import late_imports
from priorclip.data_shards import EvalBatches
from priorclip.model.losses.gather import sum_over_ranks, world_size

with late_imports():
    from torchvision.ops import box_iou, generalized_box_iou_loss, nms, sigmoid_focal_loss

MOST = 100  # boxes that are kept of an image
OVERLAP = 0.5  # IoU from which on a box of lower score is suppressed
THRESHOLDS = np.linspace(0.5, 0.95, 10)


class BoxObjective:
    """Loss of a batch, and figures of held-out images."""

    def __init__(self, held_out: EvalBatches | None, device: torch.device) -> None:
        self.held_out, self.device = held_out, device

    def step(self, engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch (images, boxes) and its parts."""
        return box_loss(engine(batch["images"]).float(), batch["boxes"], batch["images"].shape[-1])

    def evaluate(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Returns the figures of the held-out images; empty without any. A collective."""
        if self.held_out is None:
            return {}
        images = self.held_out.image_count
        scores = torch.zeros(images, MOST, device=self.device)  # 0: no box
        right = torch.zeros(images, MOST, len(THRESHOLDS), device=self.device)
        true = torch.zeros((), device=self.device)
        for batch in self.held_out.images():
            outputs = engine(batch["images"].to(self.device)).float()
            for row, index in enumerate(batch["index"].tolist()):
                if index < 0:
                    continue
                truth = batch["boxes"][row][~batch["boxes"][row, :, 0].isnan()]
                boxes, sure = detect(outputs[row], batch["images"].shape[-1])
                scores[index, : len(sure)] = sure
                right[index, : len(sure)] = torch.from_numpy(match(boxes.cpu(), truth)).to(right)
                true += len(truth)
        for each in (scores, right, true):
            dist.all_reduce(each)
        found = scores.flatten() > 0
        each = average_precisions(scores.flatten()[found].cpu(), right.flatten(0, 1)[found].cpu(), int(true))
        return {"box_ap50": 100 * float(each[0]), "box_ap": 100 * float(each.mean())}


def centres(places: int, side: int) -> Tensor:
    """Returns the centres (N, 2), x and y in pixels, of the places of a square grid, row by row."""
    count = math.isqrt(places)
    axis = (torch.arange(count) + 0.5) * side / count
    return torch.stack([axis.repeat(count), axis.repeat_interleave(count)], dim=1)


def boxes_of(outputs: Tensor, side: int) -> Tensor:
    """Returns the predicted boxes (..., N, 4) in pixels of outputs (..., N, 5)."""
    places = outputs.shape[-2]
    middle = centres(places, side).to(outputs)
    reach = softplus(outputs[..., 1:]) * 2 * side / math.isqrt(places)
    return torch.cat([middle - reach[..., :2], middle + reach[..., 2:]], dim=-1)


def assign(boxes: Tensor, middle: Tensor) -> Tensor:
    """Returns for each place the number of its box, -1 for none, (B, N).

    Args:
        boxes: (B, n, 4), NaN for none
        middle: centres of the places (N, 2)
    """
    if not boxes.shape[1]:
        return torch.full((len(boxes), len(middle)), -1, device=boxes.device)
    offsets = torch.cat(
        [middle[None, :, None] - boxes[:, None, :, :2], boxes[:, None, :, 2:] - middle[None, :, None]], 3
    )
    inside = (offsets > 0).all(3)  # (B, N, n); NaN is not inside
    far = (middle[None, :, None] - (boxes[:, None, :, :2] + boxes[:, None, :, 2:]) / 2).square().sum(3)
    nearest = far.nan_to_num(torch.inf).argmin(1, keepdim=True)  # (B, 1, n)
    alone = ~inside.any(1, keepdim=True) & ~boxes[:, None, :, 0].isnan()
    inside = inside | torch.zeros_like(inside).scatter(1, nearest, alone)
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[:, None].expand(inside.shape)
    smallest = area.masked_fill(~inside, torch.inf).argmin(2)
    return torch.where(inside.any(2), smallest, -1)


def box_loss(outputs: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of outputs (B, N, 5) against boxes (B, n, 4), NaN for none, over all ranks, and its parts.

    The mean over ranks is the loss of the global batch.
    """
    owner = assign(boxes, centres(outputs.shape[1], side).to(boxes))
    taken = owner >= 0
    share = world_size() / sum_over_ranks(taken.sum().float()).clamp(min=1)
    scores = sigmoid_focal_loss(outputs[..., 0], taken.to(outputs), reduction="sum") * share
    if boxes.shape[1]:
        wanted = boxes.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))[taken].to(outputs)
        edges = generalized_box_iou_loss(boxes_of(outputs, side)[taken], wanted, reduction="sum") * share
    else:
        edges = 0 * outputs.sum()
    return scores + edges, {"score_loss": scores.detach(), "edge_loss": edges.detach()}


def detect(outputs: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns boxes (D, 4) and scores (D,) of an image, the surest first, of outputs (N, 5)."""
    boxes, scores = boxes_of(outputs, side).clamp(0, side), outputs[:, 0].sigmoid()
    kept = nms(boxes, scores, OVERLAP)[:MOST]
    return boxes[kept], scores[kept]


def match(boxes: Tensor, truth: Tensor) -> NDArray[np.bool_]:
    """Tells for each box, the surest first, at which THRESHOLDS it is right: (D, T).

    A box takes the true box that it overlaps most of those that no surer box has taken.
    """
    right = np.zeros((len(boxes), len(THRESHOLDS)), bool)
    if not len(truth):
        return right
    overlaps = box_iou(boxes.double(), truth.double()).numpy()
    free = np.ones((len(THRESHOLDS), len(truth)), bool)
    for number in np.flatnonzero(overlaps.max(1) >= THRESHOLDS[0]):
        left = np.where(free, overlaps[number], -1)
        best = left.argmax(1)
        right[number] = left[np.arange(len(THRESHOLDS)), best] >= THRESHOLDS
        free[right[number], best[right[number]]] = False
    return right


def average_precisions(scores: Tensor, right: Tensor, true: int) -> Tensor:
    """Returns the average precision at each threshold, (T,), of boxes with scores (D,) that are right or not (D, T).

    NaN if there is no true box.
    """
    right = right[scores.argsort(descending=True, stable=True)].double()
    ranks = torch.arange(1, len(right) + 1, dtype=torch.float64)[:, None]
    return (right.cumsum(0) / ranks * right).sum(0) / (true or math.nan)
