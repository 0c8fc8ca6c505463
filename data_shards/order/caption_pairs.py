"""Every (image, caption) pair as a place of an epoch, as in the code of PIR's authors (github.com/jaychempan/PIR).

    captions     2 1 3                 of images 0, 1, 2
    pairs        0 1 | 2 | 3 4 5       counted through all images
    pairs.locate(4)                    (2, 1): image 2, its caption 1

The order of an epoch then permutes pairs where it permuted images: Mixture and EpochOrder get the pairs of each shard
as its size. So the contract of the order holds for pairs. The pairs of an image are neighbours: they lie in the same
window of the shuffle, in random places of it. Memory is 8 bytes an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.mixture import MixturePart


class CaptionPairs:
    """The pairs of all images.

    Args:
        counts: captions of each image, at least 1 each
    """

    def __init__(self, counts: Sequence[int] | NDArray[np.int64]) -> None:
        self._ends = np.cumsum(counts, dtype=np.int64)
        if len(self._ends) and np.diff(self._ends, prepend=0).min() < 1:
            raise ValueError("an image has no caption: count it as one, so that the stream meets and reports it")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def images(self) -> int:
        return len(self._ends)

    def locate(self, pair: int) -> tuple[int, int]:
        """Returns the image of a pair and the number of its caption. Raises IndexError."""
        if not 0 <= pair < len(self):
            raise IndexError(f"pair {pair} is outside the {len(self)} pairs")
        image = int(self._ends.searchsorted(pair, side="right"))
        return image, pair - (int(self._ends[image - 1]) if image else 0)

    def parts(self, parts: Sequence[MixturePart]) -> list[MixturePart]:
        """Returns the corpora with the pairs of each shard in place of its images."""
        images = np.cumsum([0, *(size for part in parts for size in part.sizes)])
        pairs = np.diff(np.concatenate([[0], self._ends])[images]).tolist()
        ends = np.cumsum([len(part.sizes) for part in parts])
        return [replace(part, sizes=pairs[end - len(part.sizes) : end]) for part, end in zip(parts, ends, strict=True)]

    @property
    def fingerprint(self) -> str:
        """A hash of the counts, which decide the order of an epoch."""
        return hashlib.sha256(self._ends.tobytes()).hexdigest()[:16]
