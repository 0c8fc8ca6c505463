"""Which sample is at which position in an epoch of one corpus, or of several corpora with weights.

    corpus   samples  weight   in an epoch          passes
    a        1000     1        1000                 0 | 1 | 2 | ...               each sample once an epoch
    b        400      2.5      1000                 0 1 2/ | /2 3 4 | ...         each twice or three times
    c        600      1/2      300                  0/ | /0 | 1/ | /1             each in one of two epochs

A corpus of n samples and weight w has q = w n samples in each epoch, rounded half up. Its passes follow each other
across epochs, and each pass has its own order (epoch_order.py): epoch e takes places e q to (e + 1) q - 1 of this
endless sequence. So each pass has each sample exactly once. Over any number of epochs, the counts of two samples of a
corpus differ by at most one.

Corpora alternate: the first t positions of an epoch hold t q / N samples of each corpus, with an error of at most
(corpora + 1) / 2, where N is the sum of all q. Then the positions of each block of 64 are permuted by (seed, epoch,
block); otherwise every second rank could see only one corpus. Global batches that are a multiple of 64 keep this bound;
others can differ by the content of the two blocks that they cut. All of it is integer arithmetic on (seed, epoch,
position), so any position is computed directly, and no rounding errors add up.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.order.epoch_order import EpochOrder
from priorclip.data_shards.order.hashing import hash_integers, permutation
from priorclip.data_shards.order.keyed_order import KeyedOrder

CORPUS, TURNS = 5, 6
TURN_BLOCK = 64
BLOCKS_KEPT = 64
PASSES_KEPT = 2  # of each corpus: prefetching reaches into the next pass


@dataclass(frozen=True)
class MixturePart:
    """A corpus of a mixture: samples of each of its shards, and its weight, the passes in an epoch."""

    sizes: Sequence[int]
    weight: Fraction = Fraction(1)
    name: str = ""

    @cached_property  # it is read twice for each sample of a run, and there can be 200,000 shards
    def samples(self) -> int:
        return sum(self.sizes)

    @cached_property
    def quota(self) -> int:
        """Samples in an epoch: weight times samples, rounded half up."""
        return int(self.weight * self.samples + Fraction(1, 2))


class Draw(NamedTuple):
    """The sample at a position, with its corpus and the number of the corpus's pass."""

    corpus: int
    pass_number: int
    sample: int


class Mixture:
    """Maps (epoch, position) to a sample. A single corpus of weight 1 has the order of EpochOrder.

    Args:
        parts: the corpora; sample indices count through all corpora, in this order
        seed: seed of the run
        block_size, window_blocks: see EpochOrder
        keyed: take KeyedOrder, which needs no memory, in place of EpochOrder

    Attributes:
        samples: positions in an epoch, the same for every epoch

    Raises:
        ValueError: the weight of a corpus is so small that an epoch has none of its samples
    """

    def __init__(
        self, parts: Sequence[MixturePart], seed: int, block_size: int, window_blocks: int, keyed: bool = False
    ) -> None:
        self.parts, self.seed, self.keyed = list(parts), seed, keyed
        self.quotas = [part.quota for part in self.parts]
        for part, quota in zip(self.parts, self.quotas, strict=True):
            if quota < 1:
                raise ValueError(
                    f"weight {part.weight} of {part.name or 'a corpus'} gives no sample in an epoch, because it has "
                    f"{part.samples} samples: raise the weight or remove the corpus"
                )
        self.samples = sum(self.quotas)
        self.starts = [sum(part.samples for part in self.parts[:number]) for number in range(len(self.parts))]
        self._largest_first = sorted(range(len(self.parts)), key=lambda number: -self.quotas[number])
        self._shape = block_size, window_blocks
        self._orders: OrderedDict[tuple[int, int, bool], EpochOrder | KeyedOrder] = OrderedDict()
        self._turns: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def draw(self, epoch: int, position: int) -> Draw:
        """Returns the sample at a position. Raises IndexError for a position outside the epoch."""
        return self.draws([(epoch, position)])[0]

    def draws(self, positions: Sequence[tuple[int, int]]) -> list[Draw]:
        """Returns the sample at each (epoch, position). Raises IndexError for a position outside its epoch."""
        places = [self._place(epoch, position) for epoch, position in positions]
        rows_of: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (corpus, pass_number, _) in enumerate(places):
            rows_of[corpus, pass_number].append(row)
        samples = np.empty(len(places), np.int64)
        for (corpus, pass_number), rows in rows_of.items():
            of_pass = np.array([places[row][2] for row in rows], np.int64)
            samples[rows] = self.starts[corpus] + self._order(corpus, pass_number).samples(of_pass)
        pairs = zip(places, samples.tolist(), strict=True)
        return [Draw(corpus, pass_number, sample) for (corpus, pass_number, _), sample in pairs]

    def _place(self, epoch: int, position: int) -> tuple[int, int, int]:
        """Returns the corpus at a position, the number of its pass and the place in the pass."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} is outside the epoch's {self.samples} samples")
        corpus, turn = (0, position) if len(self.parts) == 1 else self._turn(self._permuted(epoch, position))
        return corpus, *divmod(epoch * self.quotas[corpus] + turn, self.parts[corpus].samples)

    def substitute(self, corpus: int, number: int) -> int:
        """Returns a sample of a corpus for any number, to replace a bad one."""
        return self.starts[corpus] + number % self.parts[corpus].samples

    def _turn(self, place: int) -> tuple[int, int]:
        """Maps a place in the regular alternation to (corpus, number of its samples before this place).

        The largest corpus gets its rounded share of the first ``place`` places, the next one its share of the rest, and
        so on. No count decreases, so from one place to the next exactly one count grows.
        """
        before, after, rest = place, place + 1, self.samples
        for corpus in self._largest_first:
            quota = self.quotas[corpus]
            taken, then = (2 * before * quota + rest) // (2 * rest), (2 * after * quota + rest) // (2 * rest)
            if then > taken:
                return corpus, taken
            before, after, rest = before - taken, after - then, rest - quota
        raise AssertionError("the last corpus takes the rest")

    def _permuted(self, epoch: int, position: int) -> int:
        block, place = divmod(position, TURN_BLOCK)
        key = epoch, block
        if key not in self._turns:
            length = min(TURN_BLOCK, self.samples - block * TURN_BLOCK)
            self._turns[key] = permutation(hash_integers(self.seed, epoch, TURNS, block), length)
            if len(self._turns) > BLOCKS_KEPT:
                self._turns.popitem(last=False)
        return block * TURN_BLOCK + int(self._turns[key][place])

    def _order(self, corpus: int, pass_number: int) -> EpochOrder | KeyedOrder:
        key = corpus, pass_number, self.keyed
        if key not in self._orders:
            seed = self.seed if len(self.parts) == 1 else hash_integers(self.seed, CORPUS, corpus)
            part = self.parts[corpus]
            if self.keyed:
                self._orders[key] = KeyedOrder(part.samples, seed, pass_number, *self._shape)
            else:
                self._orders[key] = EpochOrder(part.sizes, seed, pass_number, *self._shape)
            if len(self._orders) > PASSES_KEPT * len(self.parts):
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]


@dataclass(frozen=True)
class MixedOrder:
    """One epoch of a mixture with the interface of EpochOrder: ``order[position]`` is a sample index."""

    mixture: Mixture
    epoch: int

    def __len__(self) -> int:
        return self.mixture.samples

    def __getitem__(self, position: int) -> int:
        return self.mixture.draw(self.epoch, position).sample
