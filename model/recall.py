"""Recall of cross-modal retrieval by the usual protocol, and its exact value for a random ranking.

    metrics = retrieval_metrics(image_features, text_features, text_to_image_index)
    {"i2t_r1": 8.6, "i2t_r5": 27.3, ..., "t2i_r10": 45.1, "mean_recall": 27.2}        # percent

Image to text (i2t): the best-ranked caption of an image counts. Text to image (t2i): a caption has one image. Ties are
broken at random, and the result is the exact expectation: equal captions of two images favour neither, and features
that are all equal score exactly `chance`, not 0 or 100. An image can have any number of captions. An image without a
caption is no query, but it is a candidate for texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from priorclip.model.bootstrap import Hits

KS = (1, 5, 10)
SIDE = 1 << 10  # images and texts in a block: 8 MiB of float64 similarities
TIE = 1e-12  # below the resolution of float32 features, above the rounding of float64 products


class Standing(NamedTuple):
    """Ranks of the right answers of each query, (Q,) integers each."""

    above: Tensor  # wrong answers more similar than the best right one
    tied: Tensor  # wrong answers as similar as the best right one
    right: Tensor  # right answers as similar as the best right one, including itself


def hit_probability(standing: Standing, k: int) -> Tensor:
    """Returns the probability that a right answer is among the first k, ties in random order, (Q,) float64.

    Of the n = tied + right equal answers, r = k - above are among the first k. The probability that none of these is
    right is C(tied, r) / C(n, r), which is the product over j < right of (n - r - j) / (n - j).
    """
    n = (standing.tied + standing.right).double()
    places = (k - standing.above).clamp(min=0).double()
    missed = torch.ones_like(n)
    for j in range(int(standing.right.max())):
        factor = (n - places - j).clamp(min=0) / (n - j).clamp(min=1)
        missed *= torch.where(j < standing.right, factor, 1.0)
    return 1 - missed


def recall_at_k(standing: Standing, k: int) -> float:
    """Returns the expected percentage of queries with a right answer among the first k."""
    return 100 * hit_probability(standing, k).mean().item()


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image_index: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Returns recalls in both directions and their mean, percent.

    Args:
        image_features: (I, d) L2-normalised
        text_features: (T, d) L2-normalised
        text_to_image_index: (T,) row of each text's image
        ks: the k of recall@k
    Raises:
        ValueError: an index is outside the images, or shapes do not match
    """
    return recall_figures(query_hits(image_features, text_features, text_to_image_index, ks))


def query_hits(
    image_features: Tensor, text_features: Tensor, text_to_image_index: Tensor, ks: Sequence[int] = KS
) -> Hits:
    """Returns for each figure the probability of success of each query, 0 to 1, and the row of each query's image.

    Arguments and errors as in ``retrieval_metrics``. The queries of i2t are the images that have a text.
    """
    found = standings(image_features, text_features, text_to_image_index)
    owner = torch.as_tensor(text_to_image_index).long()
    owners = {"i2t": owner.unique().cpu().numpy(), "t2i": owner.cpu().numpy()}
    return {
        f"{way}_r{k}": (hit_probability(standing, k).cpu().numpy(), owners[way])
        for way, standing in found.items()
        for k in ks
    }


def recall_figures(hits: Hits) -> dict[str, float]:
    """Returns each figure, the mean over its queries, and the mean of all figures, percent."""
    return with_mean({name: float(100 * values.mean()) for name, (values, _) in hits.items()})


def standings(image_features: Tensor, text_features: Tensor, text_to_image_index: Tensor) -> dict[str, Standing]:
    """Returns standings of both directions: ``i2t`` of the images that have a text, by row; ``t2i`` of each text.

    Arguments and errors as in ``retrieval_metrics``. Similarities are float64 in blocks of SIDE x SIDE. Each block
    serves both directions, because the similarity of each query with its best right answer is computed first.
    """
    index = torch.as_tensor(text_to_image_index, device=image_features.device).long()
    check_shapes(image_features, text_features, index)
    images, texts = image_features, text_features.to(image_features.device)
    own = torch.cat([(images[of].double() * part).sum(1) for of, part in zip(index.split(SIDE), texts.split(SIDE))])
    best = own.new_full((len(images),), torch.inf).scatter_reduce(0, index, own, "amax", include_self=False)
    right = torch.zeros_like(best, dtype=torch.long).index_add(0, index, (own >= best[index] - TIE).long())
    i2t = torch.zeros(2, len(images), dtype=torch.long, device=images.device)
    t2i = torch.zeros(2, len(texts), dtype=torch.long, device=images.device)
    for rows in torch.arange(len(images), device=images.device).split(SIDE):
        part = images[rows].double()
        for columns in torch.arange(len(texts), device=images.device).split(SIDE):
            similarity = part @ texts[columns].double().T
            count(similarity, best[rows, None], 1, i2t, rows)
            count(similarity, own[columns], 0, t2i, columns)
    queries = index.unique()
    return {
        "i2t": Standing(i2t[0, queries], (i2t[1] - right)[queries], right[queries]),
        "t2i": Standing(t2i[0], t2i[1] - 1, torch.ones_like(index)),
    }


def count(similarity: Tensor, bar: Tensor, axis: int, counts: Tensor, queries: Tensor) -> None:
    """Adds to counts (2, Q) how many similarities of each query are above its bar, and how many equal it."""
    above = (similarity > bar + TIE).sum(axis)
    counts[0, queries] += above
    counts[1, queries] += (similarity >= bar - TIE).sum(axis) - above


def chance(text_to_image_index: Tensor, ks: Sequence[int] = KS, images: int | None = None) -> dict[str, float]:
    """Returns the exact expected recalls of a random ranking, percent.

    i2t: 1 - C(T - c, k) / C(T, k), the probability that k of T captions drawn without replacement include one of the c
    right ones, mean over images. t2i: k / I.

    Args:
        text_to_image_index: (T,) row of each text's image
        ks: the k of recall@k
        images: number of images I; None: the highest index + 1
    """
    index = torch.as_tensor(text_to_image_index).long()
    total = len(index)
    images = int(index.max()) + 1 if images is None else images
    captions, how_many = index.unique(return_counts=True)[1].unique(return_counts=True)
    metrics: dict[str, float] = {}
    for k in ks:
        drawn = min(k, total)
        hits = [1 - math.comb(total - c, drawn) / math.comb(total, drawn) for c in captions.tolist()]
        weights = how_many.tolist()
        metrics[f"i2t_r{k}"] = 100 * sum(h * w for h, w in zip(hits, weights, strict=True)) / sum(weights)
    metrics |= {f"t2i_r{k}": 100 * min(k, images) / images for k in ks}
    return with_mean(metrics)


def with_mean(metrics: dict[str, float]) -> dict[str, float]:
    return metrics | {"mean_recall": sum(metrics.values()) / len(metrics)}


def check_shapes(images: Tensor, texts: Tensor, index: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"features must be (I, d) and (T, d), not {tuple(images.shape)} and {tuple(texts.shape)}")
    if len(index) != len(texts):
        raise ValueError(f"text_to_image_index has {len(index)} entries for {len(texts)} texts")
    if len(texts) == 0 or int(index.min()) < 0 or int(index.max()) >= len(images):
        raise ValueError(
            f"text_to_image_index must have at least one entry, and all must be rows of the {len(images)} images"
        )
