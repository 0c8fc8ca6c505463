"""Finds pairs of 64-bit hashes that differ in few bits, without comparing all pairs.

Two hashes that differ in at most 6 bits, cut into 3 pieces, differ in at most 2 bits of the first piece, or in at most
1 of the second, or in at most 1 of the third, because 3, 2 and 2 different bits would be 7. So only hashes with one
nearly equal piece are compared (multi-index hashing; Norouzi, Punjani and Fleet, CVPR 2012).

    011001.. | 101101.. | 100111..     hash a
    010101.. | 001001.. | 000111..     hash b: 5 bits differ, 2, 2 and 1 in the pieces; the first finds it

``Pieces.cheapest`` chooses the number of pieces by the estimated time: short pieces give many pairs to compare, long
pieces give many values to look up. Memory is a few arrays as long as the hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

BITS = 64
MAX_DISTANCE = 16
MAX_WIDTH = 22  # bits of a piece, because a table has 2 ** MAX_WIDTH entries
# Approximate seconds to: look up one bucket, compare one pair of hashes of many small buckets, start the comparison of
# two large buckets, compare one pair of those, create one entry of the table.
LOOKUP, SCATTERED, CALL, COMPARISON, PLACE = 6e-9, 1.5e-8, 1.2e-5, 1.2e-9, 1e-8
LARGE = int(CALL / (SCATTERED - COMPARISON))  # two buckets with at least this many pairs get a call of their own
BLOCK = 1 << 16  # comparisons at a time; they fit into the processor's cache
YIELDED = 1 << 20  # pairs at a time

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def near_pairs(left: NDArray[np.uint64], right: NDArray[np.uint64] | None, distance: int) -> Iterator[Pairs]:
    """Yields (i, j, different bits) of all pairs left[i], right[j] that differ in at most ``distance`` bits.

    Each pair comes once, in arrays of any length and in no particular order. If ``right`` is None, the pairs are those
    within ``left`` with i < j. Equal hashes are compared once, so they cost only the output of their pairs.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"the distance of two hashes must be 0 to {MAX_DISTANCE} of {BITS} bits, not {distance}")
    a = HashGroups.of(left)
    b = a if right is None else HashGroups.of(right)
    if right is None:
        yield from equal_pairs(a)
    if not len(a.values) or not len(b.values):
        return
    pieces = Pieces.cheapest(len(a.values), len(b.values), distance)
    for i, j, bits in batch_pairs(pieces.pairs(a.values, b.values, distance, within=right is None)):
        first, second, place = expand_groups(a, b, i, j)
        if right is None:
            first, second = np.minimum(first, second), np.maximum(first, second)
        yield first, second, bits[place]


@dataclass(frozen=True)
class HashGroups:
    """Distinct hashes ``values`` (U,); the rows with values[u] are members[start[u] : start[u + 1]]."""

    values: NDArray[np.uint64]
    members: NDArray[np.int64]
    start: NDArray[np.int64]

    @classmethod
    def of(cls, hashes: NDArray[np.uint64]) -> HashGroups:
        values, counts = np.unique(hashes, return_counts=True)
        return cls(values, np.argsort(hashes, kind="stable"), np.concatenate(([0], np.cumsum(counts))))


