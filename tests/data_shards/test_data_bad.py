"""Bad data of every kind, in real files, streamed by two simulated ranks: what is sound arrives, and nothing else.

Each case lies among sound samples. A sound one is a picture of one colour, which tells its key; an odd but sound image
is compared with a reference. After an epoch each rank must have taken the same number of full steps, every row must be
the picture of its key, the sound samples must all have come, and each bad one must stand in the quarantine with its reason.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import shutil
import signal
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import encoded, picture, rows, write_tar

from data_shards import BadSample, ShardSet, ShardStream, TooManyBadSamples, load_tokenizer
from data_shards.__main__ import main
from data_shards.config import DataConfig
from data_shards.index import ShardIndex, scan
from data_shards.quarantine import Quarantine
from data_shards.sample import parse_text
from data_shards.shards import index_path
from data_shards.transforms import eval_transform

SIDE, SOUND, LIMIT_SECONDS = 16, 12, 60
CAPTION = b'{"captions": ["a field"]}'


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A test that hangs fails."""

    def hung(*_: object) -> None:
        raise TimeoutError(f"not done after {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> object:
    return load_tokenizer(str(tokenizer_folder), 12)


def colour(number: int) -> tuple[int, int, int]:
    return (number * 67 % 256, number * 101 % 256, number * 151 % 256)


def sound(number: int) -> dict[str, bytes]:
    """Members of a sample that is one colour."""
    plain = Image.new("RGB", (SIDE, SIDE), colour(number))
    return {f"s{number:02d}.png": encoded(plain, "PNG"), f"s{number:02d}.json": CAPTION}


def among_sound(members: dict[str, bytes]) -> dict[str, bytes]:
    """The members in the midst of SOUND sound samples."""
    parts = [sound(number) for number in range(SOUND)]
    everything: dict[str, bytes] = {}
    for part in (*parts[: SOUND // 2], members, *parts[SOUND // 2 :]):
        everything |= part
    return everything


@dataclass
class Epoch:
    """What two ranks saw: keys in order, the picture of each key, and the quarantine's reasons by key."""

    keys: list[str]
    pictures: dict[str, np.ndarray]
    reasons: dict[str, str]

    def sound(self) -> list[str]:
        return sorted({key for key in self.keys if key.rpartition("/")[2].startswith("s")})


def stream(spec: Path | list[str], words: object, book: Path | None = None, **options: object) -> ShardStream:
    shards = str(spec) if isinstance(spec, Path) else spec
    data = {"image_size": SIDE, "workers": 0, "max_bad_share": 1.0, "block_size": 4, "window_blocks": 3}
    ranks = {name: options.pop(name) for name in ("rank", "world_size", "epochs") if name in options}
    config = DataConfig(shards, quarantine=str(book) if book else None, **{**data, **options})  # type: ignore[arg-type]
    return ShardStream(ShardSet(shards), words, config, global_batch=2, train=False, seed=3, **ranks)  # type: ignore[arg-type]


def epoch_of(spec: Path | list[str], words: object, folder: Path, **options: object) -> Epoch:
    """One epoch over two ranks; asserts full, equal steps and sound colours."""
    book = folder / "quarantine.jsonl"
    streams = [stream(spec, words, book, rank=rank, world_size=2, epochs=1, **options) for rank in range(2)]
    batches = [list(each) for each in streams]
    steps = len(streams[0].source) // 2
    assert [len(part) for part in batches] == [steps, steps]
    keys, pictures = [], {}
    for batch in itertools.chain(*batches):
        assert batch["images"].shape == (1, 3, SIDE, SIDE)
        key = streams[0].source.name(int(batch["image_ids"][0]))[1]
        keys.append(key)
        pictures[key] = batch["images"][0].numpy()
        base = key.rpartition("/")[2]
        if base.startswith("s") and base[1:].isdigit():
            assert (pictures[key] == np.array(colour(int(base[1:]))).reshape(3, 1, 1)).all(), key
    found = {row["key"]: row["reason"] for row in rows(book)}
    assert sum((each.skipped for each in streams), start=type(streams[0].skipped)()).keys() == set(found.values())
    assert not found.keys() & set(keys)
    return Epoch(keys, pictures, found)


# -- images -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, kind: int, pixels: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = (header, *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@functools.cache
def zeros(count: int) -> bytes:
    squeeze = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [squeeze.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, squeeze.compress(bytes(count & 0xFFFFF)), squeeze.flush()])


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Bytes and reason by name."""
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
    small = zlib.compress(b"\0" + bytes(3 * SIDE)) if SIDE else b""
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
        "half-tiff": (encoded(photo, "TIFF", compression="tiff_lzw")[:-2000], "unreadable image"),
        "bomb-png": (png(40_000, 40_000, 1, 0, zeros(40_000 * 5001)), "too many pixels"),
        "bomb-grey": (png(40_000, 40_000, 8, 2, b"x"), "too many pixels"),
        "bomb-jpeg": (bytes(jpeg_header), "too many pixels"),
        "bomb-tiff": (bytes(tiff), "too many pixels"),
        "bomb-webp": (bytes(webp), "too many pixels"),
        "bomb-gif": (bytes(gif), "too many pixels"),
        "bomb-text": (png(1, 1, 8, 2, small, chunk(b"zTXt", b"a\0\0" + zeros(1 << 28))), "unreadable image"),
    }


@pytest.fixture(scope="module")
def bad_image_cases() -> dict[str, tuple[bytes, str]]:
    return bad_images()


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images(
    bad_image_cases: dict[str, tuple[bytes, str]], words: object, tmp_path: Path, workers: int
) -> None:
    members: dict[str, bytes] = {}
    for name, (data, _) in bad_image_cases.items():
        members |= {f"{name}.jpg": data, f"{name}.json": CAPTION}
    epoch = epoch_of(write_tar(tmp_path / "a.tar", among_sound(members)), words, tmp_path, workers=workers)
    assert epoch.reasons == {name: reason for name, (_, reason) in bad_image_cases.items()}
    assert len(epoch.sound()) == SOUND


def test_a_bomb_is_refused_before_it_takes_memory(bad_image_cases: dict[str, tuple[bytes, str]]) -> None:
    """The largest would be 4.8 GB: an address space of 3 GB more than now is enough for all of them."""
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
    """An Adobe JPEG whose inks are inverted and stored as YCCK, and the RGB that its inks mean."""
    rgb = np.asarray(photo).astype(int)
    black = rgb.max(axis=2) * 0 + 200  # as Adobe stores it: 255 is no ink
    # libjpeg's YCCK -> CMYK gives 255 - RGB of the YCC planes; Adobe's inversion gives RGB back.
    planes = np.asarray(photo.convert("YCbCr"))
    stored = np.dstack([planes, black.astype(np.uint8)])
    # Pillow inverts what it writes as CMYK, without a change of colour space: undo the one, mark the other.
    data = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=97, subsampling=0))
    marker = data.index(b"Adobe")
    data[marker + 11] = 2
    return bytes(data), np.clip((255 - rgb) * black / 255, 0, 255)


def odd_images() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Unusual images that are sound: bytes, expected (H, W, 3), tolerated mean difference."""
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
        "grey16": (encoded(Image.fromarray(deep), "PNG"), grey, 0),
        "rgb16": (png(SIDE, SIDE, 16, 2, zlib.compress(rows16)), rgb, 0),
        "palette": (encoded(palette, "PNG"), keyed, 0),
        "palette-transparent": (encoded(palette, "PNG", transparency=3), keyed, 0),
        "keyed-rgb": (encoded(photo, "PNG", transparency=tuple(rgb[0, 0].tolist())), rgb, 0),
        "one-bit": (encoded(one_bit, "PNG"), bits, 0),
        "la": (encoded(two, "PNG"), grey, 0),
        "rgba": (encoded(transparent, "PNG"), rgb, 0),
        "grey-jpeg": (encoded(grey_image, quality=97), grey, 3),
        "444": (encoded(photo, quality=97, subsampling=0), rgb, 3),
        "422": (encoded(photo, quality=97, subsampling=1), rgb, 6),
        "420": (encoded(photo, quality=97, subsampling=2), rgb, 12),
        "progressive": (encoded(photo, quality=97, subsampling=0, progressive=True), rgb, 3),
        "garbage-after": (encoded(photo, quality=97, subsampling=0) + b"GARBAGE" * 99, rgb, 3),
        "two-jpegs": (encoded(photo, quality=97, subsampling=0) + encoded(other), rgb, 3),
        "gif": (encoded(palette, "GIF", save_all=True, append_images=[other.quantize(64)]), keyed, 0),
        "webp": (encoded(photo, "WEBP", lossless=True, save_all=True, append_images=[other]), rgb, 0),
        "apng": (encoded(photo, "PNG", save_all=True, append_images=[other]), rgb, 0),
        "tiff-4": (encoded(transparent, "TIFF"), rgb, 0),
        "tiff-2": (encoded(two, "TIFF"), grey, 0),
        "tiff-16": (encoded(Image.fromarray(deep), "TIFF"), grey, 0),
        "tiff-float": (encoded(Image.fromarray(stretched(grey)), "TIFF"), stretched_grey(grey), 1),
        "tiff-lzw": (encoded(photo, "TIFF", compression="tiff_lzw"), rgb, 0),
        "tiff-deflate": (encoded(photo, "TIFF", compression="tiff_adobe_deflate"), rgb, 0),
        "tiff-pages": (encoded(photo, "TIFF", save_all=True, append_images=[other]), rgb, 0),
        "tiff-tiled": (tiled_tiff(rgb.astype(np.uint8)), rgb, 0),
        "bmp": (encoded(photo, "BMP"), rgb, 0),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"exif-{orientation}"] = (encoded(photo, "PNG", exif=exif), upright(rgb, orientation), 0)
    return cases


def stretched(grey: np.ndarray) -> np.ndarray:
    return grey[..., 0].astype(np.float32) / 900 - 0.1


def stretched_grey(grey: np.ndarray) -> np.ndarray:
    return (grey - grey.min()) / (grey.max() - grey.min()) * 255


def upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """The EXIF table: where row 0 and column 0 of the stored picture belong."""
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
    """A little-endian TIFF of one 16 x 16 tile."""
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
    assert set(cases) <= {*epoch.keys, *dropped(tmp_path / "a.tar", epoch)}
    for name in set(cases) & set(epoch.keys):
        _, expected, tolerance = cases[name]
        difference = np.abs(epoch.pictures[name].transpose(1, 2, 0) - expected).mean()
        assert difference <= tolerance, f"{name}: {difference}"


def dropped(tar: Path, epoch: Epoch) -> set[str]:
    """The one sample that does not fill the last batch."""
    shards = ShardSet(str(tar))
    left = {shards.key(number) for number in range(len(shards))} - set(epoch.keys)
    assert len(left) <= len(shards) % 2
    return left


def test_arithmetic_coded_jpeg_is_decoded_or_refused() -> None:
    """Some builds of libjpeg-turbo cannot: then it is a bad sample, never grey."""
    plain = bytearray(encoded(picture(4, SIDE, SIDE)))
    plain[plain.index(b"\xff\xc0") + 1] = 0xC9  # says arithmetic, is Huffman
    with pytest.raises(BadSample):
        eval_transform(bytes(plain), SIDE)
