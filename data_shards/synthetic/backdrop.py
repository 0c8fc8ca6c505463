"""Details that no caption mentions: worn patches, faint tracks and shrubs, so that each ground is different."""

from __future__ import annotations

import math

import numpy as np

from priorclip.data_shards.synthetic.dice import Rng, between, chance, count, pick
from priorclip.data_shards.synthetic.objects import bush
from priorclip.data_shards.synthetic.regions import band, blob
from priorclip.data_shards.synthetic.sketch import DETAIL, Grid, Sketch

# Materials that show through a worn ground.
WORN: dict[str, tuple[str, ...]] = {
    "grass": ("dry grass", "soil", "lawn"),
    "dry grass": ("grass", "soil", "sand"),
    "soil": ("dry grass", "sand", "gravel"),
    "sand": ("dry grass", "desert", "gravel"),
    "concrete": ("asphalt", "gravel"),
    "asphalt": ("concrete", "gravel"),
    "desert": ("sand", "gravel"),
}


def wear(sketch: Sketch, rng: Rng) -> None:
    """Puts patches, tracks and shrubs under everything that the scene has drawn."""
    ground = sketch.ground
    if not isinstance(ground, str) or ground not in WORN:
        return
    drawn, sketch.areas = sketch.areas, []
    for _ in range(count(rng, 1, 3)):
        size = between(rng, 0.25, 0.7)
        patch = blob(
            rng,
            between(rng, -0.5, 0.5),
            between(rng, -0.5, 0.5),
            size,
            size * between(rng, 0.3, 0.8),
            between(rng, 0, 3),
        )
        sketch.fill(patch, pick(rng, WORN[ground]), 0.10, 0.10, between(rng, 0.15, 0.5))
    paved = ground in ("concrete", "asphalt")
    for _ in range(0 if paved else count(rng, 0, 2)):
        track = band(
            between(rng, -0.4, 0.4),
            0.008,
            between(rng, 0, 0.06),
            between(rng, 0.5, 1.2),
            0,
            between(rng, 0, math.pi),
        )
        sketch.fill(track, "sand" if ground != "sand" else "soil", 0.004, 0.012, between(rng, 0.2, 0.5))
    sketch.areas += drawn
    if not paved and chance(rng, 0.7):
        _hedge(sketch, rng)


def _hedge(sketch: Sketch, rng: Rng) -> None:
    """Draws shrubs on open ground, below the scene's own bodies, which hide them."""
    number = count(rng, 4, 14)
    places = (rng.random((2, 1, number), dtype=np.float32) - np.float32(0.5)) * np.float32(1.3)
    spot = Grid(number, places[0], places[1], (1.0, 0.0))
    margin = 0.03
    open_ground = np.ones((1, number), bool)
    for area in sketch.areas:
        if area.opacity == 1 and area.material is not None:
            open_ground &= area.distance(spot) > margin
    for mark in sketch.marks:
        if mark.part and not mark.part.endswith(DETAIL):  # courts, pools, infields; shrubs may cover plain lines
            corners = np.array(mark.points, np.float32)
            u, v = corners.mean(axis=0)
            reach = mark.radius + np.hypot(*(corners - (u, v)).T).max()
            open_ground &= np.hypot(spot.u - u, spot.v - v) > reach + margin
    scene, sketch.levels = sketch.levels, [[]]
    for u, v in places[:, open_ground].T.tolist():
        bush(sketch, u, v, between(rng, 0.007, 0.016), rng)
    sketch.levels = [sketch.levels[0] + scene[0], *scene[1:]]
