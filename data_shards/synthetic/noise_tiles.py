"""Periodic noise tiles, of which the ground is made.

A tile covers ``TILE_SIDE`` scene sides and wraps. One fixed set of Fourier coefficients gives all tiles, so the tile
for 64 pixels per scene is the tile for 512 without the finer waves: the same ground at another resolution. Each process
builds a tile once per size. A scene takes a random crop of it, turned or mirrored.

    >>> patch("broad", 128, np.random.default_rng(0)).shape
    (128, 128)
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating[Any]]

TILE_SIDE = 2  # scene sides that one tile covers; a large tile makes repeated crops rare
HIGHEST = 128  # waves per scene side in the master spectrum
SEED = 20405  # fixed, because the tiles are part of the product and not of a data set

# Waves per scene side: (lowest, highest, exponent with which the amplitude falls).
BANDS: dict[str, tuple[float, float, float]] = {
    "broad": (0.5, 16.0, 1.7),
    "mottle": (5.0, 44.0, 1.0),
    "grain": (16.0, 96.0, 0.5),
}
CANOPY_CELLS = 40  # tree crowns along one side of a tile


@cache
def _spectrum(kind: str) -> NDArray[np.complex128]:
    """Returns the master coefficients ``(2K, 2K)`` of a band, scaled to unit standard deviation."""
    low, high, fall = BANDS[kind]
    half = HIGHEST * TILE_SIDE
    waves = np.fft.fftfreq(2 * half) * 2 * half / TILE_SIDE
    radius = np.hypot(waves[:, None], waves[None, :])
    amplitude = np.where((radius >= low) & (radius <= high), np.maximum(radius, low) ** -fall, 0.0)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, sorted(BANDS).index(kind)])))
    phase = np.exp(2j * np.pi * rng.random(radius.shape))
    return amplitude * phase / np.sqrt((amplitude**2).sum() / 2)


@lru_cache(maxsize=64)
def tile(kind: str, size: int) -> Plane:
    """Returns the periodic tile of a band, ``(TILE_SIDE * size, TILE_SIDE * size)``, mean 0, about unit deviation."""
    master = _spectrum(kind)
    side, half = size * TILE_SIDE, HIGHEST * TILE_SIDE
    keep = min(side // 2, half)
    coefficients = np.zeros((side, side), np.complex128)
    for rows in (slice(0, keep), slice(-keep, None)):
        for columns in (slice(0, keep), slice(-keep, None)):
            coefficients[rows, columns] = master[rows, columns]
    return np.ascontiguousarray((np.fft.ifft2(coefficients).real * side * side).astype(np.float32))


@lru_cache(maxsize=8)
def canopy_tile(size: int, jitter: float = 0.8) -> tuple[Plane, Plane]:
    """Returns crown height in 0..1 and a random value for each crown, as two periodic tiles.

    ``jitter`` 0 gives the square grid of an orchard, 0.8 a forest.
    """
    side, cells = size * TILE_SIDE, CANOPY_CELLS
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, 99])))
    centre = 0.5 + jitter * (rng.random((2, cells, cells)) - 0.5)
    radius = (0.5 + (0.15 + 0.35 * rng.random((cells, cells))) * max(jitter, 0.3)).astype(np.float32)
    tone = rng.random((cells, cells)).astype(np.float32)
    at = ((np.arange(side, dtype=np.float32) + 0.5) * cells / side).astype(np.float32)
    cell = at.astype(int)
    height, hue = np.zeros((side, side), np.float32), np.zeros((side, side), np.float32)
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            rows, columns = (cell + down) % cells, (cell + across) % cells
            pick = np.ix_(rows, columns)
            dy = (at - cell)[:, None] - down - centre[0][pick].astype(np.float32)
            dx = (at - cell)[None, :] - across - centre[1][pick].astype(np.float32)
            dome = np.sqrt(np.maximum(1 - (dx * dx + dy * dy) / radius[pick] ** 2, 0)) * radius[pick]
            taller = dome > height
            height = np.where(taller, dome, height)
            hue = np.where(taller, tone[pick], hue)
    return height, hue


def _window(size: int, rng: np.random.Generator) -> tuple[int, int, int]:
    across, down, turn = rng.random(3)
    reach = (TILE_SIDE - 1) * size
    return int(across * reach), int(down * reach), int(turn * 8)


def _cut(whole: Plane, size: int, window: tuple[int, int, int]) -> Plane:
    across, down, turn = window
    crop = whole[down : down + size, across : across + size]
    if turn & 1:
        crop = crop[::-1]
    if turn & 2:
        crop = crop[:, ::-1]
    return crop.T if turn & 4 else crop


def patch(kind: str, size: int, rng: np.random.Generator) -> Plane:
    """Returns a ``(size, size)`` crop of a band's tile, at a random place, randomly turned and mirrored."""
    return _cut(tile(kind, size), size, _window(size, rng))


def canopy_patch(size: int, rng: np.random.Generator, jitter: float = 0.8) -> tuple[Plane, Plane]:
    """Returns crops of crown height and crown tone at the same place, ``(size, size)`` each."""
    height, tone = canopy_tile(size, jitter)
    window = _window(size, rng)
    return _cut(height, size, window), _cut(tone, size, window)
