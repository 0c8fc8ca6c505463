"""Keeps decoded samples in memory, so that later epochs neither read nor decode them.

    kept = KeptSamples(limit=2 * 10**9)
    kept.add(41, DecodedSample(pixels, texts, label))
    kept.get(41)                                      # the same object; None if it is not kept

It is for small sets whose features are remembered (``model.vision.remember``), because then decoding is most of a
step's time. The first samples that fit stay, and nothing is thrown out. An epoch visits each sample once, so a cache
that throws out the oldest sample would throw out each sample just before its next use.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

RECORD_BYTES = 400  # of an entry beside its pixels and texts: objects, list, slots of the dictionary


@dataclass(frozen=True)
class DecodedSample:
    """A sample before its augmentation.

    Args:
        pixels: uint8 (3, S, S), resized; with a mask, if the training reads masks, (4, S, S)
        texts: its captions; empty without a tokenizer
        label: label id, -1 for none
        boxes: float32 (n, 4), if the training reads boxes
    """

    pixels: NDArray[np.uint8]
    texts: list[str]
    label: int
    boxes: NDArray[np.float32] | None = None

    @property
    def bytes(self) -> int:
        boxes = 0 if self.boxes is None else self.boxes.nbytes
        return self.pixels.nbytes + boxes + sum(map(sys.getsizeof, self.texts)) + RECORD_BYTES


class KeptSamples:
    """Decoded samples by index, of at most ``limit`` bytes together. Each process has its own."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._samples: dict[int, DecodedSample] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, index: int) -> bool:
        return index in self._samples

    def get(self, index: int) -> DecodedSample | None:
        """Returns a kept sample. Its pixels must not be changed."""
        return self._samples.get(index)

    def add(self, index: int, sample: DecodedSample) -> None:
        """Keeps a sample that is not kept yet, if it fits into the limit."""
        if self.limit and self.bytes + sample.bytes <= self.limit:
            own = replace(sample, pixels=np.ascontiguousarray(sample.pixels))
            own.pixels.setflags(write=False)
            self._samples[index] = own
            self.bytes += own.bytes

    def __getstate__(self) -> dict[str, int]:
        """Leaves out the samples, because a worker process keeps its own."""
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]
