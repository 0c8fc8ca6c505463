"""Hashes that tell whether two images show the same picture, also if one is re-encoded, resized or turned.

    bytes  --sha256-->  32 bytes                                       equal: an exact duplicate
    bytes  --decode-->  32 x 32 grey  --phash (imagehash)-->  64 bits  few bits apart: a candidate
                                      --2 x 2 means-------->  16 x 16  and nearly equal thumbnails: a near duplicate

A perceptual hash alone cannot tell one piece of open sea from another, because noise decides the bits of a picture
without features. So the correlation of the two thumbnails confirms each candidate, and images with almost no contrast
are compared by their bytes only.

An aerial photograph has no top: a turned or mirrored copy shows the same picture. ``SYMMETRIC`` rows hold the hashes of
all eight orientations (``SYMMETRIES``), so that the other image needs one hash only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import open_image, upright_rgb

SIDE, THUMB = 32, 16  # pixels: side of the hashed picture and of the thumbnail
DECODED = 64  # pixels: smallest side to which a JPEG is decoded
MIN_CORRELATION = 0.85  # of two thumbnails
MIN_CONTRAST = 1.0  # grey levels, standard deviation of the thumbnail; below it only the bytes are compared
SYMMETRIES: dict[str, Callable[[NDArray], NDArray]] = {  # of pictures (..., H, W)
    "none": lambda grey: grey,
    "flipped left to right": lambda grey: grey[..., ::-1],
    "flipped top to bottom": lambda grey: grey[..., ::-1, :],
    "rotated by 90 degrees": lambda grey: np.rot90(grey, 1, (-2, -1)),
    "rotated by 180 degrees": lambda grey: np.rot90(grey, 2, (-2, -1)),
    "rotated by 270 degrees": lambda grey: np.rot90(grey, 3, (-2, -1)),
    "transposed": lambda grey: grey.swapaxes(-2, -1),
    "transversed": lambda grey: np.rot90(grey.swapaxes(-2, -1), 2, (-2, -1)),
}
EXACT = np.dtype([("readable", "?"), ("sha256", "u1", 32)])
PERCEPTUAL = np.dtype([*EXACT.descr, ("textured", "?"), ("thumb", "u1", (THUMB, THUMB)), ("hash", "<u8")])
SYMMETRIC = np.dtype([*PERCEPTUAL.descr[:-1], ("hash", "<u8", len(SYMMETRIES))])


def hash_image(data: bytes, kind: np.dtype, max_pixels: int) -> NDArray:
    """Returns one row of ``kind`` (EXACT, PERCEPTUAL or SYMMETRIC), shape (). Raises BadSample if it cannot decode."""
    row = np.zeros((), kind)
    row["sha256"] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
    if kind != EXACT:
        grey = grey_square(data, max_pixels)
        row["thumb"] = thumb = grey.reshape(THUMB, SIDE // THUMB, THUMB, SIDE // THUMB).mean(axis=(1, 3)).round()
        row["textured"] = thumb.std() >= MIN_CONTRAST
        turned = [turn(grey) for turn in SYMMETRIES.values()] if kind == SYMMETRIC else [grey]
        hashes = [perceptual_hash(picture) for picture in turned]
        row["hash"] = hashes if kind == SYMMETRIC else hashes[0]
    row["readable"] = True
    return row


def hash_images(images: Iterable[bytes | BadSample], count: int, kind: np.dtype, max_pixels: int) -> NDArray:
    """Returns one row per image, shape (count,). ``readable`` is False for an image that cannot be read."""
    rows = np.zeros(count, kind)
    for place, data in enumerate(images):
        # pack reports the error when it reads the image again
        with suppress(BadSample):
            if isinstance(data, bytes):
                rows[place] = hash_image(data, kind, max_pixels)
    return rows


def grey_square(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Returns the upright image resized to 32 x 32 grey pixels. A JPEG is decoded at a fraction of its size."""
    with open_image(data, max_pixels) as image:
        if image.format == "JPEG":
            image.draft(None, (DECODED, DECODED))
        grey = upright_rgb(image).convert("L")
        return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0))


def perceptual_hash(grey: NDArray[np.uint8]) -> int:
    """Returns 64 bits: whether each low frequency of 32 x 32 pixels is above their median (imagehash.phash)."""
    picture = Image.fromarray(np.ascontiguousarray(grey))
    bits = imagehash.phash(picture, hash_size=8, highfreq_factor=SIDE // 8).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def correlation(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the Pearson correlation (N,) of thumbnail pairs (N, 16, 16). It ignores brightness and contrast."""
    a, b = (part.reshape(len(part), -1).astype(np.float32) for part in (left, right))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return (a * b).sum(axis=1) / np.maximum(lengths, 1e-6)
