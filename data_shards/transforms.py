"""Image bytes -> uint8 (3, H, W), by way of as few pixels as the result needs.

    bytes -> header -> pixel limit -> crop box -> JPEG scaled decoding (draft) -> resize(box=crop) -> flips, turns

The crop is chosen from the header, so that a JPEG is decoded at the 1/2, 1/4 or 1/8 scale that still exceeds the
result, and only the crop is resampled (Pillow's antialiased bicubic). Normalisation is the model's, on the device:
batches stay uint8. Every kind of image ends as RGB: grey, palette, CMYK, 16-bit, RGBA (alpha dropped: in 4-band aerial
TIFFs it is near infrared), animations (first frame), EXIF-rotated (turned upright).
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_shards.sample import BadSample

MAX_PIXELS = 100_000_000
RATIO = (3 / 4, 4 / 3)  # width to height of a random crop, as torchvision's RandomResizedCrop
CROP_ATTEMPTS = 10
DRAFT_MARGIN = 1.25  # a JPEG is decoded at no less than this times the resolution needed: mean error 1/255 at most
REDUCING_GAP = 3.0  # Pillow: indistinguishable from resampling without it
ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # those that swap width and height

Box = tuple[float, float, float, float]


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
    """Random resized crop, flips and quarter turns: uint8 (3, size, size).

    Args:
        data: encoded image
        size: side of the result in pixels
        rng: source of all choices, consumed in the same order whatever the options are
        scale: smallest share of the area that a crop keeps; 1 keeps the whole image, squeezed to a square
        hflip: mirror left to right half of the time
        vflip: mirror top to bottom half of the time
        rot90: turn by a random multiple of 90 degrees
        max_pixels: larger images are refused before decoding

    Raises:
        BadSample: the image cannot be read, or is too large
    """
    with opened(data, max_pixels) as image:
        width, height = upright_size(image)
        box = random_box(width, height, scale, rng)
        pixels = resample(image, box, size)
    choices = rng.random(), rng.random(), rng.randrange(4)
    if hflip and choices[0] < 0.5:
        pixels = pixels[:, ::-1]
    if vflip and choices[1] < 0.5:
        pixels = pixels[::-1]
    if rot90:
        pixels = np.rot90(pixels, choices[2])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def eval_transform(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The largest centred square, resized: uint8 (3, size, size). Raises BadSample as ``train_transform`` does."""
    with opened(data, max_pixels) as image:
        width, height = upright_size(image)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        pixels = resample(image, (left, top, left + side, top + side), size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A Pillow image whose header is read and whose size is allowed; what goes wrong inside becomes BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs above its own, lower limit, and of odd metadata
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > max_pixels:
                    raise BadSample("too many pixels", f"{image.width} x {image.height}, limit {max_pixels}")
                if image.format == "TIFF":
                    image.load()  # Pillow turns TIFFs upright itself, while loading
                yield image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSample("not an image", str(error).split("<")[0]) from error
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, OverflowError, MemoryError) as error:
        raise BadSample("unreadable image", f"{type(error).__name__}: {error}") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) once the EXIF orientation is applied."""
    return (image.height, image.width) if orientation(image) in TURNED else image.size


def orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF is no reason to lose the picture
        return 1


def random_box(width: int, height: int, scale: float, rng: random.Random) -> Box:
    """A random crop of ``scale``..1 of the area, as torchvision's RandomResizedCrop draws it."""
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


def resample(image: Image.Image, box: Box, size: int) -> NDArray[np.uint8]:
    """The part ``box`` of the upright image as uint8 (size, size, 3). Decodes JPEGs at reduced scale where it can."""
    width, height = upright_size(image)
    needed = max(DRAFT_MARGIN * size / (box[2] - box[0]), DRAFT_MARGIN * size / (box[3] - box[1]))
    if image.format == "JPEG" and needed < 1:
        image.draft(image.mode, (math.ceil(image.width * needed), math.ceil(image.height * needed)))
    upright = upright_rgb(image)
    shrink = upright.width / width, upright.height / height
    scaled = (box[0] * shrink[0], box[1] * shrink[1], box[2] * shrink[0], box[3] * shrink[1])
    scaled = (scaled[0], scaled[1], min(scaled[2], upright.width), min(scaled[3], upright.height))
    return np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=scaled, reducing_gap=REDUCING_GAP))


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode, as RGB, turned as the EXIF orientation says."""
    turn = UPRIGHT.get(orientation(image))
    picture = to_rgb(image)
    return picture.transpose(turn) if turn is not None else picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB of 8 bits a channel. 16 bits keep their high byte; floats are stretched to their range."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(np.asarray(image))
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    return image.convert("RGB")


def _from_deep(values: NDArray) -> Image.Image:
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        grey = np.nan_to_num((values - low) / (high - low) * 255 if high > low else values * 0)
    else:
        grey = values / 257 if values.max(initial=0) > 255 else values
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
