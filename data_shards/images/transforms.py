"""Image bytes -> uint8 (3, S, S). Decodes only as many pixels as the result needs.

    bytes -> header -> pixel limit -> crop box -> decode at 1/1 .. 1/8 -> resize the crop -> flips, turns

The header is enough to choose the crop. So a JPEG is decoded at the smallest scale that still exceeds the result, and
only the crop is resampled. Both steps use vector units: libjpeg-turbo, and torch's antialiased bicubic on uint8, whose
result equals Pillow's (0.004 / 255 apart). The model normalizes the pixels on the device, so batches stay uint8.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from priorclip.data_shards.images.decode import MAX_PIXELS, check_pixels, open_image, upright_rgb, upright_size
from priorclip.data_shards.images.decoding_work import check_work
from priorclip.data_shards.images.jpeg import check_complete, decode_jpeg, jpeg_size

RATIO = (3 / 4, 4 / 3)  # aspect ratios of a random crop, as in torchvision's RandomResizedCrop
CROP_ATTEMPTS = 10
SCALES = (8, 4, 2)  # scale denominators of JPEG decoding
MARGIN = 1.1  # a JPEG is decoded at this times the needed resolution or more; docs/data.md gives the error

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the upright image


class Turn(NamedTuple):
    """How an image is mirrored, left to right and top to bottom, and then turned counter-clockwise."""

    hflip: bool
    vflip: bool
    quarters: int


class SeenPart:
    """Chooses the part of an image that is seen, and remembers it: what lies in the image can then be cut as it is.

    Args:
        choose: returns a box for an image of (width, height)
    """

    def __init__(self, choose: Callable[[int, int], Box]) -> None:
        self.choose = choose
        self.size, self.box = (0, 0), (0, 0, 0, 0)

    def __call__(self, width: int, height: int) -> Box:
        self.size, self.box = (width, height), self.choose(width, height)
        return self.box


def train_transform(
    data: bytes,
    size: int,
    rng: random.Random,
    *,
    scale: float = 0.5,
    hflip: bool = True,
    vflip: bool = True,
    rot90: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Random resized crop, flips and quarter turns: uint8 (3, size, size), a non-contiguous view.

    Args:
        data: encoded image
        size: side of the result in pixels
        rng: source of all choices; used in the same order for all options
        scale: smallest share of the area that a crop keeps; 1 keeps the whole image, resized to a square
        hflip: mirror left to right with probability 0.5
        vflip: mirror top to bottom with probability 0.5
        rot90: rotate by a random multiple of 90 degrees
        max_pixels: larger images are refused before decoding

    Raises:
        BadSample: the image cannot be read, or is too large
    """
    pixels = random_crop(data, size, rng, scale=scale, max_pixels=max_pixels)
    return flip_and_turn(pixels, rng, hflip=hflip, vflip=vflip, rot90=rot90)


