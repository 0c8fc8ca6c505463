"""Gives samples wrong captions and labels on purpose, to measure how much semantic noise a training tolerates.

    noise = SemanticNoise(seed=0, samples=105, caption_share=0.2, label_share=0.1)
    noise.caption_source(41)      # 17: sample 41 gets the captions of sample 17; an unchanged sample gets 41
    noise.label(41, 3, 21)        # 8: class 3 of 21 became class 8; an unchanged sample keeps 3

A keyed permutation puts the samples in a random order. The first ``round(share * samples)`` are noisy. Each of them
gets the captions of the next one, and the last gets those of the first. So exactly this share is swapped, no caption is
lost or doubled, and samples that are wrong at 10 % are wrong at 20 % too. The noise depends only on (seed, sample
index): it is the same in every epoch, for any number of ranks and workers and after a resume, like the noise of a real
corpus. It takes no memory per sample.
"""

from __future__ import annotations

from priorclip.data_shards.order.hashing import hash_integers
from priorclip.data_shards.order.keyed_permutation import KeyedPermutation

CAPTION_NOISE, LABEL_NOISE, CLASS = 7, 8, 9


class SemanticNoise:
    """Decides which samples are noisy, and their wrong captions and labels.

    Args:
        seed: seed of the run
        samples: number of samples
        caption_share: share of the samples that get the captions of another one
        label_share: share of the samples that get another class
    """

    def __init__(self, seed: int, samples: int, caption_share: float = 0.0, label_share: float = 0.0) -> None:
        self.seed = seed
        self.captions, self.labels = (
            KeyedPermutation(hash_integers(seed, what), samples) for what in (CAPTION_NOISE, LABEL_NOISE)
        )
        swapped = round(caption_share * samples)
        self.swapped = swapped if swapped > 1 else 0  # a single sample has no partner
        self.relabelled = round(label_share * samples)

    def caption_source(self, sample: int) -> int:
        """Returns the sample whose captions this one gets."""
        if not self.swapped:
            return sample
        place = self.captions.place(sample)
        return self.captions.sample((place + 1) % self.swapped) if place < self.swapped else sample

    def label(self, sample: int, label: int, classes: int) -> int:
        """Returns the class of this sample: ``label`` or a wrong one. -1 (no label) stays -1."""
        if not self.relabelled or label < 0 or classes < 2 or self.labels.place(sample) >= self.relabelled:
            return label
        return (label + 1 + hash_integers(self.seed, CLASS, sample) % (classes - 1)) % classes
