"""What a prior learns without labels: that two views of an image are the same one. VICReg, over the global batch.

    z, z' (N, D): the expander's outputs for two views of each of the N images of all ranks
    loss = 25 mean (z - z')^2                           the views agree
         + 25 mean over channels of (1 - deviation)+    no channel is the same for all images, mean of both views
         +    sum of squared covariances / D            no channel repeats another, sum of both views

A view is a crop of 30 to 100 % of the area, flipped, with other colours, sometimes grey or blurred. Held-out figure:
``knn_accuracy``, the scene of a held-out image by the 20 training images that are nearest to it in the backbone's
features, of up to 5,000 that lie evenly in the shards. The labels enter this probe only.

Sources: VICReg (Bardes et al. 2022, arXiv 2105.04906), whose coefficients these are; the probe is that of Wu et al.
2018 (arXiv 1805.01978), with its temperature.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from priorclip.data_shards import EvalBatches
from priorclip.data_shards.format.sample import Sample
from priorclip.data_shards.stream.batch_fetcher import SampleSource
from priorclip.model.losses.gather import gather_rows_with_gradient

AGREE, VARY, DIFFER = 25.0, 25.0, 1.0
NEIGHBOURS, TEMPERATURE, BANK = 20, 0.07, 5000


class SelfObjective:
    """Loss of a batch, and figures of held-out images.

    Args:
        bank: training images of the probe; None if there is no probe
        held_out: held-out images; None for none
        device: of this rank
    """

    def __init__(self, bank: EvalBatches | None, held_out: EvalBatches | None, device: torch.device) -> None:
        self.bank, self.held_out, self.device = bank, held_out, device

    def step(self, engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a batch (images) and its parts."""
        both = torch.cat([views(batch["images"]), views(batch["images"])])
        one, other = engine(both).float().chunk(2)
        return vicreg(gather_rows_with_gradient(one), gather_rows_with_gradient(other))

    def evaluate(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        """Returns the figures of the held-out images; empty without any, or without labels. A collective."""
        if self.held_out is None or self.bank is None:
            return {}
        known, labels = self.features(engine, self.bank)
        asked, wanted = self.features(engine, self.held_out)
        found = nearest_label(asked[wanted >= 0], known[labels >= 0], labels[labels >= 0], len(self.bank.classes))
        return {"knn_accuracy": 100 * float((found == wanted[wanted >= 0]).double().mean())}

    def features(self, engine: deepspeed.DeepSpeedEngine, batches: EvalBatches) -> tuple[Tensor, Tensor]:
        """Returns normalised features (I, C) and labels (I,), -1 for none, of all ranks."""
        rows: Tensor | None = None
        labels = torch.zeros(batches.image_count, dtype=torch.int64, device=self.device)
        for batch in batches.images():
            kept = batch["index"] >= 0
            index = batch["index"][kept].to(self.device)
            found = engine(batch["images"].to(self.device), features=True).float()[kept.to(self.device)]
            rows = torch.zeros(batches.image_count, found.shape[1], device=self.device) if rows is None else rows
            rows[index], labels[index] = normalize(found, dim=1), batch["labels"][kept].to(self.device)
        assert rows is not None
        for each in (rows, labels):
            dist.all_reduce(each)
        return rows, labels


class SomeSamples:
    """Up to ``most`` samples that lie evenly in a source."""

    def __init__(self, source: SampleSource, most: int) -> None:
        self.source, self.classes = source, source.classes
        self.places = np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self.places)

    def read(self, sample: int) -> Sample:
        return self.source.read(self.places[sample])

    def name(self, sample: int) -> tuple[str, str]:
        return self.source.name(self.places[sample])


def vicreg(one: Tensor, other: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns VICReg's loss of two views (N, D), and its three parts."""
    agree = mse_loss(one, other)
    vary, differ = one.new_zeros(()), one.new_zeros(())
    for view in (one, other):
        centred = view - view.mean(0)
        vary = vary + (1 - (centred.var(0) + 1e-4).sqrt()).relu().mean() / 2
        covariance = centred.T @ centred / (len(view) - 1)
        differ = differ + (covariance.square().sum() - covariance.diagonal().square().sum()) / view.shape[1]
    parts = {"agree": agree.detach(), "vary": vary.detach(), "differ": differ.detach()}
    return AGREE * agree + VARY * vary + DIFFER * differ, parts


def views(images: Tensor) -> Tensor:
    """Returns a random view of each image, uint8 (B, 3, S, S). It draws from torch's generator, which the run seeds."""
    change = view_maker(images.shape[-1])
    return torch.stack([change(image) for image in images])


@cache
def view_maker(side: int) -> Any:
    """Returns torchvision's transforms; imported here because few trainings need them."""
    from torchvision.transforms import v2

    blur = max(3, side // 20 * 2 + 1)  # a tenth of the side, odd
    return v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.3, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(blur)], p=0.5),
        ]
    )


def nearest_label(asked: Tensor, known: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the label (Q,) that the nearest neighbours vote for, each with exp(similarity / TEMPERATURE).

    Args:
        asked: (Q, C) normalised
        known: (K, C) normalised
        labels: of the known, (K,)
        classes: number of classes
    """
    similar, near = (asked @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
    votes = torch.zeros(len(asked), classes, dtype=similar.dtype, device=asked.device)
    votes.scatter_add_(1, labels[near], ((similar - 1) / TEMPERATURE).exp())
    return votes.argmax(1)