def random_crop(
    data: bytes, size: int, rng: random.Random, *, scale: float = 0.5, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Random resized crop: uint8 (3, size, size). It draws nothing from ``rng`` if ``scale`` is 1."""
    return crop_and_resize(data, size, random_part(size, rng, scale), max_pixels)


def random_part(size: int, rng: random.Random, scale: float) -> SeenPart:
    """Returns a random crop with ``scale`` to 1 of the area, for a result of (size, size)."""
    return SeenPart(lambda wide, high: align_box(random_box(wide, high, scale, rng), size))


def flip_and_turn(
    pixels: NDArray[np.uint8], rng: random.Random, *, hflip: bool, vflip: bool, rot90: bool
) -> NDArray[np.uint8]:
    """Random flips and quarter turns of (C, S, S). They are views: the pixels are copied once, into the batch."""
    return turn_pixels(pixels, draw_turn(rng, hflip=hflip, vflip=vflip, rot90=rot90))


def draw_turn(rng: random.Random, *, hflip: bool, vflip: bool, rot90: bool) -> Turn:
    """Draws flips, each with probability 0.5, and quarter turns, as far as they are allowed."""
    choices = rng.random(), rng.random(), rng.randrange(4)
    return Turn(hflip and choices[0] < 0.5, vflip and choices[1] < 0.5, choices[2] if rot90 else 0)


def turn_pixels(pixels: NDArray[np.uint8], turn: Turn) -> NDArray[np.uint8]:
    """Returns a view of (C, S, S), mirrored and turned."""
    if turn.hflip:
        pixels = pixels[:, :, ::-1]
    if turn.vflip:
        pixels = pixels[:, ::-1]
    return rotate(pixels, turn.quarters)


def eval_transform(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Largest centred square, resized: uint8 (3, size, size). Raises BadSample as ``train_transform`` does."""
    return np.ascontiguousarray(crop_and_resize(data, size, centred_square, max_pixels))


def centred_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, scale: float, rng: random.Random) -> Box:
    """Draws a random crop with ``scale`` to 1 of the area, as torchvision's RandomResizedCrop does."""
    if scale >= 1:
        return 0, 0, width, height
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = rng.randint(0, width - wide), rng.randint(0, height - high)
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def align_box(box: Box, size: int) -> Box:
    """Moves the edges to whole pixels of the decoding scale, by less than one pixel of the result."""
    step = denominator(box, size)
    left, top, right, bottom = (edge // step * step for edge in box)
    return left, top, right, bottom


def denominator(box: Box, size: int) -> int:
    """Returns the largest of 8, 4, 2, 1 at which the scaled box still has MARGIN times the pixels of the result."""
    spare = min(box[2] - box[0], box[3] - box[1]) / (MARGIN * size)
    return next((step for step in SCALES if step <= spare), 1)


def decoding_scale(box: Box, size: int, width: int, height: int) -> int:
    """Like ``denominator``, but the box must lie on whole pixels of that scale or on the edge of the image."""
    step = denominator(box, size)
    left, top, right, bottom = box
    inner = [left, top, 0 if right == width else right, 0 if bottom == height else bottom]
    return math.gcd(step, *inner)


def crop_and_resize(data: bytes, size: int, choose: Callable[[int, int], Box], max_pixels: int) -> NDArray[np.uint8]:
    """Returns the box that ``choose`` picks from (width, height), as uint8 (3, size, size). Raises BadSample."""
    box = None
    plain = jpeg_size(data)
    if plain:
        check_pixels(*plain, max_pixels)
        check_work(data, "JPEG", *plain, max_pixels)
        box = choose(*plain)
        step = decoding_scale(box, size, *plain)
        try:
            return resize_crop(decode_jpeg(data, plain, step), box, step, size)
        except ValueError:
            pass  # damaged: Pillow decides if the image is bad, as for other formats
    with open_image(data, max_pixels) as image:
        check_complete(data)
        box = box or choose(*upright_size(image))
        return resize_crop(np.array(upright_rgb(image)), box, 1, size)


def resize_crop(pixels: NDArray[np.uint8], box: Box, step: int, size: int) -> NDArray[np.uint8]:
    """Returns the box, in pixels of the full image, from pixels (H, W, 3) at scale 1/step, as uint8 (3, size, size)."""
    left, top, right, bottom = (-(-edge // step) for edge in box)
    crop = np.ascontiguousarray(pixels[top:bottom, left:right])[None]  # a contiguous crop saves a third of torch's time
    channels_last = torch.from_numpy(crop.transpose(0, 3, 1, 2))
    return interpolate(channels_last, (size, size), mode="bicubic", antialias=True).numpy()[0]


def rotate(pixels: NDArray[np.uint8], quarters: int) -> NDArray[np.uint8]:
    """Returns a view of (C, S, S), rotated counter-clockwise by 0 to 3 quarters, as ``np.rot90`` does."""
    if quarters == 2:
        return pixels[:, ::-1, ::-1]
    if quarters == 1:
        return pixels[:, :, ::-1].swapaxes(1, 2)
    return pixels.swapaxes(1, 2)[:, :, ::-1] if quarters else pixels
