"""Living and artificial plants: one colour for the eye, two in near infrared, and words that say which they are.

    artificial_of(seed, index, share=0.5)            True for half of the scenes
    has_plants(sketch, rng)                          False for a scene of sand and roofs
    say_plants(captions, artificial, rng)            ['a football field on grass, all plants are artificial.', ...]

A camera of three colours cannot know it. So a data set with both kinds measures what a band beyond the colours gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from priorclip.data_shards.synthetic.dice import Rng, generator, pick
from priorclip.data_shards.synthetic.infrared import render_infrared
from priorclip.data_shards.synthetic.sketch import Sketch

PLANTS = 7  # purpose of the stream of random numbers; 0 to 5 are in scene.py, 6 in rasters/drawn_scenes.py
SIDE = 48  # pixels of the picture that tells whether there are plants, the same for all sizes of a scene
CHANGED, ENOUGH = 0.05, 0.08  # difference in near infrared of a pixel with plants, and their share of the scene
WORDS = {
    False: ("all plants are alive", "the plants are living", "with living plants"),
    True: ("all plants are artificial", "the plants are plastic", "with artificial plants"),
}


def artificial_of(seed: int, index: int, share: float) -> bool:
    """Tells whether the plants of a scene are artificial, which ``share`` of the scenes have."""
    return float(generator(seed, PLANTS, index).random()) < share


def has_plants(sketch: Sketch, rng: Callable[[], Rng]) -> bool:
    """Tells whether plants cover a visible part of a scene.

    Args:
        sketch: the drawing list
        rng: returns a generator in the state in which ``render`` gets it
    """
    living = render_infrared(sketch, SIDE, rng())
    artificial = render_infrared(sketch, SIDE, rng(), artificial=True)
    return float((abs(living - artificial) > CHANGED).mean()) >= ENOUGH


def say_plants(captions: Sequence[str], artificial: bool, rng: Rng) -> list[str]:
    """Returns the captions, each with words for the plants at its end."""
    return [f"{caption.rstrip('.')}, {pick(rng, WORDS[artificial])}." for caption in captions]
