"""Decodes image files of any kind to 8-bit RGB with Pillow, up to a limit of pixels.

    with open_image(data, max_pixels) as image:  # reads the header, decodes nothing
        picture = upright_rgb(image)

Every kind of image becomes RGB: grey, palette, CMYK, 16-bit, RGBA (alpha is dropped: in 4-band aerial TIFFs it is near
infrared), animations (first frame), EXIF-rotated (made upright). JPEGs for training batches have a faster path, see
:mod:`priorclip.data_shards.images.jpeg`.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decoding_work import check_work

MAX_PIXELS = 100_000_000
# Formats of web scrapes and sensors. Pillow reads forty more, but for EPS it would start Ghostscript.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "AVIF", "PPM")
DECODING = (  # errors that decoders raise for damaged bytes
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError),
    *(struct.error, zlib.error),
)
ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> the operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # orientations that swap width and height


@contextmanager
def open_image(data: bytes, max_pixels: int = MAX_PIXELS, decode: bool = True) -> Iterator[Image.Image]:
    """Opens a Pillow image: reads its header, checks its size and the work. Errors in the with block become BadSample.

    ``decode=False`` promises that only the header is used, so that a TIFF is not decoded here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns above its own lower limit, and about odd metadata
            with Image.open(io.BytesIO(data)) as image:
                if image.format not in FORMATS:
                    raise BadSample("not an image", f"the format {image.format} is not supported")
                check_pixels(image.width, image.height, max_pixels)
                check_work(data, image.format, image.width, image.height, max_pixels)
                if image.format == "TIFF" and decode:
                    image.load()  # Pillow makes TIFFs upright itself while loading
                yield image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSample("not an image", str(error).split("<")[0]) from error
    except DECODING as error:
        raise BadSample("unreadable image", f"{type(error).__name__}: {error}") from error


def check_pixels(width: int, height: int, limit: int) -> None:
    """Raises BadSample if an image has too many pixels, before memory is allocated for them."""
    if width * height > limit:
        raise BadSample("too many pixels", f"{width} x {height}, limit {limit}")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns (width, height) after the EXIF orientation is applied."""
    return (image.height, image.width) if orientation(image) in TURNED else image.size


def orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # an image with damaged EXIF is still usable
        return 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decodes to RGB and applies the EXIF orientation."""
    turn = UPRIGHT.get(orientation(image))
    picture = to_rgb(image)
    return picture.transpose(turn) if turn is not None else picture


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB. 16-bit values keep their high byte; floats are scaled to their range."""
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
