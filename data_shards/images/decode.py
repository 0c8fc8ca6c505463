"""Decodes image files of any kind to 8-bit RGB with Pillow, up to a limit of pixels.

    with open_image(data, max_pixels) as image:  # reads the header, decodes nothing
        picture = upright_rgb(image)

Every kind of image becomes RGB: grey, palette, CMYK, RGBA (alpha is dropped: in 4-band aerial TIFFs it is near
infrared), animations (first frame), EXIF-rotated (made upright). Measurements (more than 8 bits, floats, many bands,
no-data) become RGB by the values that they hold, see :mod:`priorclip.data_shards.rasters`. JPEGs for training batches
have a faster path, see :mod:`priorclip.data_shards.images.jpeg`.
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
from priorclip.data_shards.rasters.layout import find_layout
from priorclip.data_shards.rasters.picture import check_layout, raster_picture
from priorclip.data_shards.rasters.values import DEFAULT, ValueRule, find_ranges, has_data, to_bytes

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
def open_image(
    data: bytes, max_pixels: int = MAX_PIXELS, rule: ValueRule = DEFAULT, raw: bool = False
) -> Iterator[Image.Image]:
    """Opens a Pillow image: reads its header, checks its size and the work. Errors in the with block become BadSample.

    Args:
        data: the encoded image
        max_pixels: larger images are refused
        rule: how a raster of measurements becomes 8 bits; such an image is RGB, with its range in ``info["raster"]``
        raw: give the measurements themselves, for a caller that scales them; refused if Pillow reads them wrong
    """
    with image_errors():
        layout = find_layout(data)
        if layout is not None and not raw:
            with raster_picture(data, layout, max_pixels, rule) as image:
                yield image
            return
        if layout is not None and not layout.pillow:
            raise BadSample("not a single band", str(layout))
        with Image.open(io.BytesIO(data)) as image:
            check_header(image, data, max_pixels)
            if image.format == "TIFF":
                image.load()  # Pillow makes TIFFs upright itself while loading
            yield image


def count_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Returns the number of pixels in the header of an image, and decodes nothing. Raises BadSample.

    A raster of measurements counts more, because its values take memory beside the picture.
    """
    with image_errors():
        layout = find_layout(data)
        if layout is not None:
            check_layout(data, layout, max_pixels)
            return 2 * layout.width * layout.height
        with Image.open(io.BytesIO(data)) as image:
            check_header(image, data, max_pixels)
            return image.width * image.height


def check_header(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Raises BadSample for a format that we do not read, too many pixels, or too much work."""
    if image.format not in FORMATS:
        raise BadSample("not an image", f"the format {image.format} is not supported")
    check_pixels(image.width, image.height, max_pixels)
    parts = getattr(image, "tile", None)  # (decoder, box, offset, arguments), before the pixels are decoded
    check_work(data, image.format, image.width, image.height, max_pixels, parts[0][0] if parts else "")


@contextmanager
def image_errors() -> Iterator[None]:
    """Turns what decoders raise for damaged bytes into BadSample, and keeps Pillow's warnings silent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns above its own lower limit, and about odd metadata
            yield
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
    """Converts any mode to 8-bit RGB. Deep values are scaled to percentiles 2 to 98 of those that are valid."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(np.asarray(image))
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    return image.convert("RGB")


def _from_deep(values: NDArray) -> Image.Image:
    valid = has_data(values)
    if not valid.any():
        raise BadSample("too few valid pixels", "no value is a measurement")
    ranges = find_ranges([values[valid]], DEFAULT)
    return Image.fromarray(to_bytes(values[..., None], valid, ranges, DEFAULT.fill)[..., 0]).convert("RGB")
