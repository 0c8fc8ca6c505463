"""Near infrared of a drawing list: leaves and turf are bright, water is black, paint says nothing.

    colour = render(sketch, size, generator(seed, GROUND, index))             (n, n, 3)
    infrared = render_infrared(sketch, size, generator(seed, GROUND, index))  (n, n): the same scene, in the same detail

A green roof and a lawn have one colour and different infrared; so have a blue court and water.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from priorclip.data_shards.synthetic.dice import Rng
from priorclip.data_shards.synthetic.ground import LEAVES, PLASTIC, TURF, WATER, infrared_of, texture
from priorclip.data_shards.synthetic.render import build, cover_ground, grid_of, weathered
from priorclip.data_shards.synthetic.sketch import Grid, Picture, Plane, Shape, Sketch, Texture

SHADOW = 8  # in 0..255
LIVING = {"tree": LEAVES, "bush": LEAVES, "turf": TURF, "pool": WATER}  # part -> share that it reflects
PAINT = (0.12, 0.22)  # share that black paint reflects, and what white paint adds to it
LEAF_LIGHT = 90  # mean brightness of a leaf's colour, at which it reflects its share


def render_infrared(sketch: Sketch, size: int, rng: Rng, artificial: bool = False) -> Plane:
    """Returns the share of near infrared that each pixel reflects, ``(size, size)`` float32 in 0..1.

    Args:
        sketch: the drawing list
        size: side in pixels
        rng: in the state in which `render` gets it, so that both have the same texture
        artificial: plants are of plastic, which reflects as little as paint
    """
    fill = partial(infrared_texture, artificial=artificial)
    ground = np.clip(cover_ground(sketch, grid_of(sketch, size), rng, fill), 0, 255).astype(np.uint8)
    ink = partial(_ink, artificial=artificial)
    return np.clip(weathered(build(sketch, ground[..., 0], ink, SHADOW), rng) / 255, 0, 1)


def infrared_texture(material: str | Texture, grid: Grid, rng: Rng, artificial: bool = False) -> Picture:
    """Returns a material in near infrared, ``(n, n, 1)`` in 0..255, with the light and shade of its colours."""
    light = texture(material, grid, rng).mean(axis=2, keepdims=True)
    return light * np.float32(255 * infrared_of(material, artificial) / light.mean())


def _ink(shape: Shape, artificial: bool = False) -> int:
    light = sum(shape.colour) / 3
    if shape.part == "pool":
        share = WATER
    elif shape.part in LIVING:
        share = (PLASTIC if artificial else LIVING[shape.part]) * min(1.5, 0.6 + 0.4 * light / LEAF_LIGHT)
    else:
        share = PAINT[0] + PAINT[1] * light / 255
    return min(255, max(0, round(255 * share)))
