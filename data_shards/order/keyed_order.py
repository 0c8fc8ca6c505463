"""The order of an epoch without memory, for corpora of hundreds of millions of samples: ``data.order: keyed``.

    samples     0 1 2 3 4 5 6 7 8 9 10              of all shards, one after the other
    blocks      [0 1 2][3 4 5][6 7 8][9 10]         block_size samples; the last can be shorter
    shuffled    [6 7 8][9 10][0 1 2][3 4 5]         by (seed, epoch)
    windows     {[6 7 8][9 10]} {[0 1 2][3 4 5]}    window_blocks blocks; the samples of a window are permuted

Both permutations are computed for a position and not stored (`keyed_permutation`), so an order of 2 billion samples
takes as much memory and time as one of 2,000. `epoch_order` stores one: 24 bytes a block in every decoding process.

It keeps the contract of that order: a function of (seed, epoch, samples) only, each sample once. It is another order,
so a run keeps the one that it began with. A block here can begin in one shard and end in the next.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.hashing import hash_integers
from priorclip.data_shards.order.keyed_permutation import KeyedPermutation

BLOCKS, WINDOW = 10, 11

Number = TypeVar("Number", int, NDArray[np.int64])


class KeyedOrder:
    """Maps positions in the epoch to sample indices, as `EpochOrder` does.

    Args:
        samples: number of samples
        seed: seed of the run
        epoch: 0-based
        block_size: samples in a block
        window_blocks: blocks in a window
    """

    def __init__(self, samples: int, seed: int, epoch: int, block_size: int, window_blocks: int) -> None:
        if block_size < 1 or window_blocks < 1:
            raise ValueError(f"block_size {block_size} and window_blocks {window_blocks} must be at least 1")
        self._size, self._block, self._window_blocks = samples, block_size, window_blocks
        blocks = -(-samples // block_size)
        self._blocks = KeyedPermutation(hash_integers(seed, epoch, BLOCKS), blocks)
        self._key = hash_integers(seed, epoch, WINDOW)
        self._windows = -(-blocks // window_blocks)
        # The last block lacks some samples. Its place in the shuffled order is the only irregular one.
        self._lacking = blocks * block_size - samples
        self._short = self._blocks.place(blocks - 1) if blocks else 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: int) -> int:
        return int(self.samples(np.array([position]))[0])

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sample index at each position (n,). Raises IndexError for a position outside the epoch."""
        for position in (positions.min(), positions.max()) if len(positions) else ():
            if not 0 <= position < self._size:
                raise IndexError(f"position {position} is outside the epoch's {self._size} samples")
        windows = np.minimum(positions // (self._block * self._window_blocks), max(self._windows - 1, 0))
        windows += (windows + 1 < self._windows) & (positions >= self._start((windows + 1) * self._window_blocks))
        found = np.empty(len(positions), np.int64)
        for window in np.unique(windows):
            inside = windows == window
            found[inside] = self._samples_of(int(window), positions[inside])
        return found

    def _samples_of(self, window: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sample at each of some positions that lie in one window."""
        first = window * self._window_blocks
        start = int(self._start(first))
        end = self._size if window == self._windows - 1 else int(self._start(first + self._window_blocks))
        places = start + KeyedPermutation(hash_integers(self._key, window), end - start).samples(positions - start)
        places[places >= self._start(self._short + 1)] += self._lacking  # as if every block were whole
        block, number = np.divmod(places, self._block)
        return self._blocks.samples(block) * self._block + number

    def _start(self, block: Number) -> Number:
        """Returns the first position of a block in the shuffled order."""
        return block * self._block - (block > self._short) * self._lacking
