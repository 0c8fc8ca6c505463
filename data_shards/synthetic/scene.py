"""One sample of the product's own data: a picture from above and captions that people might write.

    (seed, index) -> class and facts (scenes) -> drawing list (sketch) -> pixels (render) -> photograph (camera)
                                     `-> captions (wording)

    >>> scene = draw_scene(seed=1, index=7)
    >>> scene.image.shape, scene.label, len(scene.fine), len(scene.coarse)
    ((128, 128, 3), 'railway station', 5, 5)

A scene depends only on seed and index, and its pixels also on the size: the same call gives the same bytes anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.synthetic.backdrop import wear
from priorclip.data_shards.synthetic.camera import photograph
from priorclip.data_shards.synthetic.dice import between, generator
from priorclip.data_shards.synthetic.facts import Facts
from priorclip.data_shards.synthetic.render import render
from priorclip.data_shards.synthetic.scenes import DRAW, SCENES
from priorclip.data_shards.synthetic.sketch import Sketch
from priorclip.data_shards.synthetic.wording import coarse_captions, fine_captions

SMALLEST, LARGEST = 16, 1024  # pixels; noise tiles of larger pictures do not fit into memory
LABELS, DRAWING, GROUND, CAMERA, FINE, COARSE = range(6)  # purpose of each stream of random numbers


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Args:
        image: the photograph, uint8 ``(size, size, 3)``
        label: scene class, one of `SCENES`
        fine: five paraphrases that each state every fact
        coarse: five noisy, class-level captions
        attributes: the facts, as JSON types: ``scene``, ``main``, ``ground``, ``company``
    """

    image: NDArray[np.uint8]
    label: str
    fine: list[str]
    coarse: list[str]
    attributes: dict[str, Any]


def label_of(seed: int, index: int) -> str:
    """Returns the class of a scene. Each block of ``len(SCENES)`` indices has each class once, shuffled."""
    block, place = divmod(index, len(SCENES))
    return SCENES[generator(seed, LABELS, block).permutation(len(SCENES))[place]]


def sketch_scene(seed: int, index: int) -> tuple[str, Sketch, Facts]:
    """Returns the class, the drawing list and the facts of a scene, without drawing it."""
    label = label_of(seed, index)
    rng = generator(seed, DRAWING, index)
    turn, sun = between(rng, 0, 2 * math.pi), between(rng, 0, 2 * math.pi)
    sketch = Sketch(turn, sun, between(rng, 0.5, 1.1))
    facts = DRAW[label](sketch, rng)
    wear(sketch, rng)
    return label, sketch, facts


def draw_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Draws one scene and its captions.

    Args:
        seed: seed of the data set, not negative
        index: index of the scene in it, not negative
        size: side in pixels; each size shows the same scene

    Raises:
        ValueError: negative seed or index, or a size out of range
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative: seed={seed}, index={index}")
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size {size} is out of range: use {SMALLEST} to {LARGEST} pixels")
    label, sketch, facts = sketch_scene(seed, index)
    sunlit = render(sketch, size, generator(seed, GROUND, index))
    return Scene(
        photograph(sunlit, generator(seed, CAMERA, index)),
        label,
        fine_captions(label, facts, generator(seed, FINE, index)),
        coarse_captions(label, generator(seed, COARSE, index)),
        facts.asdict(label),
    )
