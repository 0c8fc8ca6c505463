"""The scene prior: a classifier trained on scene labels. The pooled feature of its backbone becomes the instruction.

    finetune prior:  images -> backbone -> pooled (B, P) -> linear -> scene logits (B, C) and tag logits (B, K)
    PriorCLIP/ITR:   images -> backbone (frozen or not) -> pooled (B, P) -> projected: instruction f (B, d)

Its export folder is a valid `EncoderConfig.weights` for any model with the same backbone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor, nn

from priorclip.model.config import SceneConfig
from priorclip.model.encoders.vision import ImageEncoder, normalisation

if TYPE_CHECKING:
    from collections.abc import Sequence


class SceneClassifier(nn.Module):
    """A timm backbone with a linear head over scene classes, and over tags of objects if there are any.

    A backbone that has learned something else (``learned``) has no head.
    """

    def __init__(self, config: SceneConfig):
        super().__init__()
        if config.learned != "scenes" and (config.classes or config.tags):
            raise ValueError(f"a backbone that has learned {config.learned} has no classes and no tags")
        if not config.classes and not config.tags and config.learned == "scenes":
            raise ValueError("SceneConfig.classes is empty: a scene classifier needs the names of its classes")
        self.config = copy.deepcopy(config)
        self.backbone = ImageEncoder(self.config.backbone, pool=True)
        self.config.backbone.mean, self.config.backbone.std = normalisation(config.backbone)
        names = len(config.classes) + len(config.tags)
        self.head = nn.Linear(self.backbone.width, names) if names else None

    @property
    def classes(self) -> Sequence[str]:
        return self.config.classes

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 or float in [0, 1] -> logits (B, C + K): ``classes``, then ``tags``.

        Without a head: the pooled features (B, P).
        """
        pooled = self.backbone(images)
        return pooled if self.head is None else self.head(pooled)

    def features(self, images: Tensor) -> Tensor:
        """Returns pooled features (B, P)."""
        return self.backbone(images)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.model.set_grad_checkpointing(enable)
