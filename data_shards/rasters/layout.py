"""Reads from the header which bands and types a TIFF, JPEG 2000 or PNG holds, and whether Pillow reads it right.

    find_layout(photo)     None: an ordinary picture of 8 bits, which Pillow reads right
    find_layout(scene)     Layout("TIFF", 10980, 10980, 13, "uint16", "MINISBLACK, deflate")

Pillow cannot open most TIFFs of measurements. Of PNGs and JPEG 2000s of 3 x 16 bits it drops the low bits without a
word. All of these get a layout, and :mod:`priorclip.data_shards.rasters.picture` reads them.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
PNG = b"\x89PNG\r\n\x1a\n"
JP2, CODESTREAM = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, FORMAT, NODATA = 256, 257, 258, 259, 262, 277, 339, 42113
ORIENTATION = 274
COLOURS = {0: "MINISWHITE", 1: "MINISBLACK", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
PACKINGS = {
    1: "uncompressed",
    5: "LZW",
    6: "old JPEG",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34887: "LERC",
    34925: "LZMA",
    50000: "ZSTD",
    50001: "WebP",
    50002: "JPEG XL",
}
PILLOW_UNPACKS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex int", 6: "complex float"}
# Photometric interpretations that Pillow reads right at 8 bits or fewer, by the number of bands.
ORDINARY = {1: (0, 1, 3), 2: (1,), 3: (2, 6, 8), 4: (2, 5)}
PILLOW_VALUES = ("uint16", "int16", "int32", "float32")  # of one band, whose values Pillow keeps
SIZE_PLACE = 8  # of the image size in a JPEG 2000 codestream


@dataclass(frozen=True)
class Layout:
    """What the header of a raster says.

    Args:
        kind: TIFF, JPEG2000 or PNG
        width, height: in pixels
        bands: number of bands, with alpha
        type: type of a value: uint8, int16, float32, complex int32 ...
        detail: colour model and compression
        pillow: whether Pillow reads the values right
        nodata: text of tag 42113, the value of pixels without data, or None
        orientation: how to turn the picture upright, as in EXIF
    """

    kind: str
    width: int
    height: int
    bands: int
    type: str
    detail: str = ""
    pillow: bool = False
    nodata: str | None = None
    orientation: int = 1

    @property
    def complex(self) -> bool:
        return self.type.startswith("complex")

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"a {self.kind} of {self.bands} {'band' if self.bands == 1 else 'bands'} of {self.type}{detail}"


def find_layout(data: bytes) -> Layout | None:
    """Returns the layout of an encoded raster, or None for a picture that Pillow reads right and for other formats.

    A damaged header raises what Pillow raises for it: OSError, ValueError, SyntaxError and others.
    """
    if data.startswith(TIFF):
        return tiff_layout(data)
    if data.startswith(PNG) and len(data) > 25 and data[24] == 16:
        bands = {0: 1, 2: 3, 4: 2, 6: 4}.get(data[25], 1)
        wide, high = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        return Layout("PNG", wide, high, bands, "uint16", pillow=bands == 1)
    if data.startswith((JP2, CODESTREAM)):
        return jpeg2000_layout(data)
    return None


def tiff_layout(data: bytes) -> Layout | None:
    """Returns the layout of the first image of a TIFF, or None if it is an ordinary picture."""
    big = data[2:4] in (b"+\0", b"\0+")
    directory = ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    bands = int(one(directory, SAMPLES, 1))
    bits = many(directory, BITS, 1)
    forms = many(directory, FORMAT, 1)
    colour, packing = int(one(directory, PHOTOMETRIC, 1)), int(one(directory, COMPRESSION, 1))
    nodata = directory.get(NODATA)
    same = len(set(bits)) == 1 and len(set(forms)) == 1
    unpacks = packing in PILLOW_UNPACKS
    kind = f"{KINDS.get(forms[0], 'unknown')}{bits[0]}" if same else f"mixed types ({', '.join(map(str, bits))} bits)"
    small = same and bits[0] <= 8 and KINDS.get(forms[0]) == "uint" and colour in ORDINARY.get(bands, ())
    if small and unpacks and nodata is None:
        return None
    detail = f"{COLOURS.get(colour, f'colours {colour}')}, {PACKINGS.get(packing, f'compression {packing}')}"
    deep = bands == 1 and colour in (0, 1) and kind in PILLOW_VALUES
    size = int(one(directory, WIDTH, 0)), int(one(directory, HEIGHT, 0))
    text = None if nodata is None else str(nodata).strip("\0 ")
    turn = int(one(directory, ORIENTATION, 1))
    # Without a nodata value Pillow may try compressions that its own libtiff may or may not have.
    return Layout("TIFF", *size, bands, kind, detail, (small and nodata is None) or (deep and unpacks), text, turn)


def one(directory: ImageFileDirectory_v2, tag: int, default: Any) -> Any:
    value = directory.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def many(directory: ImageFileDirectory_v2, tag: int, default: Any) -> tuple:
    value = directory.get(tag, default)
    return value if isinstance(value, tuple) and value else (value,)


def jpeg2000_layout(data: bytes) -> Layout | None:
    """Returns the layout of a JPEG 2000 with other than 1, 3 or 4 bands, or more than 8 bits; None for others."""
    found = re.search(re.escape(CODESTREAM), data)
    header = data[found.start() : found.start() + 64] if found else b""
    if len(header) < 43:
        return None  # damaged: Pillow says how
    wide, high, left, top = (int.from_bytes(header[SIZE_PLACE + at : SIZE_PLACE + at + 4]) for at in (0, 4, 8, 12))
    bands, depth = int.from_bytes(header[40:42]), (header[42] & 0x7F) + 1
    signed = bool(header[42] & 0x80)
    if depth <= 8 and not signed and bands in (1, 3, 4):
        return None
    return Layout("JPEG2000", wide - left, high - top, bands, f"{'int' if signed else 'uint'}{8 if depth <= 8 else 16}")
