"""Pairs of 64-bit hashes that differ in few bits, without comparing every one with every other.

Two hashes that differ in at most 8 bits, cut into 5 pieces, have a piece where they differ in at most one: were it two
in each, they would differ in ten. So those alone are compared that share a piece but for one bit.

    0110.. | 1011.. | 0001.. | 1110.. | 0100..     hash a
    0100.. | 1001.. | 0001.. | 0110.. | 0101..     hash b: 4 bits differ, none in the third piece

How many pieces, and how many bits a piece may differ in, is chosen by what it costs (``Pieces.cheapest``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

BITS = 64
MAX_DISTANCE = 16
MAX_WIDTH = 22  # bits of a piece: there is a table of two to this power
CALL, COMPARISON = 6e-6, 2e-9  # seconds, roughly: of comparing two buckets, of each pair in them
BLOCK = 1 << 22  # comparisons at a time
YIELDED = 1 << 20  # pairs at a time

Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def near_pairs(left: NDArray[np.uint64], right: NDArray[np.uint64] | None, distance: int) -> Iterator[Pairs]:
    """(i, j, bits that differ) of every pair of left[i] and right[j] that differs in at most ``distance`` bits.

    Each pair comes once, in arrays of some length and no particular order. With ``right`` None the pairs are those
    within ``left``, i < j. Equal hashes are compared as one, so that many of them cost only the pairs that they are.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"hashes are compared up to {MAX_DISTANCE} of {BITS} bits apart, not {distance}")
    a = Groups.of(left)
    b = a if right is None else Groups.of(right)
    if right is None:
        yield from equal_pairs(a)
    if not len(a.values) or not len(b.values):
        return
    pieces = Pieces.cheapest(len(a.values), len(b.values), distance)
    for i, j, bits in batched(pieces.pairs(a.values, b.values, distance, within=right is None)):
        first, second, place = expand(a, b, i, j)
        if right is None:
            first, second = np.minimum(first, second), np.maximum(first, second)
        yield first, second, bits[place]


@dataclass(frozen=True)
class Groups:
    """Distinct hashes: ``values`` (U,), and those that have each: members[start[u] : start[u + 1]]."""

    values: NDArray[np.uint64]
    members: NDArray[np.int64]
    start: NDArray[np.int64]

    @classmethod
    def of(cls, hashes: NDArray[np.uint64]) -> Groups:
        values, counts = np.unique(hashes, return_counts=True)
        return cls(values, np.argsort(hashes, kind="stable"), np.concatenate(([0], np.cumsum(counts))))


