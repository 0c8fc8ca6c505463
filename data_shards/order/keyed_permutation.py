"""A permutation of any number of items that is computed and not stored.

order = KeyedPermutation(key=7, count=2_000_000_000)
order.place(41)                           # 1093374212
order.sample(1093374212)                  # 41
order.samples(np.array([5, 6, 7]))        # many at once, much faster each
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.hashing import hash_integers

ROUNDS = 6


class KeyedPermutation:
    """A permutation of 0..count-1 that is computed in both directions and not stored.

    It is a Feistel network of ROUNDS rounds on the smallest even number of bits that holds ``count``. A result that is
    too large goes through the network again (cycle walking: Black and Rogaway, CT-RSA 2002), at most four times on
    average.
    """

    def __init__(self, key: int, count: int) -> None:
        self.key, self.count = key, count
        self.half = max(1, -(-max(count - 1, 1).bit_length() // 2))

    def place(self, sample: int) -> int:
        """Returns the place of a sample in the order."""
        return self._walk(sample, range(ROUNDS))

    def sample(self, place: int) -> int:
        """Returns the sample at a place: the inverse of ``place``."""
        return self._swap(self._walk(self._swap(place), range(ROUNDS - 1, -1, -1), swapped=True))

    def samples(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sample at each place (n,), as ``sample`` does."""
        numbers = self._swap(places.astype(np.uint64))
        walking = np.arange(len(numbers))
        while len(walking):
            numbers[walking] = self._network(numbers[walking], range(ROUNDS - 1, -1, -1))
            walking = walking[self._swap(numbers[walking]) >= self.count]
        return self._swap(numbers).astype(np.int64)

    def _walk(self, number: int, rounds: range, swapped: bool = False) -> int:
        while True:
            number = self._network(number, rounds)
            if (self._swap(number) if swapped else number) < self.count:
                return number

    # The network takes one number, or an array of np.uint64.
    def _network(self, number: Any, rounds: range) -> Any:
        mask = (1 << self.half) - 1
        left, right = number >> self.half, number & mask
        for turn in rounds:
            left, right = right, left ^ (hash_integers(self.key, turn, right) & mask)
        return left << self.half | right

    def _swap(self, number: Any) -> Any:
        return (number & ((1 << self.half) - 1)) << self.half | number >> self.half
