"""Small draws from one generator: what the scene functions read best with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Rng = np.random.Generator


def generator(*entropy: int) -> Rng:
    """Return a generator that depends on the given non-negative integers and on nothing else."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(entropy))))


def pick(rng: Rng, options: Sequence[T]) -> T:
    """Return one of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def between(rng: Rng, low: float, high: float) -> float:
    """Return a number drawn uniformly from low to high."""
    return low + (high - low) * float(rng.random())


def count(rng: Rng, low: int, high: int) -> int:
    """Return an integer from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def chance(rng: Rng, share: float) -> bool:
    """Return True in the given share of calls."""
    return float(rng.random()) < share


def shuffled(rng: Rng, items: Sequence[T]) -> list[T]:
    """Return the items in a random order."""
    return [items[i] for i in rng.permutation(len(items))]