@dataclass(frozen=True)
class Pieces:
    """``edges`` cut the bits into pieces; near hashes differ in at most ``radius`` bits of one piece."""

    edges: tuple[int, ...]
    radius: int

    @classmethod
    def cheapest(cls, left: int, right: int, distance: int) -> Pieces:
        def cost(pieces: Pieces) -> float:
            total = 0.0
            for width in np.diff(pieces.edges):
                buckets = 2.0**width
                masks = sum(comb(int(width), bits) for bits in range(pieces.radius + 1))
                calls = min(buckets, left) * masks * min(1.0, right / buckets)
                total += CALL * calls + COMPARISON * masks * left * right / buckets + 1e-8 * buckets * masks
            return total

        choices = []
        for radius in range(4):
            count = distance // (radius + 1) + 1
            edges = tuple(int(edge) for edge in np.linspace(0, BITS, count + 1).round())
            if max(np.diff(edges)) <= MAX_WIDTH:
                choices.append(cls(edges, radius))
        # Too few pieces for a table: cut finer than the distance asks for.
        finest = cls(tuple(range(0, BITS + 1, 16)), distance // 4)
        return min([*choices, finest], key=cost)

    def pairs(
        self, left: NDArray[np.uint64], right: NDArray[np.uint64], distance: int, within: bool
    ) -> Iterator[Pairs]:
        """Pairs of distinct hashes; ``within``: of left alone, each once."""
        for number in range(len(self.edges) - 1):
            a = Buckets.of(left, self.edges[number], self.edges[number + 1])
            b = a if within else Buckets.of(right, self.edges[number], self.edges[number + 1])
            for mask in masks(self.edges[number + 1] - self.edges[number], self.radius):
                for i, j in meeting(a, b, mask, within):
                    for found, bits in compare(a, b, i, j, distance, within and i == j):
                        new = self._first_seen(left[found[0]] ^ right[found[1]], number)
                        yield found[0][new], found[1][new], bits[new]

    def _first_seen(self, difference: NDArray[np.uint64], number: int) -> NDArray[np.bool_]:
        """Which pairs no piece before ``number`` has brought together."""
        new = np.ones(len(difference), bool)
        for low, high in zip(self.edges[:number], self.edges[1 : number + 1], strict=True):
            new &= np.bitwise_count(piece(difference, low, high)) > self.radius
        return new


@dataclass(frozen=True)
class Buckets:
    """Hashes sorted by one piece: those with the value v are ``hashes[start[v] : start[v + 1]]``."""

    hashes: NDArray[np.uint64]
    order: NDArray[np.int64]
    start: NDArray[np.int64]

    @classmethod
    def of(cls, hashes: NDArray[np.uint64], low: int, high: int) -> Buckets:
        values = piece(hashes, low, high).astype(np.int64)
        order = np.argsort(values, kind="stable")
        counts = np.bincount(values, minlength=1 << (high - low))
        return cls(hashes[order], order, np.concatenate(([0], np.cumsum(counts))))


def piece(hashes: NDArray[np.uint64], low: int, high: int) -> NDArray[np.uint64]:
    return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def masks(width: int, radius: int) -> Iterator[int]:
    """Every number of ``width`` bits of which at most ``radius`` are set."""
    for count in range(radius + 1):
        for bits in combinations(range(width), count):
            yield sum(1 << bit for bit in bits)


def meeting(a: Buckets, b: Buckets, mask: int, within: bool) -> Iterator[tuple[int, int]]:
    """Values of the piece that differ by ``mask``, where both buckets hold something."""
    values = np.nonzero(np.diff(a.start))[0]
    others = values ^ mask
    keep = b.start[others + 1] > b.start[others]
    if within:
        keep &= values <= others
    yield from zip(values[keep].tolist(), others[keep].tolist(), strict=True)


def compare(
    a: Buckets, b: Buckets, i: int, j: int, distance: int, same: bool
) -> Iterator[tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]]:
    """Near pairs of two buckets, some rows at a time; of a bucket with itself each pair once."""
    begin, end = int(b.start[j]), int(b.start[j + 1])
    other = b.hashes[begin:end]
    rows = max(1, BLOCK // len(other))
    last = int(a.start[i + 1])
    for row in range(int(a.start[i]), last, rows):
        bits = np.bitwise_count(a.hashes[row : min(row + rows, last), None] ^ other[None, :])
        x, y = np.nonzero(bits <= distance)
        if same:
            x, y = x[x + row < y + begin], y[x + row < y + begin]
        if len(x):
            yield (a.order[x + row], b.order[y + begin]), bits[x, y].astype(np.int64)


def equal_pairs(groups: Groups) -> Iterator[Pairs]:
    """Pairs of members with the same hash, a row of a group at a time where the group is large."""
    for group in np.nonzero(np.diff(groups.start) > 1)[0].tolist():
        members = groups.members[groups.start[group] : groups.start[group + 1]]
        for place in range(len(members) - 1):
            rest = members[place + 1 :]
            yield np.full(len(rest), members[place]), rest, np.zeros(len(rest), np.int64)


def batched(pairs: Iterator[Pairs]) -> Iterator[Pairs]:
    """The same pairs in longer arrays."""
    held: list[Pairs] = []
    size = 0
    for part in pairs:
        held.append(part)
        size += len(part[0])
        if size >= YIELDED:
            yield joined(held)
            held, size = [], 0
    if held:
        yield joined(held)


def joined(parts: list[Pairs]) -> Pairs:
    i, j, bits = (np.concatenate(column) for column in zip(*parts, strict=True))
    return i, j, bits


def expand(
    a: Groups, b: Groups, i: NDArray[np.int64], j: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of distinct hashes -> pairs of their members, and which pair of hashes each comes from."""
    many, others = a.start[i + 1] - a.start[i], b.start[j + 1] - b.start[j]
    place = np.repeat(np.arange(len(i)), many * others)
    within = np.arange(len(place)) - np.repeat(np.cumsum(many * others) - many * others, many * others)
    first = a.members[a.start[i][place] + within // others[place]]
    second = b.members[b.start[j][place] + within % others[place]]
    return first, second, place
