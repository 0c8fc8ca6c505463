"""Recall of cross-modal retrieval by the field's protocol, and its exact value under chance.

    metrics = retrieval_metrics(image_features, text_features, text_to_image_index)
    {"i2t_r1": 8.6, "i2t_r5": 27.3, ..., "t2i_r10": 45.1, "mean_recall": 27.2}        # percent

Image to text (i2t): an image is answered by the best-ranked of its captions. Text to image (t2i): a caption is answered
by its one image. Ties count against the model (pessimistic rank): features that are all the same score 0, not 100.
Any number of captions per image; an image without a caption is no query, but still stands among the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CELLS = 1 << 22  # similarities held at once: 32 MiB of float64
TIE = 1e-12  # below what float32 features can tell apart, above the rounding of float64 products


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Percent of the queries whose 1-based rank is at most k. ``nan`` without queries."""
    return 100.0 * (ranks <= k).double().mean().item()


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image_index: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recalls in both directions and their mean, percent.

    Args:
        image_features: (I, d) L2-normalised
        text_features: (T, d) L2-normalised
        text_to_image_index: (T,) row of each text's image
        ks: the k of recall@k
    Raises:
        ValueError: an index outside the images, or shapes that do not match
    """
    index = torch.as_tensor(text_to_image_index, device=image_features.device).long()
    check(image_features, text_features, index)
    images, texts = image_features.double(), text_features.double().to(image_features.device)
    found = {
        "i2t": image_to_text_ranks(images, texts, index),
        "t2i": text_to_image_ranks(images, texts, index),
    }
    metrics = {f"{way}_r{k}": recall_at_k(ranks, k) for way, ranks in found.items() for k in ks}
    return with_mean(metrics)


def image_to_text_ranks(images: Tensor, texts: Tensor, index: Tensor) -> Tensor:
    """Rank of the best caption of each image that has one: 1 + captions of other images that are as similar."""
    queries = index.unique()
    ranks = []
    for part in queries.split(max(1, CELLS // len(texts))):
        similarity = images[part] @ texts.T
        own = index[None, :] == part[:, None]
        best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((similarity >= best - TIE) & ~own).sum(1))
    return torch.cat(ranks)


def text_to_image_ranks(images: Tensor, texts: Tensor, index: Tensor) -> Tensor:
    """Rank of the image of each text: 1 + other images that are as similar."""
    ranks = []
    size = max(1, CELLS // len(images))
    for part, target in zip(texts.split(size), index.split(size), strict=True):
        similarity = part @ images.T
        own = similarity.gather(1, target[:, None])
        ranks.append((similarity >= own - TIE).sum(1))  # the image itself is the 1
    return torch.cat(ranks)


def chance(text_to_image_index: Tensor, ks: Sequence[int] = (1, 5, 10), images: int | None = None) -> dict[str, float]:
    """The expected recalls of a random ranking, exactly.

    i2t: 1 - C(T - c, k) / C(T, k), the chance that k of T captions drawn without replacement hold one of the c that are
    right, mean over images. t2i: k / I.

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


def check(images: Tensor, texts: Tensor, index: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"features must be (I, d) and (T, d), not {tuple(images.shape)} and {tuple(texts.shape)}")
    if len(index) != len(texts):
        raise ValueError(f"text_to_image_index has {len(index)} entries for {len(texts)} texts")
    if len(texts) == 0 or int(index.min()) < 0 or int(index.max()) >= len(images):
        raise ValueError(f"text_to_image_index must name rows of the {len(images)} images, and at least one")
