"""JPEGs by way of libjpeg-turbo (simplejpeg), which decodes at 1/2, 1/4 or 1/8 scale where that is enough.

    jpeg_size(data)                  (1024, 768), or None: not a plain JPEG, so that Pillow must look at it
    decoded(data, (1024, 768), 2)    uint8 (384, 512, 3)

Plain is what aerial JPEGs are: grey or YCbCr, upright. CMYK, turned and damaged ones give None or ValueError: Pillow
then has the say, so that one rule decides what is a bad image. At full scale the pixels are Pillow's, bit for bit.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import open_image, orientation

START, SCAN, EXIF = b"\xff\xd8\xff", b"\xda", b"Exif\0\0"
PLAIN = ("YCbCr", "Gray")
CUT = "premature end of data segment"  # libjpeg's warning: an end mark stands before the pixels do


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from the header of a plain JPEG, None for everything else."""
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
    """Does the EXIF block say that the picture is not upright? Few JPEGs have one, and only these are looked into."""
    if not has_exif(data):
        return False
    with open_image(data, pixels) as image:
        return orientation(image) != 1


def has_exif(data: bytes) -> bool:
    """Is there an EXIF segment before the pixels? Hops from segment to segment; damaged ones end the walk."""
    place = len(START) - 1
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != SCAN:
        if data[place + 4 : place + 10] == EXIF:
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return False


def decode_jpeg(data: bytes, size: tuple[int, int], denominator: int) -> NDArray[np.uint8]:
    """RGB pixels, uint8 (ceil(H / d), ceil(W / d), 3).

    Args:
        data: a plain JPEG
        size: what ``jpeg_size`` gave, (W, H)
        denominator: d, one of 1, 2, 4, 8

    Raises:
        ValueError: damaged, be it ever so slightly
    """
    if denominator == 1:
        return simplejpeg.decode_jpeg(data)
    width, height = (-(-side // denominator) for side in size)
    return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)


def check_complete(data: bytes) -> None:
    """Refuse a JPEG that was cut and then closed by an end mark. Raises BadSample.

    libjpeg fills what is missing with grey and warns; Pillow, which finds every other cut, passes over the warning.
    """
    if not data.startswith(START):
        return
    try:
        *_, colours, _ = simplejpeg.decode_jpeg_header(data)
        simplejpeg.decode_jpeg(data, colours if colours == "CMYK" else "RGB", min_height=1, min_width=1)
    except ValueError as error:
        if CUT in str(error):
            raise BadSample("unreadable image", str(error)) from error
