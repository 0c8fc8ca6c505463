"""Regions for `Sketch.fill`, as signed distances in scene sides, negative inside."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence

import numpy as np

from priorclip.data_shards.synthetic.dice import Rng, between
from priorclip.data_shards.synthetic.sketch import Distance, Grid, Plane


def _away(grid: Grid, u: float, v: float) -> Plane:
    """Returns the distance of every pixel from a point."""
    return np.hypot(grid.u - np.float32(u), grid.v - np.float32(v))


def band(
    offset: float,
    half_width: float,
    bend: float = 0.0,
    wave: float = 1.0,
    phase: float = 0.0,
    angle: float = 0.0,
) -> Distance:
    """Returns a strip along the line ``v = offset``, turned by ``angle``, with waves ``bend`` high, ``wave`` long."""
    cos, sin = math.cos(angle), math.sin(angle)

    def distance(grid: Grid) -> Plane:
        along = grid.u * cos + grid.v * sin if angle else grid.u
        across = grid.v * cos - grid.u * sin if angle else grid.v
        if bend:
            across = across - bend * np.sin(along * (2 * math.pi / wave) + phase)
        return np.abs(across - np.float32(offset)) - np.float32(half_width)

    return distance


def beyond(offset: float, bend: float = 0.0, wave: float = 1.0, phase: float = 0.0) -> Distance:
    """Returns the side of the line ``v = offset`` where v is larger; its edge has waves of height ``bend``."""

    def distance(grid: Grid) -> Plane:
        edge = offset + bend * np.sin(grid.u * (2 * math.pi / wave) + phase) if bend else offset
        return edge - grid.v

    return distance


def before(offset: float) -> Distance:
    """Returns the side of the line ``v = offset`` where v is smaller."""
    return lambda grid: grid.v - offset


def disc(u: float, v: float, radius: float) -> Distance:
    """Returns a disc."""
    return lambda grid: _away(grid, u, v) - radius


def ring(u: float, v: float, radius: float, half_width: float) -> Distance:
    """Returns a ring whose middle line has the given radius."""
    return lambda grid: np.abs(_away(grid, u, v) - radius) - half_width


def ellipse(u: float, v: float, length: float, width: float, heading: float = 0.0) -> Distance:
    """Returns an ellipse with axes ``length`` and ``width`` (the distance is exact only on its edge)."""
    cos, sin = math.cos(heading), math.sin(heading)

    def distance(grid: Grid) -> Plane:
        x, y = grid.u - u, grid.v - v
        a, b = (x * cos + y * sin) * (2 / length), (y * cos - x * sin) * (2 / width)
        return (np.hypot(a, b) - 1) * (min(length, width) / 2)

    return distance


def blob(rng: Rng, u: float, v: float, length: float, width: float, heading: float = 0.0) -> Distance:
    """Returns a rounded natural outline of about the given axes: a pond, an island, a bunker."""
    cos, sin = math.cos(heading), math.sin(heading)
    depths = [between(rng, 0.02, 0.13) / math.sqrt(k - 1) for k in (2, 3, 5)]
    second, third, fifth = [np.complex64(cmath.rect(depth, between(rng, 0, 2 * math.pi))) for depth in depths]

    def distance(grid: Grid) -> Plane:
        x, y = grid.u - np.float32(u), grid.v - np.float32(v)
        a, b = (x * cos + y * sin) * (2 / length), (y * cos - x * sin) * (2 / width)
        away = np.sqrt(a * a + b * b) + np.float32(1e-6)
        turn = (a + 1j * b) / away  # its powers replace angles and sines, which are slower
        twice = turn * turn
        edge = 1 + (second * twice + twice * turn * (third + fifth * twice)).imag
        return (away - edge) * np.float32(min(length, width) / 2)

    return distance


def rectangle(u: float, v: float, length: float, width: float, heading: float = 0.0, corner: float = 0.0) -> Distance:
    """Returns a rectangle along ``heading`` with corners rounded by ``corner``."""
    cos, sin = math.cos(heading), math.sin(heading)

    def distance(grid: Grid) -> Plane:
        x, y = grid.u - u, grid.v - v
        a = np.abs(x * cos + y * sin) - (length / 2 - corner)
        b = np.abs(y * cos - x * sin) - (width / 2 - corner)
        if not corner:
            return np.maximum(a, b)
        return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner

    return distance


def ray(u: float, v: float, heading: float, half_width: float) -> Distance:
    """Returns a strip from a point to beyond the edge of the picture."""
    cos, sin = math.cos(heading), math.sin(heading)

    def distance(grid: Grid) -> Plane:
        x, y = grid.u - u, grid.v - v
        return np.maximum(np.abs(y * cos - x * sin) - half_width, -(x * cos + y * sin))

    return distance


def sector(u: float, v: float, heading: float, radius: float) -> Distance:
    """Returns a quarter of a disc around ``heading``."""
    cos, sin = math.cos(heading), math.sin(heading)

    def distance(grid: Grid) -> Plane:
        x, y = grid.u - u, grid.v - v
        ahead, aside = x * cos + y * sin, np.abs(y * cos - x * sin)
        return np.maximum(np.hypot(x, y) - radius, (aside - ahead) * np.float32(math.sqrt(0.5)))

    return distance


def grown(region: Distance, margin: float) -> Distance:
    """Returns the region with its edge moved out by ``margin``, or in if it is negative."""
    return lambda grid: region(grid) - margin


def union(regions: Sequence[Distance]) -> Distance:
    """Returns the union of all regions, so that their material is computed once."""
    return lambda grid: np.minimum.reduce([region(grid) for region in regions])
