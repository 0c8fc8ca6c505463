"""Decodes JPEGs with libjpeg-turbo (simplejpeg), at 1/2, 1/4 or 1/8 scale if that is enough.

    jpeg_size(data)                      (1024, 768), or None: not a plain JPEG, so that Pillow must read it
    decode_jpeg(data, (1024, 768), 2)    uint8 (384, 512, 3)

A plain JPEG is grey or YCbCr and upright, as aerial JPEGs are. CMYK, rotated and damaged ones give None or ValueError.
Pillow then decides, so that one rule says which image is bad. At full scale the pixels equal Pillow's, bit for bit.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import MAX_PIXELS, open_image, orientation

START, SCAN, EXIF = b"\xff\xd8\xff", b"\xda", b"Exif\0\0"
PLAIN = ("YCbCr", "Gray")
CUT = "premature end of data segment"  # libjpeg's warning: the end mark comes before the last pixels


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (width, height) from the header of a plain JPEG, and None for other data."""
    if not data.startswith(START):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in PLAIN or is_rotated(data, width * height):
        return None
    return width, height


def is_rotated(data: bytes, pixels: int) -> bool:
    """Returns True if the EXIF orientation is not upright. Few JPEGs have EXIF, so this is cheap."""
    if not has_exif(data):
        return False
    with open_image(data, max(pixels, MAX_PIXELS)) as image:
        return orientation(image) != 1


def has_exif(data: bytes) -> bool:
    """Returns True if there is an EXIF segment before the pixels. Stops at a damaged segment."""
    place = len(START) - 1
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != SCAN:
        if data[place + 4 : place + 10] == EXIF:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return False


def decode_jpeg(data: bytes, size: tuple[int, int], denominator: int) -> NDArray[np.uint8]:
    """Returns RGB pixels, uint8 (ceil(H / d), ceil(W / d), 3).

    Args:
        data: a plain JPEG
        size: (W, H) from ``jpeg_size``
        denominator: d, one of 1, 2, 4, 8

    Raises:
        ValueError: the data is damaged, even slightly
    """
    if denominator == 1:
        return simplejpeg.decode_jpeg(data)
    width, height = (-(-side // denominator) for side in size)
    return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)


def check_complete(data: bytes) -> None:
    """Raises BadSample for a JPEG that was cut short and then got an end mark.

    libjpeg fills the missing pixels with grey and warns. Pillow finds all other cuts, but it ignores this warning.
    """
    if not data.startswith(START):
        return
    try:
        *_, colours, _ = simplejpeg.decode_jpeg_header(data)
        simplejpeg.decode_jpeg(data, colours if colours == "CMYK" else "RGB", min_height=1, min_width=1)
    except ValueError as error:
        if CUT in str(error):
            raise BadSample("unreadable image", str(error)) from error