@dataclass(frozen=True)
class Pieces:
    """``edges`` cut the bits into pieces; near hashes have a piece p in which at most ``radii[p]`` bits differ.

    A piece with radius -1 is not used.
    """

    edges: tuple[int, ...]
    radii: tuple[int, ...]

    @classmethod
    def of(cls, count: int, distance: int) -> Pieces:
        """Returns ``count`` pieces of about equal length, and radii with sum(radius + 1) = distance + 1."""
        edges = tuple(int(edge) for edge in np.linspace(0, BITS, count + 1).round())
        least, more = divmod(distance + 1, count)
        return cls(edges, tuple(least - (place >= more) for place in range(count)))

    @classmethod
    def cheapest(cls, left: int, right: int, distance: int) -> Pieces:
        counts = range(-(-BITS // MAX_WIDTH), max(distance + 1, 4) + 1)
        return min((cls.of(count, distance) for count in counts), key=lambda pieces: pieces.cost(left, right))

    def cost(self, left: int, right: int) -> float:
        """Returns the approximate seconds for this many evenly spread hashes."""
        total = 0.0
        for width, radius in zip(np.diff(self.edges), self.radii, strict=True):
            buckets = 2.0**width
            looked = min(buckets, left)
            met = looked * min(1.0, right / buckets)
            pairs = left * right / buckets
            compared = min(SCATTERED * pairs, CALL * met + COMPARISON * pairs)
            total += sum(comb(int(width), bits) for bits in range(radius + 1)) * (LOOKUP * looked + compared)
            total += PLACE * buckets * (radius >= 0)
        return total

    def pairs(
        self, left: NDArray[np.uint64], right: NDArray[np.uint64], distance: int, within: bool
    ) -> Iterator[Pairs]:
        """Pairs of distinct hashes; ``within``: of left alone, each once."""
        for number, radius in enumerate(self.radii):
            if radius < 0:
                continue
            low, high = self.edges[number], self.edges[number + 1]
            a = Buckets.of(left, low, high)
            b = a if within else Buckets.of(right, low, high)
            for x, y, bits in compare_buckets(a, b, list_masks(high - low, radius), distance, within):
                i, j = a.order[x], b.order[y]
                new = self._first_seen(left[i] ^ right[j], number)
                yield i[new], j[new], bits[new]

    def _first_seen(self, difference: NDArray[np.uint64], number: int) -> NDArray[np.bool_]:
        """Returns a mask of the pairs that no piece before ``number`` has found."""
        new = np.ones(len(difference), bool)
        for low, high, radius in zip(self.edges, self.edges[1 : number + 1], self.radii, strict=False):
            new &= np.bitwise_count(piece(difference, low, high)).astype(np.int64) > radius
        return new


@dataclass(frozen=True)
class Buckets:
    """Hashes sorted by one piece; those with the value v are ``hashes[start[v] : start[v] + size[v]]``."""

    hashes: NDArray[np.uint64]
    order: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int32]

    @classmethod
    def of(cls, hashes: NDArray[np.uint64], low: int, high: int) -> Buckets:
        values = piece(hashes, low, high).astype(np.int64)
        order = np.argsort(values, kind="stable")
        size = np.bincount(values, minlength=1 << (high - low))
        return cls(hashes[order], order, np.cumsum(size) - size, size.astype(np.int32))


def piece(hashes: NDArray[np.uint64], low: int, high: int) -> NDArray[np.uint64]:
    return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def list_masks(width: int, radius: int) -> Iterator[int]:
    """Yields all numbers of ``width`` bits with at most ``radius`` bits set."""
    for count in range(radius + 1):
        for bits in combinations(range(width), count):
            yield sum(1 << bit for bit in bits)


def compare_buckets(a: Buckets, b: Buckets, differences: Iterable[int], distance: int, within: bool) -> Iterator[Pairs]:
    """Yields near pairs of buckets whose values differ by one of ``differences``: (index in a, index in b, bits)."""
    filled = np.nonzero(a.size)[0]
    for mask in differences:
        others = filled ^ mask
        met = b.size[others] > 0
        if within:
            met &= filled <= others
        i, j = filled[met], others[met]
        large = a.size[i].astype(np.int64) * b.size[j] >= LARGE
        yield from compare_small(a, b, i[~large], j[~large], distance, within and mask == 0)
        for one, other in zip(i[large].tolist(), j[large].tolist(), strict=True):
            yield from compare_large(a, b, one, other, distance, within and mask == 0)


def compare_small(
    a: Buckets, b: Buckets, i: NDArray[np.int64], j: NDArray[np.int64], distance: int, same: bool
) -> Iterator[Pairs]:
    """Yields near pairs of the buckets i[k] and j[k], for many k at once. A bucket with itself gives each pair once."""
    if not len(i):
        return
    ends = np.cumsum(a.size[i].astype(np.int64) * b.size[j])
    cuts = np.searchsorted(ends, np.arange(0, ends[-1], BLOCK)).tolist()
    for first, last in zip(cuts, [*cuts[1:], len(ends)], strict=True):
        some, others = i[first:last], j[first:last]
        many = a.size[some]
        rows = consecutive_ranges(a.start[some], many)  # each hash of a, once per bucket to compare
        columns, begin = np.repeat(b.size[others], many), np.repeat(b.start[others], many)
        x, y = np.repeat(rows, columns), consecutive_ranges(begin, columns)
        bits = np.bitwise_count(a.hashes[x] ^ b.hashes[y])
        found = bits <= distance
        if same:
            found &= x < y
        if found.any():
            yield x[found], y[found], bits[found].astype(np.int64)


def consecutive_ranges(begin: NDArray[np.int64], count: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns begin[0], begin[0] + 1, ... (count[0] numbers), begin[1], ..."""
    before = np.cumsum(count) - count
    return np.repeat(begin - before, count) + np.arange(int(count.sum()))


def compare_large(a: Buckets, b: Buckets, i: int, j: int, distance: int, same: bool) -> Iterator[Pairs]:
    """Yields near pairs of two buckets, block by block. A bucket with itself gives each pair once."""
    begin, end = int(b.start[j]), int(b.start[j] + b.size[j])
    last = int(a.start[i] + a.size[i])
    width = min(end - begin, BLOCK)
    height = max(1, BLOCK // width)
    for row in range(int(a.start[i]), last, height):
        rows = a.hashes[row : min(row + height, last), None]
        for column in range(begin, end, width):
            bits = np.bitwise_count(rows ^ b.hashes[None, column : min(column + width, end)])
            places = np.flatnonzero(bits <= distance)
            if len(places):
                x, y = np.divmod(places, bits.shape[1])
                keep = x + row < y + column if same else np.ones(len(x), bool)
                yield x[keep] + row, y[keep] + column, bits.reshape(-1)[places[keep]].astype(np.int64)


def equal_pairs(groups: HashGroups) -> Iterator[Pairs]:
    """Yields the pairs of members with the same hash, one row of a group at a time."""
    for group in np.nonzero(np.diff(groups.start) > 1)[0].tolist():
        members = groups.members[groups.start[group] : groups.start[group + 1]]
        for place in range(len(members) - 1):
            rest = members[place + 1 :]
            yield np.full(len(rest), members[place]), rest, np.zeros(len(rest), np.int64)


def batch_pairs(pairs: Iterator[Pairs]) -> Iterator[Pairs]:
    """Yields the same pairs in longer arrays."""
    held: list[Pairs] = []
    size = 0
    for part in pairs:
        held.append(part)
        size += len(part[0])
        if size >= YIELDED:
            yield concatenate_pairs(held)
            held, size = [], 0
    if held:
        yield concatenate_pairs(held)


def concatenate_pairs(parts: list[Pairs]) -> Pairs:
    i, j, bits = (np.concatenate(column) for column in zip(*parts, strict=True))
    return i, j, bits


def expand_groups(
    a: HashGroups, b: HashGroups, i: NDArray[np.int64], j: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Turns pairs of distinct hashes into pairs of their members. Returns also the hash pair of each."""
    many, others = a.start[i + 1] - a.start[i], b.start[j + 1] - b.start[j]
    place = np.repeat(np.arange(len(i)), many * others)
    within = np.arange(len(place)) - np.repeat(np.cumsum(many * others) - many * others, many * others)
    first = a.members[a.start[i][place] + within // others[place]]
    second = b.members[b.start[j][place] + within % others[place]]
    return first, second, place
