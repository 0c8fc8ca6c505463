"""Bounds the work of decoders that a small file can ask for without end, before a pixel is decoded.

    check_work(data, "JPEG", 1024, 768, limit=100_000_000)      # BadSample: 5000 scans ...

The number of pixels does not bound these formats. A progressive JPEG can have thousands of scans, and each visits every
pixel: 3 ns a pixel and scan. A JPEG 2000 of 300 bytes can divide its pixels into blocks of 4 x 4 with 500 bytes of
memory each, into precincts with 10 kB each, and say that each precinct has 65,535 packets, 0.6 us each. libtiff has a
limit of its own for the scans of a JPEG inside a TIFF, which is too high for large images, so we lower it. Pillow
decodes run-length BMPs and some PPMs in Python: 1 us a byte, and 1 MB of comments takes 20 s. All other formats take a
time that their pixels bound, and that of rasters of many bands is bounded in rasters/.

There is no limit in seconds, because the same image must be good or bad on every machine.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
from pathlib import Path

from priorclip.data_shards.format.sample import BadSample

MAX_SCANS = 100  # encoders write about ten
SCANS_OF_LARGEST = 15  # scans of an image with as many pixels as are allowed; smaller images can have more
MAX_BLOCKS, MAX_PRECINCTS, MAX_PACKETS = 1 << 20, 1 << 16, 1 << 21  # of a JPEG 2000: 500 MB, 700 MB, 1.5 s
IN_PYTHON = ("bmp_rle", "ppm", "ppm_plain")  # Pillow's decoders that are written in Python
MAX_IN_PYTHON, MAX_COMMENTS = 1 << 22, 1000  # bytes, and pixels: 4 s
MAX_STREAMS = 16  # places where the stream of a JPEG 2000 could begin; all of them are checked

SCAN, END = 0xDA, 0xD9
ALONE = frozenset((*range(0xC0), *range(0xD0, 0xD9), 0xFF))  # markers without a length
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JP2 = b"\0\0\0\x0cjP  "
CODESTREAM = b"\xff\x4f\xff\x51"
COD, COC, SOT, SOD = 0x52, 0x53, 0x90, 0x93

os.environ.setdefault("LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER", str(SCANS_OF_LARGEST))


def check_work(data: bytes, kind: str | None, width: int, height: int, limit: int, decoder: str = "") -> None:
    """Raises BadSample if decoding takes far more work than usual for the number of pixels.

    Args:
        data: the encoded image
        kind: Pillow's name of its format
        width, height: its size in pixels
        limit: pixels that an image may have
        decoder: Pillow's name of its decoder, if Pillow reads it
    """
    if decoder in IN_PYTHON:
        comments = data.count(b"#") if decoder == "ppm_plain" else 0
        if max(len(data), width * height) > MAX_IN_PYTHON or comments > MAX_COMMENTS:
            detail = f"{kind} ({decoder}) of {len(data)} bytes, {width} x {height} pixels and {comments} comments"
            raise BadSample("slow to decode", f"{detail}: save it as PNG")
    if kind in ("JPEG", "MPO"):
        check_scans(data, width * height, limit)
    if kind == "JPEG2000":
        check_codestreams(data)


def check_scene(path: Path) -> None:
    """Raises BadSample for a JPEG 2000 file of which a tile takes far more work than usual; passes other files."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == CODESTREAM or data[: len(JP2)] == JP2:
            check_codestreams(data, whole=False)


def check_codestreams(data: bytes | mmap.mmap, whole: bool = True) -> None:
    """Raises BadSample for a JPEG 2000 whose parts would take gigabytes: of the ``whole`` image, or of one tile."""
    starts = [found.start() for found in itertools.islice(re.finditer(re.escape(CODESTREAM), data), MAX_STREAMS + 1)]
    if len(starts) > MAX_STREAMS:
        raise BadSample("unreadable image", f"a JPEG 2000 with more than {MAX_STREAMS} codestreams")
    with memoryview(data) as view:
        for start in starts:
            with view[start:] as stream:
                check_codestream(stream, whole)


