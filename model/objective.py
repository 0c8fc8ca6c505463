"""What a training on captioned images asks of the model: the losses of a batch, and the recall on held-out images.

objective = RetrievalObjective(LossConfig(lambda_cs=1.0), device, gather)
loss, parts = objective.step(engine, batch)
figures = objective.evaluate(engine, batches)
pictures = objective.pictures(engine, batches)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from priorclip.model.config import LossConfig
from priorclip.model.evaluation import Batches, Forward, Gather, encode_images, encode_texts
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.pictures.belief_maps import belief_panel
from priorclip.model.pictures.retrieval_pictures import hard_negatives, hard_negatives_panel, similarity_panel
from priorclip.model.recall import retrieval_metrics


class RetrievalObjective:
    """Contrastive and Attribution loss over the global batch; recall@k by the field's protocol.

    Args:
        loss: weights of the parts
        device: where the model is
        gather: joins the ranks' rows for an evaluation (see model.evaluation); None: this process has them all
    """

    def __init__(self, loss: LossConfig, device: torch.device, gather: Gather | None = None) -> None:
        self.loss = RetrievalLoss(**asdict(loss))
        self.device, self.gather = device, gather
        self.encoded: tuple[Tensor, Tensor] | None = (
            None  # held-out images and texts, from an evaluation to its pictures
        )

    def step(self, engine: Forward, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch (images, input_ids, attention_mask, image_ids, labels), its parts and the logit_scale."""
        return self.losses(self.encode(engine, batch), batch)

    def encode(self, engine: Forward, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first half of a step: features and scales of a batch (images, input_ids, attention_mask)."""
        return engine(batch["images"], batch["input_ids"], batch["attention_mask"])

    def losses(self, features: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The second half: the loss of features, with image_ids and labels of the batch."""
        image_ids, labels = (batch[name].to(self.device, non_blocking=True) for name in ("image_ids", "labels"))
        total, parts = self.loss(features, image_ids, labels)
        return total, {**parts, "logit_scale": features["logit_scale"].detach()}

    @torch.no_grad()
    def pictures(self, engine: Forward, batches: Batches) -> dict[str, Image.Image]:
        """Belief maps of held-out images, the same ones every time; of the last evaluation, the worst confusions and
        the similarities by scene. All ranks call the engine."""
        drawn = self.belief(engine, batches)
        if self.encoded is not None:
            images, texts = self.encoded
            self.encoded = None  # the model goes on: they are out of date
            drawn |= {
                "hard_negatives": confusions(images, texts, batches),
                "similarity": by_scene(images, texts, batches),
            }
        return drawn

    def belief(self, engine: Forward, batches: Batches, count: int = 8) -> dict[str, Image.Image]:
        batch = next(batches.images())
        some = batch["images"][batch["index"] >= 0][:count]
        if len(some) == 0:  # a rank without a share, whose engine is needed by the others all the same
            some = batch["images"][:1]
        belief = engine(images=some.to(self.device), return_belief=True).get("belief")
        return {} if belief is None else {"belief": belief_panel(some, belief)}

    def evaluate(self, engine: Forward, batches: Batches) -> dict[str, float]:
        """Recalls of the engine in eval mode, percent."""
        images = encode_images(engine, batches, self.device, self.gather)
        texts = encode_texts(engine, batches, self.device, self.gather)
        self.encoded = images, texts
        return retrieval_metrics(images, texts, torch.as_tensor(batches.text_image))


def confusions(images: Tensor, texts: Tensor, batches: Batches, count: int = 8) -> Image.Image:
    """The held-out images that are closest to captions of others."""
    found = hard_negatives(images, texts, torch.as_tensor(batches.text_image), batches.captions, count)
    return hard_negatives_panel(batches.pixels([each.image for each in found]), found, batches.captions)


def by_scene(images: Tensor, texts: Tensor, batches: Batches, count: int = 120) -> Image.Image:
    """Similarities of held-out images, evenly taken from all, with their first captions, scene by scene."""
    some = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    scenes = dict(zip(some, batches.scenes(some), strict=True))
    some = sorted(some, key=lambda image: (scenes[image] == "", scenes[image]))
    owners = torch.as_tensor(batches.text_image)
    first = torch.searchsorted(owners, torch.tensor(some))  # the captions of an image stand side by side
    return similarity_panel(images[some] @ texts[first].T, [scenes[image] for image in some])
