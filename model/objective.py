"""The training objective on captioned images: the losses of a batch, and recall and pictures of held-out images.

objective = RetrievalObjective(LossConfig(lambda_cs=1.0), device, gather)
loss, parts = objective.step(engine, batch)
figures = objective.evaluate(engine, batches)
hits = objective.query_hits(engine, batches)    # the success of each query, instead of the figures
pictures = objective.pictures(engine, batches)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from priorclip.model.bootstrap import Hits
from priorclip.model.config import LossConfig
from priorclip.model.evaluation import Batches, Forward, Gather, encode_images, encode_texts, masks_of
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.pictures.belief_maps import belief_panel
from priorclip.model.pictures.colours import in_colours
from priorclip.model.pictures.retrieval_pictures import hard_negatives, hard_negatives_panel, similarity_panel
from priorclip.model.recall import query_hits, recall_figures


class RetrievalObjective:
    """Contrastive and Attribution loss over the global batch; recall@k by the usual protocol.

    Args:
        loss: weights of the parts
        device: of the model
        gather: gathers the rows of all ranks for an evaluation (see model.evaluation); None: this process has all rows
        bands: bands of the images, which pictures show in colours; None if the images are pictures
        classes: number of scene classes; None: not known. On a device that computes beside the processor, the losses
            then have shapes that do not depend on the batch (see `AttributionLoss`)
    """

    def __init__(
        self,
        loss: LossConfig,
        device: torch.device,
        gather: Gather | None = None,
        bands: Sequence[str] | None = None,
        classes: int | None = None,
    ) -> None:
        self.loss = RetrievalLoss(**asdict(loss), classes=None if device.type == "cpu" else classes)
        self.device, self.gather, self.bands = device, gather, bands
        # Features of the held-out images and texts, from an evaluation to its pictures.
        self.encoded: tuple[Tensor, Tensor] | None = None

    def step(self, engine: Forward, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns loss, parts and learned scales of a batch (images, input_ids, attention_mask, image_ids, labels)."""
        return self.losses(self.encode(engine, batch), batch)

    def encode(self, engine: Forward, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """First half of a step: returns features and scales of a batch (images, input_ids, attention_mask).

        With masks in the batch, the model gets them too.
        """
        return engine(batch["images"], batch["input_ids"], batch["attention_mask"], **masks_of(batch, self.device))

    def losses(self, features: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Second half of a step: returns the loss of features, with image_ids, labels and input_ids of the batch."""
        image_ids, labels = (batch[name].to(self.device, non_blocking=True) for name in ("image_ids", "labels"))
        total, parts = self.loss(features, image_ids, labels, batch["input_ids"])
        learned = {name: features[name].detach() for name in ("logit_scale", "logit_bias") if name in features}
        return total, {**parts, **learned}

    @torch.no_grad()
    def pictures(self, engine: Forward, batches: Batches) -> dict[str, Image.Image]:
        """Returns belief maps of the same held-out images each time; after an evaluation also its worst confusions and
        similarities by scene. All ranks call the engine."""
        panels = self.belief(engine, batches)
        if self.encoded is not None:
            images, texts = self.encoded
            self.encoded = None  # they are outdated after the next step
            panels |= {
                "hard_negatives": draw_hard_negatives(images, texts, batches, bands=self.bands),
                "similarity": draw_similarities(images, texts, batches),
            }
        return panels

    def belief(self, engine: Forward, batches: Batches, count: int = 8) -> dict[str, Image.Image]:
        """Returns belief maps of the first ``count`` held-out images; empty for a model without a prior."""
        batch = next(batches.images())
        real = (batch["index"] >= 0).nonzero().flatten()[:count]
        if len(real) == 0:  # only padding on this rank, but the other ranks need its engine
            real = torch.zeros(1, dtype=torch.int64)
        some, masks = batch["images"][real], masks_of(batch, self.device)
        belief = engine(
            images=some.to(self.device), return_belief=True, **{name: each[real] for name, each in masks.items()}
        ).get("belief")
        return {} if belief is None else {"belief": belief_panel(in_colours(some, self.bands), belief)}

    def evaluate(self, engine: Forward, batches: Batches) -> dict[str, float]:
        """Returns recalls of the engine in eval mode, percent."""
        return recall_figures(self.query_hits(engine, batches))

    def query_hits(self, engine: Forward, batches: Batches) -> Hits:
        """Returns for each figure the success of each query and the query's image, as ``model.recall.query_hits``."""
        images = encode_images(engine, batches, self.device, self.gather)
        texts = encode_texts(engine, batches, self.device, self.gather)
        self.encoded = images, texts
        return query_hits(images, texts, torch.as_tensor(batches.text_image))


def draw_hard_negatives(
    images: Tensor, texts: Tensor, batches: Batches, count: int = 8, bands: Sequence[str] | None = None
) -> Image.Image:
    """Draws the held-out images that are closest to captions of other images."""
    found = hard_negatives(images, texts, torch.as_tensor(batches.text_image), batches.captions, count)
    pixels = in_colours(batches.pixels([each.image for each in found]), bands)
    return hard_negatives_panel(pixels, found, batches.captions)


def draw_similarities(images: Tensor, texts: Tensor, batches: Batches, count: int = 120) -> Image.Image:
    """Draws similarities of ``count`` evenly spaced held-out images with their first captions, sorted by scene."""
    sample = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    scenes = dict(zip(sample, batches.scenes(sample), strict=True))
    sample = sorted(sample, key=lambda image: (scenes[image] == "", scenes[image]))
    owners = torch.as_tensor(batches.text_image)
    first = torch.searchsorted(owners, torch.tensor(sample))  # the captions of an image are adjacent
    return similarity_panel(images[sample] @ texts[first].T, [scenes[image] for image in sample])
