"""Semantic duplicates: images whose embeddings are nearly equal, for instance two photographs of one place.

    features a, b, c with a.b = 0.97, b.c = 0.97, a.c = 0.90; threshold 0.95
    semantic_duplicates(features, 0.95)   ->   {1: (0, 0.97)}      b is near a, and c stays: b is gone already

The first image of several stays, as with near duplicates by hash. faiss compares up to 50,000 images exactly. More are
parted into cells, and an image is compared with those of the 32 nearest cells, so a few duplicates can be missed.
The method is that of SemDeDup (Abbas et al. 2023, arXiv 2303.09540).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.common.progress import Progress

EXACT = 50_000  # images that are compared with all others
CELLS_PER_ROOT, TRAINING_PER_CELL, PROBED = 4, 64, 32
BLOCK = 1024  # images at a time


def check_faiss() -> None:
    """Raises ValueError if faiss is not installed."""
    if find_spec("faiss") is None:
        raise ValueError("--semantic_duplicates needs faiss: pip install 'priorclip-pretraining[curate]'")


def semantic_duplicates(
    features: NDArray[np.float32], threshold: float, exact: int = EXACT
) -> dict[int, tuple[int, float]]:
    """Maps each duplicate to (the nearest earlier image that stays, their cosine).

    Args:
        features: (N, d), each of length 1
        threshold: cosine from which two images are duplicates
        exact: up to this many images are compared with all others
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    gone: dict[int, tuple[int, float]] = {}
    if len(features) < 2:
        return gone
    index = build_index(features, exact)
    with Progress(len(features), "semantic duplicates", "img") as progress:
        for start in range(0, len(features), BLOCK):
            block = features[start : start + BLOCK]
            limits, cosines, others = index.range_search(block, float(np.nextafter(threshold, -1, dtype=np.float32)))
            for row in range(len(block)):
                found = slice(int(limits[row]), int(limits[row + 1]))
                near = [
                    (cosine, -other)
                    for cosine, other in zip(cosines[found].tolist(), others[found].tolist(), strict=True)
                    if other < start + row and other not in gone
                ]
                if near:
                    cosine, other = max(near)
                    gone[start + row] = -other, cosine
            progress.update(len(block))
    return gone


def build_index(features: NDArray[np.float32], exact: int) -> Any:
    """Returns faiss's index of the features by their product; in cells of float16 if there are more than ``exact``."""
    import faiss

    count, width = features.shape
    index: Any = faiss.IndexFlatIP(width)
    if count > exact:
        cells = max(1, int(CELLS_PER_ROOT * count**0.5))
        index = faiss.IndexIVFScalarQuantizer(
            index, width, cells, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        chosen = np.random.default_rng(0).permutation(count)[: TRAINING_PER_CELL * cells]
        index.train(features[np.sort(chosen)])
        index.nprobe = min(cells, PROBED)
    index.add(features)
    return index
