"""What tells that two images are the same picture: their bytes, or, re-encoded, resized or turned, their look.

    bytes  --sha256-->  32 bytes                                       equal: an exact duplicate
    bytes  --decode-->  32 x 32 grey  --phash (imagehash)-->  64 bits  few bits apart: a candidate
                                      --2 x 2 means-------->  16 x 16  and nearly equal thumbnails: a near duplicate

A perceptual hash alone takes one stretch of open sea for another, as the bits of a picture without features are decided
by noise. So each candidate is confirmed by the correlation of the two thumbnails, and images with almost no contrast
are compared by their bytes only.

An aerial photograph has no up: a turned or mirrored copy is the same picture. ``symmetric`` hashes hold the hashes of
all eight (``SYMMETRIES``), so that the other side needs one only.
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

SIDE, THUMB = 32, 16  # pixels: what is hashed, what is kept
DECODED = 64  # pixels that a JPEG is decoded to at least
MIN_CORRELATION = 0.85  # of two thumbnails
MIN_CONTRAST = 1.0  # grey levels, standard deviation over the thumbnail: what has less is compared by its bytes only
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
    """One row of ``kind`` (EXACT, PERCEPTUAL or SYMMETRIC), shape (). Raises BadSample where the look cannot be had."""
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
    """A row an image, shape (count,); one that cannot be read keeps ``readable`` false."""
    rows = np.zeros(count, kind)
    for place, data in enumerate(images):
        # Of what cannot be read packing says why, when it reads it again.
        with suppress(BadSample):
            if isinstance(data, bytes):
                rows[place] = hash_image(data, kind, max_pixels)
    return rows


def grey_square(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """The upright image squeezed to 32 x 32 grey pixels; a JPEG is decoded at a fraction of its size."""
    with open_image(data, max_pixels) as image:
        if image.format == "JPEG":
            image.draft(None, (DECODED, DECODED))
        grey = upright_rgb(image).convert("L")
        return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0))


def perceptual_hash(grey: NDArray[np.uint8]) -> int:
    """64 bits: which of the low frequencies of 32 x 32 pixels lie above their median (imagehash.phash)."""
    picture = Image.fromarray(np.ascontiguousarray(grey))
    bits = imagehash.phash(picture, hash_size=8, highfreq_factor=SIDE // 8).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def correlation(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pearson correlation of thumbnails (N, 16, 16) pair by pair: brightness and contrast do not count."""
    a, b = (part.reshape(len(part), -1).astype(np.float32) for part in (left, right))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return (a * b).sum(axis=1) / np.maximum(lengths, 1e-6)
