"""95 % intervals of a recall, by a bootstrap over the images of the test set, each drawn with all its captions.

    bootstrap_intervals({"i2t_r1": (hits, image), ...}, images=452)
    # {"i2t_r1": (24.1, 31.9), ..., "mean_recall": (...)}
    interval(resample(sums, counts).mean(1) - resample(other_sums, counts).mean(1))     # of a paired difference

The captions of an image are not independent of each other, so the bootstrap draws images (a cluster bootstrap: Davison
and Hinkley, Bootstrap Methods and their Application, 1997). It draws queries only; each query is still compared with
the whole test set. The interval holds the middle 95 % of the resampled figures.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

LEVEL = 95.0
CELLS = 1 << 22  # counts (resamples x images) in memory at a time

Hits = Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]]


def bootstrap_intervals(
    hits: Hits, images: int, resamples: int = 1000, seed: int = 0, mean: str | None = "mean_recall"
) -> dict[str, tuple[float, float]]:
    """Returns percentile intervals of each figure in percent, and of the mean of all figures.

    Args:
        hits: for each figure: the success of each query (Q,), 0 to 1, and the image of each query (Q,)
        images: number of images
        resamples: more resamples give more stable intervals
        seed: of the draws
        mean: name of the mean of all figures; None leaves it out
    """
    figures = resample(*image_sums(hits, images), resamples, seed)
    if mean is not None:
        figures = np.concatenate([figures, figures.mean(1, keepdims=True)], axis=1)
    names = [*hits, *([mean] if mean is not None else [])]
    return {name: interval(drawn) for name, drawn in zip(names, figures.T, strict=True)}


def image_sums(hits: Hits, images: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the sum of each image's successes, and the number of its queries, each (figures, I)."""
    sums = np.stack([np.bincount(image, values, images) for values, image in hits.values()])
    counts = np.stack([np.bincount(image, minlength=images) for _, image in hits.values()])
    return sums.astype(np.float64), counts.astype(np.float64)


def resample(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Returns each figure in percent on images that are drawn with replacement, (resamples, figures).

    The drawn images depend only on their number and the seed. So two calls can be compared draw by draw.

    Args:
        sums: sum of the successes of each image's queries, (figures, I)
        counts: number of queries of each image, (figures, I)
        resamples, seed: as in ``bootstrap_intervals``
    """
    images, rng, draws = sums.shape[1], np.random.default_rng(seed), []
    for start in range(0, resamples, step := max(1, CELLS // images)):
        drawn = rng.multinomial(images, np.full(images, 1 / images), min(step, resamples - start)).astype(float)
        asked = drawn @ counts.T
        # NaN if a draw has no query of a figure
        draws.append(np.divide(100 * (drawn @ sums.T), asked, out=np.full_like(asked, np.nan), where=asked > 0))
    return np.concatenate(draws)


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the bounds of the middle 95 % of the draws (resamples,); NaN is left out."""
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(draws, [tail, 100 - tail])
    return float(low), float(high)
