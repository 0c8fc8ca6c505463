"""95 % intervals of a recall, by a bootstrap over the images of the test set, each drawn with all its captions.

    bootstrap_intervals({"i2t_r1": (hits, image), ...}, images=452)
    # {"i2t_r1": (24.1, 31.9), ..., "mean_recall": (...)}

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
    sums = np.stack([np.bincount(image, values, images) for values, image in hits.values()])  # (figures, I)
    counts = np.stack([np.bincount(image, minlength=images) for _, image in hits.values()]).astype(float)
    rng = np.random.default_rng(seed)
    draws = []
    for start in range(0, resamples, step := max(1, CELLS // images)):
        drawn = rng.multinomial(images, np.full(images, 1 / images), min(step, resamples - start)).astype(float)
        asked = drawn @ counts.T
        # NaN if a draw has no query of a figure
        draws.append(np.divide(100 * (drawn @ sums.T), asked, out=np.full_like(asked, np.nan), where=asked > 0))
    figures = np.concatenate(draws)  # (resamples, figures)
    if mean is not None:
        figures = np.concatenate([figures, figures.mean(1, keepdims=True)], axis=1)
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(figures, [tail, 100 - tail], axis=0)
    names = [*hits, *([mean] if mean is not None else [])]
    return {name: (float(one), float(other)) for name, one, other in zip(names, low, high, strict=True)}
