"""Which sample stands where in an epoch of one corpus, or of several with weights.

    corpus   samples  weight   in an epoch          passes
    a        1000     1        1000                 0 | 1 | 2 | ...               each sample once an epoch
    b        400      2.5      1000                 0 1 2/ | /2 3 4 | ...         each twice or three times
    c        600      1/2      300                  0/ | /0 | 1/ | /1             each in one of two epochs

A corpus of n samples and weight w has q = w n samples in every epoch, rounded half up. It runs through one pass after
the other, each an order of its own (data_shards.order), without regard to epochs: in epoch e through places e q to
(e + 1) q - 1 of that endless sequence. So each pass has each sample exactly once, and over e epochs no two samples of
a corpus differ by more than one in how often they were there.

Corpora take turns so that the first t positions of an epoch hold t q / N samples of each but for (corpora + 1) / 2 at
most, N being the sum of all q; then the positions of each block of 64 are permuted by (seed, epoch, block), lest every
second rank see one corpus only. Global batches of a multiple of 64 keep that bound; others may be off by what their two
cut blocks hold. All of it is integer arithmetic on (seed, epoch, position): nothing is walked, nothing drifts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.epoch_order import EpochOrder
from priorclip.data_shards.order.hashing import hash_integers, permutation

CORPUS, TURNS = 5, 6
TURN_BLOCK = 64
BLOCKS_KEPT = 64
PASSES_KEPT = 2  # of each corpus: prefetching crosses into the next


@dataclass(frozen=True)
class MixturePart:
    """A corpus as the mixture needs it: samples of each of its shards, and passes an epoch."""

    sizes: Sequence[int]
    weight: Fraction = Fraction(1)
    name: str = ""

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def quota(self) -> int:
        """Samples of it in an epoch: weight times samples, rounded half up."""
        return int(self.weight * self.samples + Fraction(1, 2))


class Draw(NamedTuple):
    """What stands at a position: a sample of a corpus, in the corpus's so many-th pass."""

    corpus: int
    passage: int
    sample: int


class Mixture:
    """(epoch, position) -> sample. One corpus of weight 1 is its epoch orders and nothing else.

    Args:
        parts: the corpora; the sample indices of one follow those of the one before
        seed: of the run
        block_size, window_blocks: see EpochOrder

    Attributes:
        samples: positions in an epoch, the same for every epoch

    Raises:
        ValueError: a weight so small that an epoch has no sample of the corpus
    """

    def __init__(self, parts: Sequence[MixturePart], seed: int, block_size: int, window_blocks: int) -> None:
        self.parts, self.seed = list(parts), seed
        self.quotas = [part.quota for part in self.parts]
        for part, quota in zip(self.parts, self.quotas, strict=True):
            if quota < 1:
                raise ValueError(
                    f"weight {part.weight} of {part.name or 'a corpus'} gives no sample an epoch, for it has "
                    f"{part.samples}: raise the weight or leave the corpus out"
                )
        self.samples = sum(self.quotas)
        self.starts = [sum(part.samples for part in self.parts[:number]) for number in range(len(self.parts))]
        self._largest_first = sorted(range(len(self.parts)), key=lambda number: -self.quotas[number])
        self._shape = block_size, window_blocks
        self._orders: OrderedDict[tuple[int, int], EpochOrder] = OrderedDict()
        self._turns: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def draw(self, epoch: int, position: int) -> Draw:
        """Raises IndexError for a position outside the epoch."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} is outside the epoch's {self.samples} samples")
        corpus, turn = (0, position) if len(self.parts) == 1 else self._turn(self._permuted(epoch, position))
        passage, place = divmod(epoch * self.quotas[corpus] + turn, self.parts[corpus].samples)
        return Draw(corpus, passage, self.starts[corpus] + self._order(corpus, passage)[place])

    def substitute(self, corpus: int, number: int) -> int:
        """A sample of a corpus for any number: what replaces a bad one."""
        return self.starts[corpus] + number % self.parts[corpus].samples

    def _turn(self, place: int) -> tuple[int, int]:
        """Place in the regular alternation -> (corpus, how many of it came before).

        The largest corpus takes its share of the first ``place`` places, rounded; the next its share of what is left
        by then, and so on. No count ever falls, so exactly one of them grows from one place to the next.
        """
        before, after, rest = place, place + 1, self.samples
        for corpus in self._largest_first:
            quota = self.quotas[corpus]
            taken, then = (2 * before * quota + rest) // (2 * rest), (2 * after * quota + rest) // (2 * rest)
            if then > taken:
                return corpus, taken
            before, after, rest = before - taken, after - then, rest - quota
        raise AssertionError("the last corpus takes all that is left")

    def _permuted(self, epoch: int, position: int) -> int:
        block, place = divmod(position, TURN_BLOCK)
        key = epoch, block
        if key not in self._turns:
            length = min(TURN_BLOCK, self.samples - block * TURN_BLOCK)
            self._turns[key] = permutation(hash_integers(self.seed, epoch, TURNS, block), length)
            if len(self._turns) > BLOCKS_KEPT:
                self._turns.popitem(last=False)
        return block * TURN_BLOCK + int(self._turns[key][place])

    def _order(self, corpus: int, passage: int) -> EpochOrder:
        key = corpus, passage
        if key not in self._orders:
            seed = self.seed if len(self.parts) == 1 else hash_integers(self.seed, CORPUS, corpus)
            self._orders[key] = EpochOrder(self.parts[corpus].sizes, seed, passage, *self._shape)
            if len(self._orders) > PASSES_KEPT * len(self.parts):
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]


@dataclass(frozen=True)
class MixedOrder:
    """One epoch of a mixture as EpochOrder has it: ``order[position]`` is a sample index."""

    mixture: Mixture
    epoch: int

    def __len__(self) -> int:
        return self.mixture.samples

    def __getitem__(self, position: int) -> int:
        return self.mixture.draw(self.epoch, position).sample
