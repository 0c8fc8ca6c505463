"""Pairs of images and captions, which of them are still there, and which rule dropped the others.

pairs = list_pairs([["a dock", "boats"], ["a field"]])
pairs.drop("too few words", {1: "1 words"})       # the pair "boats"
pairs.drop_images("near duplicate", {1: "..."})   # all pairs of the second image
pairs.rules                                       # {"too few words": 1, "near duplicate": 1}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray


@dataclass
class Pairs:
    """T pairs of I samples, and why pairs were dropped.

    Args:
        captions: (T,) texts
        owner: (T,) sample of each pair, ascending
        images: number of samples
        rules: rule -> number of pairs that it dropped, in the order of the rules
        why: pair -> (rule, detail)
        similarity: (T,) cosines, None without a model
    """

    captions: list[str]
    owner: NDArray[np.int64]
    images: int
    rules: dict[str, int] = field(default_factory=dict)
    why: dict[int, tuple[str, str]] = field(default_factory=dict)
    similarity: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        self.kept = np.ones(len(self.captions), bool)

    @property
    def kept_images(self) -> NDArray[np.bool_]:
        """(I,) the samples that still have a pair."""
        found = np.zeros(self.images, bool)
        found[self.owner[self.kept]] = True
        return found

    def drop(self, rule: str, details: dict[int, str]) -> None:
        """Drops the pairs that ``details`` names, unless an earlier rule has, and counts them."""
        fresh = {pair: detail for pair, detail in details.items() if self.kept[pair]}
        self.rules[rule] = self.rules.get(rule, 0) + len(fresh)
        self.why |= {pair: (rule, detail) for pair, detail in fresh.items()}
        self.kept[list(fresh)] = False

    def drop_images(self, rule: str, details: dict[int, str]) -> None:
        """Drops all pairs of the samples that ``details`` names."""
        gone = np.isin(self.owner, list(details))
        self.drop(rule, {pair: details[int(self.owner[pair])] for pair in np.nonzero(gone)[0].tolist()})


def list_pairs(texts: Sequence[Sequence[str]]) -> Pairs:
    """Returns the pairs of samples with these captions."""
    counts = [len(captions) for captions in texts]
    return Pairs(list(chain.from_iterable(texts)), np.repeat(np.arange(len(texts)), counts), len(texts))