def check_scans(data: bytes, pixels: int, limit: int) -> None:
    """Raises BadSample for a JPEG of so many pixels with more scans than the limit of pixels allows."""
    most = min(MAX_SCANS, SCANS_OF_LARGEST * limit // max(1, pixels))
    if data.count(b"\xff\xda") > most and (scans := count_scans(data)) > most:
        raise BadSample("too many scans", f"{scans} scans of {pixels} pixels, limit {most}")


def count_scans(data: bytes) -> int:
    """Returns the number of scans of a JPEG. Thumbnails inside segments do not count.

    It never counts fewer than libjpeg decodes: where a file is damaged, it goes on at the next marker, as libjpeg does.
    """
    scans, place = 0, 2
    while (found := MARKER.search(data, place)) and (marker := data[found.start() + 1]) != END:
        scans += marker == SCAN
        place = found.end()
        if marker not in ALONE:
            place += int.from_bytes(data[place : place + 2])
    return scans


def check_codestream(data: memoryview, whole: bool) -> None:
    """Raises BadSample for a JPEG 2000 codestream whose parts would take gigabytes, or with a damaged header."""
    try:
        size = [int.from_bytes(data[place : place + 4]) for place in range(8, 40, 4)]
        components = int.from_bytes(data[40:42])
        wide, high, left, top, tile_wide, tile_high, tile_left, tile_top = size
        tiles = -(-(wide - tile_left) // tile_wide) * -(-(high - tile_top) // tile_high) if whole else 1
        tile = min(wide - left, tile_wide), min(high - top, tile_high)
        layers, styles = coding_styles(data)
        for style in styles:
            blocks, precincts = (tiles * components * count for count in count_parts(*tile, style))
            if blocks > MAX_BLOCKS or precincts > MAX_PRECINCTS or precincts * layers > MAX_PACKETS:
                parts = f"{blocks} blocks, {precincts} precincts, {precincts * layers} packets"
                raise BadSample("too many parts", f"a JPEG 2000 of {parts}")
    except (IndexError, ZeroDivisionError) as error:
        raise BadSample("unreadable image", "the header of a JPEG 2000 is damaged") from error


def coding_styles(data: memoryview) -> tuple[int, set[bytes]]:
    """Returns the largest number of layers, and the different SPcod and SPcoc parameters, of all headers.

    A codestream has them in its main header and in its tile-parts. Raises IndexError for an empty one.
    """
    components = int.from_bytes(data[40:42])
    layers, styles = 1, set()
    place, next_part = 2, len(data)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        body = bytes(data[place + 4 : place + 2 + length]) if marker in (SOT, COD, COC) else b""
        if marker == SOT:
            part = int.from_bytes(body[2:6])
            next_part = place + part if part else len(data)
        if marker == COD:
            layers = max(layers, int.from_bytes(body[2:4]))
            styles.add(body[5:] if body[0] & 1 else body[5:10])
        if marker == COC:
            body = body[1 if components < 257 else 2 :]
            styles.add(body[1:] if body[0] & 1 else body[1:6])
        place = max(next_part, place + 2) if marker == SOD else place + 2 + length
    return layers, styles


def count_parts(wide: int, high: int, style: bytes) -> tuple[int, int]:
    """Returns the number of blocks and precincts of one component of a tile of ``wide`` x ``high`` pixels.

    Args:
        wide, high: of the tile
        style: decomposition levels, logarithms of the block's sides minus 2, style, filter, and from byte 5 on a byte
            for each resolution with the logarithms of the precinct's sides; without them a precinct has 2^15 pixels
    """
    levels, block_wide, block_high = min(style[0], 32), style[1] % 16 + 2, style[2] % 16 + 2
    sides = style[5:] or b"\xff" * (levels + 1)
    blocks = precincts = 0
    for resolution in range(levels + 1):
        shrunk, exponents = levels - resolution, sides[resolution]
        count = parts = 1
        for length, exponent, block in ((wide, exponents % 16, block_wide), (high, exponents >> 4, block_high)):
            length = -(-length >> shrunk)
            count *= max(1, -(-length >> exponent))
            parts *= max(1, -(-length >> min(block, exponent)))
        precincts, blocks = precincts + count, blocks + parts
    return blocks, precincts
