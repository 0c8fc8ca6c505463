"""Recall with another belief in place of the model's own: the true mask, its complement, and noise.

    with believing(model, given):            # every belief of the model is that of given.shares
        given.shares = shares                # (B, L) of the next batch
        model(images=images)

The map takes the place of M, and the ranks are its ranks, in the mode that the model has: soft belief weighs the tokens
by it, hard belief keeps its k highest. A rival of soft belief is replaced by soft belief of the map. The weights of the
model stay. So if the true mask gains nothing, a better belief would not help this model; and if noise costs nothing,
the model does not use its belief.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from priorclip.data_shards import EvalBatches
from priorclip.model.bootstrap import Hits, image_sums, interval, resample
from priorclip.model.networks.prioritr import PriorITR
from priorclip.model.networks.rivals import GivenBelief
from priorclip.model.networks.two_towers import TwoTowers
from priorclip.model.recall import query_hits, recall_figures
from priorclip.retrieval.commands import BeliefTruthConfig
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.localization.true_masks import TrueMasks

OWN = "own"
LABELS = {OWN: "the model's own", "mask": "the true mask", "complement": "all but the true mask", "noise": "noise"}


@contextmanager
def believing(model: TwoTowers, given: GivenBelief) -> Iterator[None]:
    """Replaces the belief of a model, and puts its own back at the end."""
    holder: Any = model if isinstance(model, PriorITR) else model.visual
    own: nn.Module | None = holder.rival
    holder.rival = given
    try:
        yield
    finally:
        holder.rival = own


def recalls_of_beliefs(
    config: BeliefTruthConfig,
    encoder: Encoder,
    batches: EvalBatches,
    texts: Tensor,
    masks: TrueMasks,
    grid: tuple[int, int],
) -> dict[str, dict[str, Any]]:
    """Returns for each belief: label, the recalls in percent, and mean recall with its difference to the model's own.

    Intervals are over images, the same draws for all beliefs.
    """
    true = torch.stack([masks.shares(image, grid).flatten() for image in range(batches.image_count)])
    noise = torch.from_numpy(np.random.default_rng(config.seed).random(true.shape))
    shares = {OWN: None, "mask": true, "complement": 1 - true, "noise": noise}
    hits = {name: hits_of(encoder, batches, texts, shares[name]) for name in (OWN, *config.chosen)}
    draws = (
        {name: mean_draws(each, batches.image_count, config) for name, each in hits.items()} if config.bootstrap else {}
    )
    found: dict[str, dict[str, Any]] = {}
    for name, each in hits.items():
        figures = recall_figures(each)
        mean = figures.pop("mean_recall")
        found[name] = {"label": LABELS[name], "mean_recall": {"mean": mean}, **figures}
        if draws:
            found[name]["mean_recall"]["interval"] = list(interval(draws[name]))
        if name != OWN:
            found[name]["less_own"] = {"mean": mean - found[OWN]["mean_recall"]["mean"]}
            if draws:
                found[name]["less_own"]["interval"] = list(interval(draws[name] - draws[OWN]))
    return found


def hits_of(encoder: Encoder, batches: EvalBatches, texts: Tensor, shares: Tensor | None) -> Hits:
    """Returns the hits of each query, with the belief of shares (I, L), or the model's own without them.

    An image that cannot be read is an image that nothing finds.
    """
    features = torch.zeros(batches.image_count, texts.shape[1])
    for batch in batches.images():
        real = batch["index"] >= 0
        index, images = batch["index"][real], batch["images"][real].to(encoder.device)
        if not len(index):
            continue
        if shares is None:
            rows = encoder(images=images)["image_features"]
        else:
            given = GivenBelief()
            given.shares = shares[index]
            with believing(encoder.model, given):
                rows = encoder(images=images)["image_features"]
        features[index] = rows.float().cpu()
    encoder.check_finite(features)
    return query_hits(features, texts, torch.as_tensor(batches.text_image))


def mean_draws(hits: Hits, images: int, config: BeliefTruthConfig) -> Any:
    """Returns mean recall on each resample of the images, (resamples,)."""
    return resample(*image_sums(hits, images), config.bootstrap, config.seed).mean(1)
