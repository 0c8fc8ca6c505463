"""Counts over many samples in little memory. Parts are counted and merged; the number of workers changes nothing.

    part = count_samples(shards, [0, 1, ... 4095], options)      # one process, 4,096 samples
    total.merge(part)                                            # parts in the order of the samples

Each counted value has 64 bits: the hash of a word or caption, the first bytes of an image's recorded SHA-256, or width
and height. A sorted array of values and counts takes 12 bytes per different value; a dictionary takes 150. The text is
kept only for values that are frequent in a part, because a value that is frequent in all samples is frequent in a part.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import BadSample, Sample
from priorclip.data_shards.images.decode import open_image, upright_size
from priorclip.data_shards.shards import ShardSet

NAMED, SAMPLED, MAX_NAMES = 500, 100, 200_000  # texts kept per part, captions kept per part, texts kept in total
WORD = re.compile(r"[\w'-]+")
STOP_TEXT = """
    a about above after all along also among an and are around as at be been behind beside between both but by can each
    for from has have in into is it its lot lots many more most near next no not of off on one only or other out over
    own same several side sides situated some than that the their them there these they this those three to two under
    up very was were which while with
"""
STOP_WORDS = frozenset(STOP_TEXT.split())


@dataclass
class ValueCounts:
    """The number of times that each 64-bit value occurs. New parts wait until they are as long as the sorted array."""

    values: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    counts: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    waiting: list[tuple[NDArray[np.uint64], NDArray[np.uint32]]] = field(default_factory=list)

    def add(self, values: Iterable[int], counts: Iterable[int] | None = None) -> None:
        new = np.fromiter(values, np.uint64)
        numbers = np.ones(len(new), np.uint32) if counts is None else np.fromiter(counts, np.uint32)
        self.waiting.append((new, numbers))

    def merge(self, other: ValueCounts) -> None:
        other.join()
        self.waiting.append((other.values, other.counts))
        if sum(len(values) for values, _ in self.waiting) > len(self.values):
            self.join()

    def join(self) -> None:
        """Sorts all waiting parts into one array."""
        if not self.waiting:
            return
        values = np.concatenate([self.values, *(values for values, _ in self.waiting)])
        counts = np.concatenate([self.counts, *(counts for _, counts in self.waiting)])
        self.waiting.clear()
        order = np.argsort(values, kind="stable")
        values, counts = values[order], counts[order]
        first = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else order
        self.values = values[first]
        self.counts = np.add.reduceat(counts, first).astype(np.uint32) if len(values) else counts

    def ranked(self) -> NDArray[np.int64]:
        """Returns the indices of ``values`` by falling count, ties by value."""
        return np.lexsort((self.values, -self.counts.astype(np.int64)))


@dataclass(frozen=True)
class CountOptions:
    """Which captions to count; ``tokens`` returns the number of tokens of each text, None counts only words."""

    caption_field: str = "captions"
    tokens: Callable[[list[str]], list[int]] | None = None


@dataclass
class SampleCounts:
    """Counts over samples. ``names`` maps a hash to its text; ``sampled`` has the concepts of a few captions."""

    samples: int = 0
    captions: int = 0
    words: ValueCounts = field(default_factory=ValueCounts)
    bigrams: ValueCounts = field(default_factory=ValueCounts)
    texts: ValueCounts = field(default_factory=ValueCounts)
    images: ValueCounts = field(default_factory=ValueCounts)
    sizes: ValueCounts = field(default_factory=ValueCounts)
    lengths: Counter[int] = field(default_factory=Counter)
    token_lengths: Counter[int] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)
    sampled: list[tuple[int, ...]] = field(default_factory=list)

    def merge(self, part: SampleCounts) -> None:
        for each in fields(self):
            own, other = getattr(self, each.name), getattr(part, each.name)
            if isinstance(own, ValueCounts):
                own.merge(other)
            elif isinstance(own, dict):
                own.update(other)  # a Counter adds
            else:
                setattr(self, each.name, own + other)
        if len(self.names) > MAX_NAMES:
            self.drop_rare_names()

    def join(self) -> SampleCounts:
        for counts in (self.words, self.bigrams, self.texts, self.images, self.sizes):
            counts.join()
        return self

    def drop_rare_names(self) -> None:
        """Keeps only the names of values that are frequent so far."""
        self.join()
        kept: dict[int, str] = {}
        for counts in (self.words, self.bigrams, self.texts):
            top = counts.values[counts.ranked()[: MAX_NAMES // 6]].tolist()
            kept |= {value: self.names[value] for value in top if value in self.names}
        self.names = kept

    def top(self, counts: ValueCounts, number: int, keep: Callable[[str], bool] = bool) -> dict[str, int]:
        """Returns the most frequent values by name, if ``keep`` accepts the name."""
        found: dict[str, int] = {}
        for place in counts.ranked().tolist():
            name = self.names.get(int(counts.values[place]))
            if name is not None and keep(name):
                found[name] = int(counts.counts[place])
            if len(found) == number:
                break
        return found


def count_samples(shards: ShardSet, samples: Sequence[int], options: CountOptions) -> SampleCounts:
    """Counts some samples. It opens an image only if its size is not recorded, and reads only the header."""
    part = SampleCounts(samples=len(samples))
    texts: Counter[str] = Counter()
    for number in samples:
        try:
            sample = shards.text(number)
            part.classes[sample.label if sample.label is not None else "(none)"] += 1
            width, height = read_picture_size(shards, number, sample)
            part.sizes.add([width << 32 | height])
            recorded = sample.info.get("sha256")
            if isinstance(recorded, str) and re.fullmatch("[0-9a-f]{64}", recorded):
                part.images.add([int(recorded[:16], 16)])
            texts.update(sample.texts(options.caption_field))
        except BadSample as error:
            part.bad[error.reason] += 1
    count_texts(part, texts, options)
    return part


def count_texts(part: SampleCounts, texts: Mapping[str, int], options: CountOptions) -> None:
    words: Counter[str] = Counter()
    bigrams: Counter[str] = Counter()
    tokens = options.tokens(list(texts)) if options.tokens and texts else []
    for place, (text, times) in enumerate(texts.items()):
        found = WORD.findall(text.lower())
        part.captions += times
        part.lengths[len(found)] += times
        if tokens:
            part.token_lengths[tokens[place]] += times
        for word in found:
            words[word] += times
        for one, two in pairwise(found):
            if is_concept(one) and is_concept(two):
                bigrams[f"{one} {two}"] += times
        if len(part.sampled) < SAMPLED:
            part.sampled.append(tuple(text_hash(word) for word in set(found) if is_concept(word)))
    for counts, counter in ((part.words, words), (part.bigrams, bigrams), (part.texts, texts)):
        hashes = {text: text_hash(text) for text in counter}
        counts.add(hashes.values(), counter.values())
        part.names |= {hashes[text]: text for text, _ in Counter(counter).most_common(NAMED)}
    part.join()


def read_picture_size(shards: ShardSet, number: int, sample: Sample) -> tuple[int, int]:
    """Returns (width, height) as recorded, or from the image's header. Raises BadSample."""
    size = sample.info.get("width"), sample.info.get("height")
    if all(isinstance(side, int) and 0 < side < 1 << 31 for side in size):
        return size  # type: ignore[return-value]
    with open_image(shards.read(number).image) as image:
        return upright_size(image)


def is_concept(word: str) -> bool:
    """Tells whether a word may name something visible: no stop word, number or single letter."""
    return len(word) > 1 and word not in STOP_WORDS and not word.isdigit()


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
