"""What no caption mentions: worn patches, faint tracks and shrubs, so that no two grounds are alike."""

from __future__ import annotations

import math

from .dice import Rng, between, chance, count, pick
from .objects import bush
from .regions import band, blob
from .sketch import Sketch

# What shows through each ground where it is worn.
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
    """Lay patches, tracks and shrubs under everything that the scene has drawn."""
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
    """Shrubs under the scene's own bodies: what stands on them hides them."""
    scene, sketch.levels = sketch.levels, [[]]
    for _ in range(count(rng, 3, 10)):
        bush(sketch, between(rng, -0.6, 0.6), between(rng, -0.6, 0.6), between(rng, 0.007, 0.015), rng)
    sketch.levels = [sketch.levels[0] + scene[0], *scene[1:]]
