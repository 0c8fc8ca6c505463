"""Targets of a scene classifier: smoothed labels, mixed by timm's mixup and cutmix.

    targets = SceneTargets(classes=21, mixup=0.2, cutmix=0.0, smoothing=0.1)
    images, soft = targets(images, labels)          # (B, 3, S, S), (B, C): rows sum to 1, or to 0 without a label
    loss = soft_cross_entropy(logits, soft)

timm draws from NumPy's global generator. It is seeded here from torch's generator, which the run seeds by step and
rank, so a resumed run mixes the same images as the uninterrupted run.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax


class SceneTargets:
    """Soft targets of a batch, and its images, which are mixed if mixup or cutmix is on.

    Args:
        classes: number of classes C
        mixup, cutmix: alpha of the beta distribution of the other image's share; 0 turns it off
        smoothing: share of each target that is spread over all classes
    """

    def __init__(self, classes: int, mixup: float, cutmix: float, smoothing: float) -> None:
        self.classes, self.smoothing = classes, smoothing
        self.mix = None
        if mixup > 0 or cutmix > 0:
            from timm.data import Mixup  # few trainings mix, and the encoders import timm without the compiler first

            self.mix = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8, or of bands, and labels (B,), -1 for none -> images, targets (B, C)."""
        known = labels >= 0
        soft = torch.full((len(labels), self.classes), self.smoothing / self.classes, device=labels.device)
        soft.scatter_(1, labels.clamp(min=0)[:, None], 1 - self.smoothing + self.smoothing / self.classes)
        soft *= known[:, None]
        if self.mix is None:
            return images, soft
        # Images without a label have no target, so they are not mixed. timm mixes an even number of images.
        mixed = known.nonzero().flatten()
        mixed = mixed[: len(mixed) // 2 * 2]
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if len(mixed):
            np.random.seed(int(torch.randint(2**31, (1,))))
            pixels[mixed], soft[mixed] = self.mix(pixels[mixed], labels[mixed])
        return pixels, soft


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows with a target: logits (B, C), targets (B, C) -> ()."""
    rows = -(targets * log_softmax(logits, dim=-1)).sum(-1)
    return rows.sum() / targets.sum(-1).gt(0).sum().clamp(min=1)
