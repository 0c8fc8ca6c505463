"""Pictures and their hashes, for the tests of duplicates and leakage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from priorclip.data_shards.dedupe.hash_columns import HashColumns
from priorclip.data_shards.dedupe.image_hashes import PERCEPTUAL, SYMMETRIC, hash_images
from priorclip.data_shards.dedupe.leakage import DEFAULT_DISTANCE, EvaluationImages

UCMERCED = Path(__file__).parents[3] / "shared/data/ucmerced/images"


MAX_PIXELS = 100_000_000


def hash_columns(images: list[bytes], kind: np.dtype = PERCEPTUAL) -> HashColumns:
    return HashColumns.of_rows(hash_images(images, len(images), kind, MAX_PIXELS))


def evaluation_of(images: list[bytes], distance: int | None = DEFAULT_DISTANCE) -> EvaluationImages:
    names = [f"e{place}" for place in range(len(images))]
    return EvaluationImages(names, ["made"] * len(images), hash_columns(images, SYMMETRIC), distance)


def photograph(seed: int, side: int = 256) -> Image.Image:
    """Shapes, edges and grain: what a photograph's hash is made of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(30, 220, (9, 9, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    grain = rng.normal(0, 6, (side, side, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def sea(seed: int, side: int = 256) -> Image.Image:
    """Open water: one colour, and noise of a few grey levels."""
    rng = np.random.default_rng(seed)
    waves = Image.fromarray(rng.integers(0, 40, (64, 64), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    grey = np.asarray(waves)[..., None] + np.array([10, 60, 90])
    return Image.fromarray((grey + rng.normal(0, 3, (side, side, 3))).clip(0, 255).astype(np.uint8))
