"""Random numbers as a hash of integers: ``hash_integers(seed, epoch, sample)`` is the same everywhere and always.

It is SplitMix64 (Steele, Lea, Flood 2014), not a numpy generator: numpy may change its permutations between versions,
and the order of an epoch must stay the same if numpy is upgraded in the middle of a run.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


@overload
def hash_integers(*integers: int) -> int: ...


@overload
def hash_integers(first: int, second: int, third: NDArray[np.uint64], /) -> NDArray[np.uint64]: ...


def hash_integers(*integers: Any) -> Any:
    """Returns a 64-bit hash of the integers, in order. The last can be an array (n,) of them, then so is the hash."""
    state: Any = 0
    for value in integers:
        state = _finish((state ^ (value & MASK)) + GAMMA & MASK)
    return state


def hash_range(key: int, count: int) -> NDArray[np.uint64]:
    """Returns ``count`` 64-bit hashes; element i is the hash of key and i."""
    state = np.arange(count, dtype=np.uint64) * np.uint64(GAMMA) + np.uint64(key & MASK)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permutation(key: int, count: int) -> NDArray[np.int64]:
    """Returns a permutation of 0..count-1 that depends only on ``key``."""
    return np.argsort(hash_range(key, count), kind="stable")


def _finish(state: Any) -> Any:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)
