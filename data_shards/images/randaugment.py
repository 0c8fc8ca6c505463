"""RandAugment on a decoded image, by timm, with draws from the sample's own generator.

    rand_augment(pixels, rng, layers=2, magnitude=7)    # uint8 (3, S, S) -> uint8 (3, S, S)

It is the RandomAugment(2, 7) of X-VLM and PIR (dataset/randaugment.py): two operations of ten are drawn with
replacement, and each is applied with probability 0.5 at 7 tenths of its largest strength. timm's operations have the
same strengths, if a shift is at most 10 pixels. timm draws from Python's and numpy's global generators. So both are
seeded for the call and get their state back: dropout and other samples do not notice, and the pixels depend on the
sample only. numpy and Python keep the streams of these two generators the same in all versions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

OPERATIONS = (
    *("AutoContrast", "Equalize", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
)
LARGEST_SHIFT = 10  # pixels, at magnitude 10; timm's default of 250 is for images of 331
GREY = (128, 128, 128)  # of pixels that a shift, shear or rotation brings in


def rand_augment(
    pixels: NDArray[np.uint8], rng: random.Random, *, layers: int, magnitude: float, probability: float = 0.5
) -> NDArray[np.uint8]:
    """Returns the augmented image, uint8 (3, S, S), a view. It depends on the pixels and ``rng`` only.

    Args:
        pixels: uint8 (3, S, S)
        rng: source of the seeds
        layers: operations that are drawn for the image
        magnitude: strength, of 10
        probability: with which each drawn operation is applied
    """
    policy = timm_policy(layers, magnitude, probability)
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    with global_draws_from(rng):
        changed = policy(picture)
    return np.asarray(changed).transpose(2, 0, 1)


@cache
def timm_policy(layers: int, magnitude: float, probability: float) -> Any:
    """Returns timm's RandAugment with the operations of X-VLM: a function from a Pillow image to another one.

    It imports timm, which takes seconds, only in processes that augment.
    """
    from timm.data import auto_augment

    facts = {"translate_const": LARGEST_SHIFT, "img_mean": GREY, "interpolation": Image.Resampling.BILINEAR}
    operations = auto_augment.rand_augment_ops(magnitude, probability, facts, list(OPERATIONS))
    return auto_augment.RandAugment([unchanged, *operations], layers)


def unchanged(picture: Image.Image) -> Image.Image:
    """X-VLM's operation Identity, which timm does not have."""
    return picture


@contextmanager
def global_draws_from(rng: random.Random) -> Iterator[None]:
    """Seeds Python's and numpy's global generators from ``rng``, and restores their state at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(rng.getrandbits(64))
    np.random.seed(rng.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
