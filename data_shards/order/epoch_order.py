"""The order of an epoch: a function of (seed, epoch, shard sizes) only.

    shards      A A A A A A  B B B B  C C C          in the order of the manifest
    blocks      [A A][A A][A A] [B B][B B] [C C][C]  at most block_size samples, never across shards
    shuffled    [C][A A][B B] [B B][C C][A A][A A]   by (seed, epoch), from all shards
    windows     {[C][A A][B B]} {[B B][C C][A A]}... window_blocks blocks; the samples of a window are permuted

A global batch is a range of positions in this order, so that it is the same for any number of ranks and workers. The
blocks of a window come from all shards, so sorted shards (by class, by source) are mixed as well as others. Each sample
is one read. A window reads whole blocks of a shard, which caches can use. Memory is 24 bytes for each block, and 8
bytes for each sample of a few permuted windows: 6 MB for 5 million samples in blocks of 32. `keyed_order` needs none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.hashing import hash_integers, permutation

BLOCK_ORDER, WINDOW_ORDER = 1, 2
WINDOWS_KEPT = 4


class EpochOrder:
    """Maps a position in the epoch to a sample index: ``order[position]``, ``len(order)``. Each sample occurs once.

    Args:
        sizes: samples of each shard, in manifest order
        seed: seed of the run
        epoch: 0-based
        block_size: samples in a block
        window_blocks: blocks in a window
    """

    def __init__(self, sizes: Sequence[int], seed: int, epoch: int, block_size: int, window_blocks: int) -> None:
        if block_size < 1 or window_blocks < 1:
            raise ValueError(f"block_size {block_size} and window_blocks {window_blocks} must be at least 1")
        counts = np.asarray(sizes, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        self._key = hash_integers(seed, epoch, WINDOW_ORDER)
        blocks = -(-counts // block_size)  # of each shard; the last may be shorter
        shard = np.repeat(np.arange(len(counts)), blocks)
        number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        shuffled = permutation(hash_integers(seed, epoch, BLOCK_ORDER), len(shard))
        self._first = (starts[shard] + number * block_size)[shuffled]
        self._length = np.minimum(block_size, counts[shard] - number * block_size)[shuffled]
        self._window_blocks = window_blocks
        self._window_start = np.concatenate([[0], np.cumsum(self._length)])[:-1][::window_blocks]
        self._size = int(counts.sum())
        self._windows: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self._size:
            raise IndexError(f"position {position} is outside the epoch's {self._size} samples")
        window = int(self._window_start.searchsorted(position, side="right")) - 1
        return int(self.window(window)[position - self._window_start[window]])

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sample index at each position (n,)."""
        return np.array([self[int(position)] for position in positions], np.int64)

    @property
    def windows(self) -> int:
        """Number of windows. Their samples follow each other in the epoch."""
        return len(self._window_start)

    def window(self, window: int) -> NDArray[np.int64]:
        """Returns the permuted sample indices of a window. The last few windows are kept."""
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        blocks = slice(window * self._window_blocks, (window + 1) * self._window_blocks)
        first, length = self._first[blocks], self._length[blocks]
        offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        samples = np.repeat(first, length) + offset
        self._windows[window] = samples[permutation(hash_integers(self._key, window), len(samples))]
        if len(self._windows) > WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return self._windows[window]


def epoch_order(
    sizes: Sequence[int], seed: int, epoch: int, block_size: int = 32, window_blocks: int = 2048
) -> EpochOrder:
    """Returns the order of one epoch; see :class:`EpochOrder`."""
    return EpochOrder(sizes, seed, epoch, block_size, window_blocks)
