"""Bad images are refused, odd but sound ones are decoded right (see bad_streams.py)."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_streams import (
    CAPTION,
    SIDE,
    SOUND,
    among_sound,
    epoch_of,
)
from PIL import Image
from small_data import encoded, picture, write_tar

from priorclip.data_shards import BadSample
from priorclip.data_shards.images.transforms import eval_transform

pytestmark = pytest.mark.usefixtures("time_limit")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, kind: int, pixels: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = (header, *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int) -> bytes:
    """Returns ``count`` zeros compressed by zlib, made from one compressed MB repeated."""

    def deflated(length: int, end: int) -> bytes:
        squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
        return squeeze.compress(bytes(length)) + squeeze.flush(end)

    blocks = deflated(1 << 20, zlib.Z_FULL_FLUSH) * (count >> 20) + deflated(count & 0xFFFFF, zlib.Z_FINISH)
    return b"\x78\x01" + blocks + struct.pack(">I", count % 65521 << 16 | 1)  # Adler-32 of zeros


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Returns bytes and reason by name."""
    photo = picture(1, 320, 320)
    jpeg, whole_png = encoded(photo, quality=90), encoded(photo, "PNG")
    jpeg_header = bytearray(jpeg)
    place = jpeg.index(b"\xff\xc0")
    jpeg_header[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)
    tiff = bytearray(encoded(photo, "TIFF"))
    entries = struct.unpack_from("<I", tiff, 4)[0]
    for number in range(struct.unpack_from("<H", tiff, entries)[0]):
        place = entries + 2 + 12 * number
        if struct.unpack_from("<H", tiff, place)[0] in (256, 257):  # width and height
            struct.pack_into("<HII", tiff, place + 2, 4, 1, 60_000)
    webp = bytearray(encoded(photo, "WEBP", lossless=True))
    struct.pack_into("<I", webp, 21, 16_383 - 1 | 16_383 - 1 << 14 | struct.unpack_from("<I", webp, 21)[0] & 0xF << 28)
    gif = bytearray(encoded(photo, "GIF"))
    struct.pack_into("<HH", gif, 6, 65_535, 65_535)
    small = zlib.compress(b"\0" + bytes(3))
    assert len(zlib.decompress(zeros(3_000_001))) == 3_000_001  # it checks the checksum too
    return {
        "empty": (b"", "empty image"),
        "page": (b"<!doctype html><html><body>403 Forbidden</body></html>", "not an image"),
        "text": (b"Not found\n", "not an image"),
        "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not an image"),
        "half": (jpeg[: len(jpeg) // 2], "unreadable image"),
        "tail": (jpeg[:-400], "unreadable image"),
        "head": (jpeg[:200], "unreadable image"),
        "repaired": (jpeg[: len(jpeg) // 2] + b"\xff\xd9", "unreadable image"),
        "hole": (jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "unreadable image"),
        "half-progressive": (encoded(photo, quality=90, progressive=True)[:-3000], "unreadable image"),
        "half-png": (whole_png[: len(whole_png) // 2], "unreadable image"),
        "half-webp": (encoded(photo, "WEBP")[:-200], "unreadable image"),
        "half-tiff": (encoded(photo, "TIFF", compression="tiff_lzw")[:-2000], "not an image"),
        "bomb-png": (png(40_000, 40_000, 1, 0, zeros(40_000 * 5001)), "too many pixels"),
        "bomb-grey": (png(40_000, 40_000, 8, 2, b"x"), "too many pixels"),
        "bomb-jpeg": (bytes(jpeg_header), "too many pixels"),
        "bomb-tiff": (bytes(tiff), "too many pixels"),
        "bomb-webp": (bytes(webp), "too many pixels"),
        "bomb-gif": (bytes(gif), "too many pixels"),
        "bomb-text": (png(1, 1, 8, 2, small, chunk(b"zTXt", b"a\0\0" + zeros(1 << 24))), "unreadable image"),
    }


@pytest.fixture(scope="module")
def bad_image_cases() -> dict[str, tuple[bytes, str]]:
    return bad_images()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images(bad_image_cases: dict[str, tuple[bytes, str]], words: object, tmp_path: Path, workers: int) -> None:
    members: dict[str, bytes] = {}
    for name, (data, _) in bad_image_cases.items():
        members |= {f"{name}.jpg": data, f"{name}.json": CAPTION}
    epoch = epoch_of(
        write_tar(tmp_path / "a.tar", among_sound(members)), words, tmp_path, workers=workers, start_method="fork"
    )
    assert epoch.reasons == {name: reason for name, (_, reason) in bad_image_cases.items()}
    assert len(epoch.sound()) == SOUND


def test_a_bomb_is_refused_before_it_takes_memory(bad_image_cases: dict[str, tuple[bytes, str]]) -> None:
    """The largest would take 4.8 GB, but 3 GB more address space than now is enough for all."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (3 << 30), limits[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for name, (data, reason) in bad_image_cases.items():
            if name.startswith("bomb"):
                with pytest.raises(BadSample) as error:
                    eval_transform(data, SIDE)
                assert error.value.reason == reason, name
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def ycck(photo: Image.Image) -> tuple[bytes, np.ndarray]:
    """Returns an Adobe JPEG with inverted inks stored as YCCK, and the RGB of its inks."""
    rgb = np.asarray(photo).astype(int)
    black = rgb.max(axis=2) * 0 + 200  # Adobe's form: 255 is no ink
    # libjpeg's YCCK -> CMYK gives 255 - RGB of the YCC planes; Adobe's inversion turns it into inks.
    planes = np.asarray(photo.convert("YCbCr"))
    stored = np.dstack([planes, black.astype(np.uint8)])
    # Pillow inverts the CMYK that it writes and keeps the colour space: undo the inversion, set the marker.
    data = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=97, subsampling=0))
    marker = data.index(b"Adobe")
    data[marker + 11] = 2
    return bytes(data), (255 - rgb) * (black / 255)[..., None]


# Made by `cjpeg -arithmetic -quality 90 -sample 1x1` from ramps(): Pillow reads this coding but cannot write it.
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYU"
    "GBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAQABADAREA"
    "AhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANnZ306FeB8QWrU2nQ+eMoEdszfH/OPs7LMsTUphLc55WqhjeBtsCwSf/jNxbClUOmd3j4b/"
    "2Q=="
)


def ramps() -> np.ndarray:
    across, down = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    return np.dstack([20 + 12 * across, 40 + 9 * down, 30 + 5 * (across + down)])


def odd_images() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Returns unusual but sound images: bytes, expected (H, W, 3), tolerated mean difference."""
    photo = picture(2, SIDE, SIDE)
    rgb = np.asarray(photo).astype(int)
    grey_image = photo.convert("L")
    grey = np.repeat(np.asarray(grey_image).astype(int)[..., None], 3, axis=2)
    other = picture(3, SIDE, SIDE)
    deep = np.asarray(grey_image).astype(np.uint16) * 257
    rows16 = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in rgb)
    alpha = np.linspace(0, 255, SIDE * SIDE).astype(np.uint8).reshape(SIDE, SIDE)
    transparent = photo.copy()
    transparent.putalpha(Image.fromarray(alpha))
    palette = photo.quantize(64)
    keyed = np.asarray(palette.convert("RGB")).astype(int)
    two = Image.merge("LA", (grey_image, Image.fromarray(alpha)))
    one_bit = photo.convert("1")
    bits = np.repeat(np.asarray(one_bit).astype(int)[..., None] * 255, 3, axis=2)
    cases = {
        "cmyk": (encoded(photo.convert("CMYK"), quality=97, subsampling=0), rgb, 3),
        "ycck": (*ycck(photo), 6),
        "grey16": (encoded(Image.fromarray(deep), "PNG"), by_percentiles(grey), 1),
        "rgb16": (png(SIDE, SIDE, 16, 2, zlib.compress(rows16)), by_percentiles(rgb), 1),
        "palette": (encoded(palette, "PNG"), keyed, 0),
        "palette-transparent": (encoded(palette, "PNG", transparency=3), keyed, 0),
        "keyed-rgb": (encoded(photo, "PNG", transparency=tuple(rgb[0, 0].tolist())), rgb, 0),
        "one-bit": (encoded(one_bit, "PNG"), bits, 0),
        "la": (encoded(two, "PNG"), grey, 0),
        "rgba": (encoded(transparent, "PNG"), rgb, 0),
        "grey-jpeg": (encoded(grey_image, quality=97), grey, 3),
        "444": (encoded(photo, quality=97, subsampling=0), rgb, 3),
        "arithmetic": (base64.b64decode(ARITHMETIC), ramps(), 1),
        "progressive": (encoded(photo, quality=97, subsampling=0, progressive=True), rgb, 3),
        "garbage-after": (encoded(photo, quality=97, subsampling=0) + b"GARBAGE" * 99, rgb, 3),
        "two-jpegs": (encoded(photo, quality=97, subsampling=0) + encoded(other), rgb, 3),
        "gif": (encoded(palette, "GIF", save_all=True, append_images=[other.quantize(64)]), keyed, 0),
        "webp": (encoded(photo, "WEBP", lossless=True, save_all=True, append_images=[other]), rgb, 0),
        "apng": (encoded(photo, "PNG", save_all=True, append_images=[other]), rgb, 0),
        "tiff-4": (encoded(transparent, "TIFF"), rgb, 0),
        "tiff-2": (encoded(two, "TIFF"), grey, 0),
        "tiff-16": (encoded(Image.fromarray(deep), "TIFF"), by_percentiles(grey), 1),
        "tiff-float": (
            encoded(Image.fromarray(stretched(grey)), "TIFF"),
            by_percentiles(stretched(grey)),
            1,
        ),
        "tiff-lzw": (encoded(photo, "TIFF", compression="tiff_lzw"), rgb, 0),
        "tiff-deflate": (encoded(photo, "TIFF", compression="tiff_adobe_deflate"), rgb, 0),
        "tiff-tiled": (tiled_tiff(rgb.astype(np.uint8)), rgb, 0),
        "tiff-pages": (encoded(photo.copy(), "TIFF", save_all=True, append_images=[other.copy(), two.copy()]), rgb, 0),
        "bmp": (encoded(photo, "BMP"), rgb, 0),
        "avif": (encoded(photo, "AVIF", quality=100, subsampling="4:4:4"), rgb, 3),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"exif-{orientation}"] = (encoded(photo, "PNG", exif=exif), upright(rgb, orientation), 0)
    return cases


def stretched(grey: np.ndarray) -> np.ndarray:
    return grey[..., 0].astype(np.float32) / 900 - 0.1


def by_percentiles(values: np.ndarray) -> np.ndarray:
    """Values of many bits become 8 bits by percentiles 2 to 98 of each band, whatever their container has room for."""
    values = values.reshape(*values.shape[:2], -1)
    black, white = np.percentile(values, (2, 98), axis=(0, 1))
    return np.clip((values - black) / (white - black) * 255, 0, 255)


def upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Applies the EXIF table, which says where row 0 and column 0 of the stored image belong."""
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    return turns[orientation](rgb)


def tiled_tiff(rgb: np.ndarray) -> bytes:
    """Returns a little-endian TIFF of one 16 x 16 tile."""
    height, width, _ = rgb.shape
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3),
        (322, 3, 1, 16), (323, 3, 1, 16), (324, 4, 1, 8), (325, 4, 1, rgb.size),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    bits = 8 + rgb.size
    for tag, kind, count, value in entries:
        directory += struct.pack("<HHII", tag, kind, *((3, bits) if tag == 258 else (count, value)))
    head = b"II" + struct.pack("<HI", 42, bits + 6)
    return head + rgb.tobytes() + struct.pack("<HHH", 8, 8, 8) + directory + bytes(4)


def test_odd_images_are_decoded_right(words: object, tmp_path: Path) -> None:
    cases = odd_images()
    members: dict[str, bytes] = {}
    for name, (data, _, _) in cases.items():
        members |= {f"{name}.jpg": data, f"{name}.json": CAPTION}
    epoch = epoch_of(write_tar(tmp_path / "a.tar", among_sound(members)), words, tmp_path)
    assert not epoch.reasons
    for name, (_, expected, tolerance) in cases.items():
        difference = np.abs(epoch.pictures[name].transpose(1, 2, 0) - expected).mean()
        assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("subsampling", ["444", "422", "440", "420", "411"])
@pytest.mark.parametrize("progressive", [False, True])
def test_colours_at_fewer_places_are_spread_as_pillow_spreads_them(subsampling: str, progressive: bool) -> None:
    """At full size, a JPEG equals Pillow's pixels bit for bit, and is close to the encoded image."""
    import simplejpeg

    photo = np.asarray(picture(4, 200, 200))
    data = simplejpeg.encode_jpeg(photo, 97, colorsubsampling=subsampling)
    if progressive and subsampling in ("444", "422", "420"):
        data = encoded(Image.fromarray(photo), quality=97, progressive=True, subsampling=":".join(subsampling))
    with Image.open(io.BytesIO(data)) as image:
        whole = np.asarray(image.convert("RGB"))
    found = eval_transform(data, 200).transpose(1, 2, 0)
    assert np.array_equal(found, whole)
    assert np.abs(found - photo.astype(int)).mean() < 3


@pytest.mark.parametrize("mode", ["CMYK", "YCCK"])
def test_inks_are_mixed_by_the_formula(mode: str) -> None:
    """Light through the inks is (255 - C)(255 - K) / 255 of the bands that Pillow decodes; the same for M and Y."""
    photo = picture(5, 96, 96)
    inks = np.dstack([255 - np.asarray(photo), np.asarray(photo.convert("L")) // 3])
    cmyk = encoded(Image.fromarray(inks, "CMYK"), quality=97, subsampling=0)
    data, seen = (cmyk, inks) if mode == "CMYK" else (ycck(photo)[0], None)
    marker = data.index(b"Adobe")
    assert data[marker + 11] == (2 if mode == "YCCK" else 0)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        bands = np.asarray(image).astype(float)
    if seen is not None:
        assert np.abs(bands - seen).mean() < 3
    expected = (255 - bands[..., :3]) * (255 - bands[..., 3:]) / 255
    assert np.abs(eval_transform(data, 96).transpose(1, 2, 0) - expected).max() <= 1
