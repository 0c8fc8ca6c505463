"""Wrong captions and wrong labels on purpose: how much semantic noise does a training bear?

    noise = Noise(seed=0, samples=105, caption_share=0.2, label_share=0.1)
    noise.caption_source(41)      # 17: sample 41 gets the captions of sample 17; itself where it is left alone
    noise.label(41, 3, 21)        # 8: class 3 of 21 became class 8; 3 where it is left alone

A keyed permutation puts the samples in a random order. The first ``round(share * samples)`` are noisy, and each of them
gets the captions of the next, the last those of the first: exactly the share is swapped, no caption is lost or doubled,
and what is wrong at 10 % is wrong at 20 % too. It is a function of (seed, sample index) alone, the same in every epoch,
for any number of ranks and workers and after a resume, as noise in a real corpus is; it takes no memory a sample.
"""

from __future__ import annotations

from priorclip.data_shards.order.hashing import hash_integers

CAPTION_NOISE, LABEL_NOISE, CLASS = 7, 8, 9
ROUNDS = 6


class KeyedPermutation:
    """A permutation of 0..count-1 that is computed in both directions and never stored.

    A Feistel network of ROUNDS rounds on the smallest even number of bits that holds ``count``; numbers that fall
    outside are sent through again until they do not (cycle walking: Black and Rogaway, CT-RSA 2002), four times at most
    on average.
    """

    def __init__(self, key: int, count: int) -> None:
        self.key, self.count = key, count
        self.half = max(1, -(-max(count - 1, 1).bit_length() // 2))

    def place(self, sample: int) -> int:
        """Where a sample stands in the order."""
        return self._walk(sample, range(ROUNDS))

    def sample(self, place: int) -> int:
        """Which sample stands there: the inverse of ``place``."""
        return self._swap(self._walk(self._swap(place), range(ROUNDS - 1, -1, -1), swapped=True))

    def _walk(self, number: int, rounds: range, swapped: bool = False) -> int:
        while True:
            number = self._network(number, rounds)
            if (self._swap(number) if swapped else number) < self.count:
                return number

    def _network(self, number: int, rounds: range) -> int:
        mask = (1 << self.half) - 1
        left, right = number >> self.half, number & mask
        for turn in rounds:
            left, right = right, left ^ (hash_integers(self.key, turn, right) & mask)
        return left << self.half | right

    def _swap(self, number: int) -> int:
        return (number & ((1 << self.half) - 1)) << self.half | number >> self.half


class SemanticNoise:
    """Which samples of a set are noisy, and what they become.

    Args:
        seed: of the run
        samples: in the set
        caption_share: of the samples that get the captions of another one
        label_share: of the samples that get another class
    """

    def __init__(self, seed: int, samples: int, caption_share: float = 0.0, label_share: float = 0.0) -> None:
        self.seed = seed
        self.captions, self.labels = (
            KeyedPermutation(hash_integers(seed, what), samples) for what in (CAPTION_NOISE, LABEL_NOISE)
        )
        swapped = round(caption_share * samples)
        self.swapped = swapped if swapped > 1 else 0  # one alone has nobody to swap with
        self.relabelled = round(label_share * samples)

    def caption_source(self, sample: int) -> int:
        """The sample whose captions this one gets."""
        if not self.swapped:
            return sample
        place = self.captions.place(sample)
        return self.captions.sample((place + 1) % self.swapped) if place < self.swapped else sample

    def label(self, sample: int, label: int, classes: int) -> int:
        """The class that this sample gets instead of ``label``; -1, no label, stays -1."""
        if not self.relabelled or label < 0 or classes < 2 or self.labels.place(sample) >= self.relabelled:
            return label
        return (label + 1 + hash_integers(self.seed, CLASS, sample) % (classes - 1)) % classes
