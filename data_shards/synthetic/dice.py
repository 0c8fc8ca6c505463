"""Short functions for random draws, which keep the scene functions readable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Rng = np.random.Generator


def generator(*entropy: int) -> Rng:
    """Returns a generator that depends only on the given non-negative integers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(entropy))))


def pick(rng: Rng, options: Sequence[T]) -> T:
    """Returns one of the options; all are equally likely."""
    return options[int(rng.random() * len(options))]


def between(rng: Rng, low: float, high: float) -> float:
    """Returns a number drawn uniformly from low to high."""
    return low + (high - low) * float(rng.random())


def count(rng: Rng, low: int, high: int) -> int:
    """Returns an integer from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def chance(rng: Rng, share: float) -> bool:
    """Returns True with the given probability."""
    return float(rng.random()) < share


def shuffled(rng: Rng, items: Sequence[T]) -> list[T]:
    """Returns the items in a random order."""
    return [items[i] for i in rng.permutation(len(items))]
