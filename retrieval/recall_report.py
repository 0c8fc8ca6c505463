"""Recall of features: all of the test set, with intervals, and scene by scene.

report = recall_report(features, resamples=1000, seed=0)
report["mean_recall"], report["intervals"]["mean_recall"], report["classes"]["airport"]["mean_recall"]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from priorclip.model.recall import chance, hit_probability, standings, with_mean
from priorclip.retrieval.bootstrap import bootstrap_intervals
from priorclip.retrieval.features import Features

KS = (1, 5, 10)

Hits = dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]


def recall_report(features: Features, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Recalls in percent as model.recall names them, ``chance``, ``intervals`` (95 %), and ``classes``, by scene.

    Of a scene: its ``images`` and ``captions``, and the recalls of those as queries to the whole test set.
    """
    hits = query_hits(features)
    report: dict[str, Any] = recall_figures(hits)
    report["chance"] = chance(features.owner, images=len(features.images))
    if resamples:
        report["intervals"] = bootstrap_intervals(hits, len(features.images), resamples, seed)
    report["classes"] = {}
    for label, name in enumerate(features.classes):
        of_class = (features.labels == label).numpy()
        part = {figure: (values[of_class[image]], image[of_class[image]]) for figure, (values, image) in hits.items()}
        if len(part["t2i_r1"][0]) and len(part["i2t_r1"][0]):
            counts = {"images": len(part["i2t_r1"][0]), "captions": len(part["t2i_r1"][0])}
            report["classes"][name] = {**counts, **recall_figures(part)}
    return report


def query_hits(features: Features) -> Hits:
    """By figure: the probability of success of each query, and the image of each query."""
    found = standings(features.images, features.texts, features.owner)
    owners = {"i2t": features.owner.unique(), "t2i": features.owner}
    return {f"{way}_r{k}": (hit_probability(found[way], k).numpy(), owners[way].numpy()) for way in found for k in KS}


def recall_figures(hits: Hits) -> dict[str, float]:
    return with_mean({name: float(100 * values.mean()) for name, (values, _) in hits.items()})


def hardest_negatives(features: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each image: the wrong text most like it, how alike (I,), and how alike its best own text is (I,).

    Where an image has no text its own similarity is nan; with no wrong text that of the wrong one is -inf.
    """
    size = max(1, (1 << 22) // max(1, len(features.texts)))
    rows = torch.arange(len(features.images))
    wrong, alike, own = [], [], []
    for part in rows.split(size):
        similarity = features.images[part] @ features.texts.T
        mine = features.owner[None, :] == part[:, None]
        own.append(similarity.masked_fill(~mine, -torch.inf).amax(1))
        best = similarity.masked_fill(mine, -torch.inf).max(1)
        wrong.append(best.indices)
        alike.append(best.values)
    right = torch.cat(own)
    return torch.cat(wrong), torch.cat(alike), right.masked_fill(right == -torch.inf, torch.nan)
