"""The places of counted things: named layouts that stay true if the picture is flipped or turned.

spots(rng, 6, "two rows", Room(0, -0.08, 0.68, 0.52), 0.12)   # [(u, v, heading), ...]
"""

from __future__ import annotations

import math
from typing import NamedTuple

from priorclip.data_shards.synthetic.dice import Rng, between, pick, shuffled

Spot = tuple[float, float, float]  # u, v, heading in radians


class Room(NamedTuple):
    """A rectangle of the scene; centre and sides are in scene sides."""

    u: float
    v: float
    length: float
    width: float


MAIN = Room(0.0, -0.09, 0.68, 0.50)  # without the line v = 0.36; inside the picture at any turn
WHOLE = Room(0.0, 0.0, 0.64, 0.64)


EDGE = 0.8  # share of a thing's extent that must lie inside the room if its place is at the edge
LINE_GAP = 1.1  # smallest distance of two rows, in extents


def layout_for(rng: Rng, count: int) -> str | None:
    """Returns a layout that is possible for this many things; None for a single one."""
    if count == 1:
        return None
    if count <= 3:
        return pick(rng, ("row", "scattered"))
    if count == 4:
        return pick(rng, ("row", "grid", "scattered"))
    options = ["two rows", "ring", "scattered"] if count >= 6 and count % 2 == 0 else ["ring", "scattered"]
    if count == 5:
        options.append("row")
    if count == 9:
        options.append("grid")
    return pick(rng, options)


def spots(rng: Rng, count: int, layout: str | None, room: Room, extent: float) -> list[Spot]:
    """Returns the place of each thing.

    Args:
        count: number of things
        layout: ``row``, ``two rows``, ``grid``, ``ring``, ``scattered`` or None for one thing
        room: the rectangle around all things
        extent: width of one thing with the space around it; scattered things keep this distance

    Raises:
        ValueError: the layout is none of these
    """
    if layout is None:
        slack = 0.15
        return [
            (
                room.u + between(rng, -slack, slack) * (room.length - extent),
                room.v + between(rng, -slack, slack) * (room.width - extent),
                between(rng, 0, 2 * math.pi),
            )
        ]
    if layout == "row":
        return _lines(rng, (count,), room, extent)
    if layout == "two rows":
        return _lines(rng, (count // 2, count - count // 2), room, extent)
    if layout == "grid":
        side = math.isqrt(count)
        return _lines(rng, (side,) * side, room._replace(length=min(room.length, room.width)), extent)
    if layout == "ring":
        return _ring(rng, count, room, extent)
    if layout == "scattered":
        return _scattered(rng, count, room, extent)
    raise ValueError(f"unknown layout {layout!r}: use row, two rows, grid, ring, scattered or None")


def extent_for(count: int, layout: str | None, room: Room, wish: float) -> float:
    """Returns the wanted extent of one thing, or a smaller one if the layout has not enough space."""
    if layout is None:
        return min(wish, room.length, room.width)
    if layout == "ring":
        chord = math.sin(math.pi / count)
        return min(wish, chord * min(room.length, room.width) / (1 + EDGE * chord))
    if layout == "scattered":
        return min(wish, max(min(room.length / i, room.width / math.ceil(count / i)) for i in range(1, count + 1)))
    side = math.isqrt(count)
    columns, rows = {"row": (count, 1), "two rows": (count - count // 2, 2), "grid": (side, side)}[layout]
    length = min(room.length, room.width) if layout == "grid" else room.length
    return min(wish, length / (columns - 1 + EDGE), room.width / (LINE_GAP * (rows - 1) + EDGE))


def _lines(rng: Rng, lengths: tuple[int, ...], room: Room, extent: float) -> list[Spot]:
    longest = max(lengths)
    pitch = min(extent * between(rng, 1.0, 1.25), (room.length - extent * EDGE) / max(longest - 1, 1))
    gap = min(extent * between(rng, LINE_GAP, 1.5), (room.width - extent * EDGE) / max(len(lengths) - 1, 1))
    found = []
    for line, number in enumerate(lengths):
        for place in range(number):
            u = room.u + (place - (number - 1) / 2) * pitch
            v = room.v + (line - (len(lengths) - 1) / 2) * gap
            found.append((u, v, math.pi / 2))
    return found


def _ring(rng: Rng, count: int, room: Room, extent: float) -> list[Spot]:
    widest = (min(room.length, room.width) - extent * EDGE) / 2
    radius = min(widest, max(extent / (2 * math.sin(math.pi / count)) * 1.1, extent * 0.8))
    start = between(rng, 0, 2 * math.pi)
    turns = [start + 2 * math.pi * i / count for i in range(count)]
    return [(room.u + radius * math.cos(a), room.v + radius * math.sin(a), a) for a in turns]


def _scattered(rng: Rng, count: int, room: Room, extent: float) -> list[Spot]:
    """Draws places from a jittered lattice: they look random, never overlap and need a fixed number of draws."""
    columns = max(1, min(int(room.length / extent + 1e-6), count))
    rows = max(1, int(room.width / extent + 1e-6))
    while columns * rows < count:
        columns, rows = (columns + 1, rows) if room.length / columns > room.width / rows else (columns, rows + 1)
    step_u, step_v = room.length / columns, room.width / rows
    cells = shuffled(rng, [(i, j) for i in range(columns) for j in range(rows)])[:count]
    loose_u, loose_v = max(0.0, step_u - extent) / 2, max(0.0, step_v - extent) / 2
    found = []
    for i, j in cells:
        u = room.u - room.length / 2 + (i + 0.5) * step_u + between(rng, -loose_u, loose_u)
        v = room.v - room.width / 2 + (j + 0.5) * step_v + between(rng, -loose_v, loose_v)
        found.append((u, v, between(rng, 0, 2 * math.pi)))
    return found


def along(count: int, room: Room) -> list[float]:
    """Returns ``count`` evenly spaced u values over the room's length."""
    return [room.u + ((i + 0.5) / count - 0.5) * room.length for i in range(count)]
