"""The sensor: optics, haze, exposure, white balance and noise, different for each picture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from priorclip.data_shards.synthetic.dice import Rng, between, chance
from priorclip.data_shards.synthetic.noise_tiles import patch
from priorclip.data_shards.synthetic.sketch import Picture

HAZE = np.array((196, 206, 216), np.float32)
REFERENCE = 128  # pixels for which blur is given; a camera with more pixels blurs less of the ground


def photograph(picture: Picture, rng: Rng) -> NDArray[np.uint8]:
    """Returns the scene ``(n, n, 3)`` as a satellite or an aircraft records it, uint8."""
    size = picture.shape[0]
    gain, haze, noise = between(rng, 0.86, 1.12), max(0.0, between(rng, -0.10, 0.20)), between(rng, 1.0, 5.0)
    blur = between(rng, 0.25, 0.65) if chance(rng, 0.5) else 0.0
    tint = (1 + (rng.random(3) - 0.5) * 0.07).astype(np.float32)
    light = 1 + 0.03 * patch("broad", size, rng)
    faded = between(rng, 0.04, 0.24)
    mixing = np.eye(3) * (1 - faded) + faded / 3  # towards grey
    mixing *= tint * gain * (1 - haze)
    exposed = picture @ mixing.astype(np.float32)
    exposed *= light[..., None]
    exposed += HAZE * np.float32(haze)
    if blur:
        image = Image.fromarray(np.clip(exposed, 0, 255).astype(np.uint8))
        exposed = np.asarray(image.filter(ImageFilter.GaussianBlur(blur * math.sqrt(size / REFERENCE))), np.float32)
    speck = rng.standard_normal((size, size, 3), dtype=np.float32)
    speck += 1.2 * speck[..., 1:2]  # most noise is equal in all bands
    return np.clip(exposed + np.float32(0.5 * noise) * speck + 0.5, 0, 255).astype(np.uint8)
