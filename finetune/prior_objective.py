"""What a scene prior learns: scene labels, tags of objects, or both from one backbone with two heads in one layer.

    logits (B, C + K) = [scenes | tags]
    loss = cross-entropy with the scene labels  +  binary cross-entropy with the tags, mean over images and tags

Held-out figures: accuracy and mean accuracy of the scenes, and the mean over the tags of their average precision.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from priorclip.data_shards import EvalBatches
from priorclip.finetune.commands import PriorConfig
from priorclip.finetune.confusion_matrix import confusion, figures_of
from priorclip.finetune.object_tags import TAGS, TagTargets
from priorclip.finetune.scene_mixing import SceneTargets, soft_cross_entropy


class PriorObjective:
    """Loss of a batch, and figures of held-out images.

    Args:
        config: ``targets`` chooses
        classes: scene classes of the shards
        tags: of the training images
        held_out: held-out images, if there are any
        held_out_tags: of the held-out images
        device: of this rank
    """

    def __init__(
        self,
        config: PriorConfig,
        classes: list[str],
        tags: TagTargets,
        held_out: EvalBatches | None,
        held_out_tags: TagTargets | None,
        device: torch.device,
    ) -> None:
        self.classes = classes if "scenes" in config.targets else []
        self.tag_names = list(TAGS) if "tags" in config.targets else []
        self.mix = SceneTargets(len(classes), config.mixup, config.cutmix, config.label_smoothing)
        self.tags, self.held_out, self.held_out_tags, self.device = tags, held_out, held_out_tags, device
        self.counts: Tensor | None = None  # confusion matrix of the last evaluation

    def step(self, engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch (images, labels, image_ids) and its parts."""
        labels, images, parts = batch["labels"], batch["images"], {}
        if self.classes:
            images, soft = self.mix(images, labels)
        logits = engine(images).float()
        scenes, tags = logits.split([len(self.classes), len(self.tag_names)], dim=1)
        losses = []
        if self.classes:
            losses.append(soft_cross_entropy(scenes, soft))
            parts["accuracy"] = (scenes.argmax(dim=1) == labels).sum() / (labels >= 0).sum().clamp(min=1)
        if self.tag_names:
            losses.append(tag_loss(tags, self.tags(batch["image_ids"]).to(tags.device)))
            parts["tag_loss"] = losses[-1].detach()
        return torch.stack(losses).sum(), parts

    def evaluate(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Returns the figures of the held-out images; empty without any. A collective."""
        if self.held_out is None:
            return {}
        figures: dict[str, float] = {}
        if self.classes:
            scenes = len(self.classes)
            self.counts = confusion(lambda images: engine(images)[:, :scenes], self.held_out, scenes, self.device)
            figures |= figures_of(self.counts)
        if self.tag_names:
            figures |= self.tag_figures(engine)
        return figures

    def tag_figures(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Returns ``tag_map``: average precision in percent, mean over the tags that a held-out image has."""
        assert self.held_out is not None
        assert self.held_out_tags is not None
        images, tags = self.held_out.image_count, len(self.tag_names)
        scores = torch.zeros(images, tags, device=self.device)
        seen = torch.zeros(images, device=self.device)
        for batch in self.held_out.images():
            logits = engine(batch["images"].to(self.device))[:, -tags:].float()
            kept = batch["index"] >= 0
            index = batch["index"][kept].to(self.device)
            scores[index], seen[index] = logits[kept.to(self.device)], 1
        dist.all_reduce(scores)
        dist.all_reduce(seen)
        wanted = seen.cpu().nonzero().flatten()
        targets = self.held_out_tags(wanted)
        known = targets[:, 0] >= 0
        return {"tag_map": mean_average_precision(scores.cpu()[wanted[known]], targets[known])}


def tag_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, logits (B, K) and targets (B, K): mean over tags and over the images with captions."""
    known = (targets >= 0).all(dim=1, keepdim=True)
    each = binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none") * known
    return each.sum() / (known.sum() * targets.shape[1]).clamp(min=1)


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over the tags with at least one positive: scores and targets (N, K) -> percent; nan if no tag has one.

    Average precision is scikit-learn's: the sum of precision at each positive times the step in recall.
    """
    there = targets.sum(0) > 0
    if not there.any():
        return float("nan")
    from sklearn.metrics import average_precision_score  # here, because only tags need it: 2 s to import

    each = average_precision_score(targets[:, there].numpy(), scores[:, there].numpy(), average=None)
    return 100 * float(np.mean(each))
