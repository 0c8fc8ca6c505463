"""Recall of the whole test set, with intervals, and of each scene.

report = recall_report(features, resamples=1000, seed=0)
report["mean_recall"], report["intervals"]["mean_recall"], report["classes"]["airport"]["mean_recall"]
"""

from __future__ import annotations

from typing import Any

import torch

from priorclip.model.bootstrap import bootstrap_intervals
from priorclip.model.recall import chance, query_hits, recall_figures
from priorclip.retrieval.features import Features


def recall_report(features: Features, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Returns recalls in percent, named as in model.recall, ``chance``, ``intervals`` (95 %), and ``classes``.

    ``classes`` has for each scene its ``images`` and ``captions``, and their recalls as queries to the whole test set.
    """
    hits = query_hits(features.images, features.texts, features.owner)
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


def hardest_negatives(features: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns for each image (I,): its most similar wrong text, that similarity, and that of its best own text.

    The own similarity is NaN if an image has no text. The wrong similarity is -inf if there is no wrong text.
    """
    size = max(1, (1 << 22) // max(1, len(features.texts)))
    rows = torch.arange(len(features.images))
    wrong, wrong_scores, own_scores = [], [], []
    for part in rows.split(size):
        similarity = features.images[part] @ features.texts.T
        is_own = features.owner[None, :] == part[:, None]
        own_scores.append(similarity.masked_fill(~is_own, -torch.inf).amax(1))
        best = similarity.masked_fill(is_own, -torch.inf).max(1)
        wrong.append(best.indices)
        wrong_scores.append(best.values)
    own = torch.cat(own_scores)
    return torch.cat(wrong), torch.cat(wrong_scores), own.masked_fill(own == -torch.inf, torch.nan)
