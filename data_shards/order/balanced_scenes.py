"""Each scene as often as any other in an epoch, for ``data.balance: scenes``: the scenes are the corpora of a mixture.

    samples   0 1 2 3 4 5 6 7            scenes  a b a a a c a a
    sorted    0 2 3 4 6 7 | 1 | 5        places 0 .. 7 of a mixture of three corpora of 6, 1 and 1 samples
    weights   8/18, 8/3, 8/3             each scene has 8/3 samples in an epoch, so 3

The contract of the order holds, because it is that of a mixture (mixture.py): any number of ranks, any resume, and two
samples of one scene occur as often as each other, but for one. A bad sample is replaced by another of its scene.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.mixture import MixturePart


class BalancedScenes:
    """The samples sorted by scene.

    Args:
        scenes: scene of each sample, a number from 0 on
        names: names of the scenes, for messages
    """

    def __init__(self, scenes: Sequence[int] | NDArray[np.int64], names: Sequence[str]) -> None:
        numbers = np.asarray(scenes, dtype=np.int64)
        self._samples = np.argsort(numbers, kind="stable")
        counts = np.bincount(numbers, minlength=len(names))
        self._sizes = [(name, int(count)) for name, count in zip(names, counts, strict=True) if count]

    def locate(self, place: int) -> int:
        """Returns the sample at a place of the sorted order."""
        return int(self._samples[place])

    def parts(self, weight: Fraction) -> list[MixturePart]:
        """Returns the scenes as corpora that share ``weight`` passes of all samples."""
        each = weight * len(self._samples) / len(self._sizes)
        return [MixturePart([size], each / size, f"scene '{name}'") for name, size in self._sizes]

    @property
    def fingerprint(self) -> str:
        """A hash of the sorted order, which decides that of an epoch."""
        text = self._samples.tobytes() + repr([size for _, size in self._sizes]).encode()
        return hashlib.sha256(text).hexdigest()[:16]
