"""Bad data of every kind, in real files, streamed by two simulated ranks: what is sound arrives, and nothing else.

Each case lies among sound samples. A sound one is a picture of one colour, which tells its key; an odd but sound image
is compared with a reference. After an epoch each rank must have taken the same number of full steps, every row must be
the picture of its key, all sound samples must have come, and each bad one must stand in the quarantine with its reason.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import shutil
import signal
import struct
import tarfile
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

from priorclip.data_shards import BadSample, ShardSet, ShardStream, TooManyBadSamples, load_tokenizer
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.sample import parse_text
from priorclip.data_shards.format.shard_index import ShardIndex, index_path, scan
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.stream.quarantine import Quarantine

SIDE, SOUND, EPOCHS, LIMIT_SECONDS = 16, 12, 3, 60
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
    """Two ranks for EPOCHS epochs (each drops one of an odd number of samples): full, equal steps, sound colours."""
    book = folder / "quarantine.jsonl"
    streams = [stream(spec, words, book, rank=rank, world_size=2, epochs=EPOCHS, **options) for rank in range(2)]
    batches = [list(each) for each in streams]
    steps = len(streams[0].source) // 2 * EPOCHS
    assert [len(part) for part in batches] == [steps, steps]
    places, pictures = [], {}
    for batch in itertools.chain(*batches):
        assert batch["images"].shape == (1, 3, SIDE, SIDE)
        shard, key = streams[0].source.name(int(batch["image_ids"][0]))
        places.append((shard, key))
        pictures[key] = batch["images"][0].numpy()
        base = key.rpartition("/")[2]
        if base.startswith("s") and base[1:].isdigit():
            assert (pictures[key] == np.array(colour(int(base[1:]))).reshape(3, 1, 1)).all(), key
    found = rows(book)
    assert {reason for each in streams for reason in each.skipped} == {line["reason"] for line in found}
    assert not {(line["shard"], line["key"]) for line in found} & set(places)
    return Epoch([key for _, key in places], pictures, {line["key"]: line["reason"] for line in found})


# -- images -----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, kind: int, pixels: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    parts = (header, *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int) -> bytes:
    """What zlib makes of so many zeros, put together of one compressed megabyte again and again."""

    def deflated(length: int, end: int) -> bytes:
        squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
        return squeeze.compress(bytes(length)) + squeeze.flush(end)

    blocks = deflated(1 << 20, zlib.Z_FULL_FLUSH) * (count >> 20) + deflated(count & 0xFFFFF, zlib.Z_FINISH)
    return b"\x78\x01" + blocks + struct.pack(">I", count % 65521 << 16 | 1)  # Adler-32 of zeros


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
    small = zlib.compress(b"\0" + bytes(3))
    assert len(zlib.decompress(zeros(3_000_001))) == 3_000_001  # which looks at the checksum too
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
    # libjpeg's YCCK -> CMYK gives 255 - RGB of the YCC planes, which Adobe's inversion makes inks.
    planes = np.asarray(photo.convert("YCbCr"))
    stored = np.dstack([planes, black.astype(np.uint8)])
    # Pillow inverts what it writes as CMYK, without a change of colour space: undo the one, mark the other.
    data = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=97, subsampling=0))
    marker = data.index(b"Adobe")
    data[marker + 11] = 2
    return bytes(data), (255 - rgb) * (black / 255)[..., None]


# By `cjpeg -arithmetic -quality 90 -sample 1x1` of ramps(): Pillow reads this coding and does not write it.
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
        "arithmetic": (base64.b64decode(ARITHMETIC), ramps(), 1),
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
    for name, (_, expected, tolerance) in cases.items():
        difference = np.abs(epoch.pictures[name].transpose(1, 2, 0) - expected).mean()
        assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("subsampling", ["444", "422", "440", "420", "411"])
@pytest.mark.parametrize("progressive", [False, True])
def test_colours_at_fewer_places_are_spread_as_pillow_spreads_them(subsampling: str, progressive: bool) -> None:
    """At its own size a JPEG is what Pillow makes of the whole file, to the bit; and near what was encoded."""
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
    """Light that passes the inks: (255 - C)(255 - K) / 255, of the bands that Pillow decodes; and so for M and Y."""
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


# -- text -------------------------------------------------------------------------------------------------------------

HUGE = b'{"captions": ["x"], "count": ' + b"9" * 5000 + b"}"
BAD_TEXTS = {
    "latin": ({"txt": "Flugh\xe4fen".encode("latin-1")}, "text is not UTF-8"),
    "blank": ({"txt": b" \n\t\0\0 "}, "no caption"),
    "none": ({}, "no caption"),
    "torn": ({"json": b'{"captions": ["a fie'}, "bad json"),
    "list": ({"json": b"[1, 2]"}, "bad json"),
    "deep": ({"json": b'{"captions": ' + b"[" * 100_000}, "bad json"),
    "huge": ({"json": HUGE}, "bad json"),
    "numbers": ({"json": b'{"captions": [1, 2]}'}, "bad json"),
    "object": ({"json": b'{"captions": {"a": "b"}}'}, "bad json"),
    "label": ({"json": b'{"captions": ["x"], "label": {"a": 1}}'}, "bad json"),
    "surrogate": ({"json": b'{"captions": ["x \\ud83d"]}'}, "text is not UTF-8"),
}
ODD_TEXTS: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "nan": ({"json": b'{"captions": ["x"], "width": NaN, "height": -Infinity}'}, ["x"]),
    "twice": ({"json": b'{"captions": ["x"], "captions": ["y"]}'}, ["y"]),
    "emoji": ({"txt": "\N{AIRPLANE} \N{DESERT}".encode()}, ["\N{AIRPLANE} \N{DESERT}"]),
    "arabic": ({"txt": "مطار كبير".encode()}, ["مطار كبير"]),
    "nul": ({"txt": b"a field\0\0"}, ["a field"]),
    "long": ({"txt": b"word " * 200_000}, [("word " * 200_000).strip()]),
}


def test_odd_and_bad_texts(words: object, tmp_path: Path) -> None:
    jpeg = encoded(picture(1))
    members: dict[str, bytes] = {}
    for name, (texts, _) in {**BAD_TEXTS, **ODD_TEXTS}.items():
        members |= {f"{name}.jpg": jpeg, **{f"{name}.{kind}": data for kind, data in texts.items()}}
    tar = write_tar(tmp_path / "a.tar", among_sound(members))
    epoch = epoch_of(tar, words, tmp_path)
    assert epoch.reasons == {name: reason for name, (_, reason) in BAD_TEXTS.items()}
    for name, (texts, expected) in ODD_TEXTS.items():
        assert parse_text(texts)[0] == expected, name


@settings(deadline=None)
@given(st.data())
def test_any_bytes_of_text_are_captions_or_bad(data: st.DataObject) -> None:
    whole = bytearray('{"captions": ["a \\u00e9 field", "é"], "label": "farm", "width": 3}'.encode())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    try:
        captions, label, _ = parse_text({"json": bytes(whole)})
    except BadSample:
        return
    assert all(text.strip() == text and text.encode() for text in captions)
    assert label is None or label.encode()


# -- tars -------------------------------------------------------------------------------------------------------------


def entry(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", form: int = tarfile.GNU_FORMAT
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info.tobuf(form) + data + bytes(-len(data) % 512)


def tar_of(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts) + bytes(1024))
    return path


def sound_entries(numbers: range, form: int = tarfile.GNU_FORMAT) -> bytes:
    return b"".join(entry(name, data, form=form) for n in numbers for name, data in sound(n).items())


def indexed(folder: Path) -> Path:
    assert main(["index", str(folder), "--workers", "1"]) == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of six sound samples, not indexed."""
    place = tmp_path / "shards"
    place.mkdir()
    tar_of(place / "a.tar", sound_entries(range(6)))
    tar_of(place / "b.tar", sound_entries(range(6, 12)))
    return place


@pytest.mark.parametrize("cut", ["header", "data", "all"])
def test_a_cut_tar_with_an_index_counts_each_sample(cut: str, folder: Path, words: object, tmp_path: Path) -> None:
    index = ShardIndex.load(index_path(indexed(folder) / "b.tar"))
    place = int(index.offset[int(index.first[3])])
    os.truncate(folder / "b.tar", {"header": place - 300, "data": place + 10, "all": 0}[cut])
    epoch = epoch_of(folder, words, tmp_path)
    lost = range(6 if cut == "all" else 9, 12)
    assert epoch.reasons == {f"s{number:02d}": "shard is cut short" for number in lost}
    assert epoch.sound() == [f"s{number:02d}" for number in range(lost.start)]


@pytest.mark.parametrize("cut", ["header", "data", "mark"])
def test_a_cut_tar_without_an_index_is_told_of(
    cut: str, folder: Path, words: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = scan(folder / "b.tar")
    place = int(index.offset[int(index.first[3])])
    size = (folder / "b.tar").stat().st_size
    os.truncate(folder / "b.tar", {"header": place - 300, "data": place + 10, "mark": size - 1024}[cut])
    epoch = epoch_of(folder, words, tmp_path)
    assert epoch.reasons == ({"s09": "shard is cut short"} if cut == "data" else {})
    assert len(ShardSet(str(folder))) == {"header": 9, "data": 10, "mark": 12}[cut]
    assert "damaged or cut short after" in caplog.text


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_flipped_bytes_of_a_tar_cost_the_samples_they_lie_in(
    words: object, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any byte of any region, with or without an index; all other samples still arrive, unchanged."""
    folder = tmp_path_factory.mktemp("flip")
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT]))
    tar = tar_of(folder / "a.tar", sound_entries(range(8), form))
    whole = scan(tar)
    if data.draw(st.booleans()):
        indexed(folder)
    content = bytearray(tar.read_bytes())
    sample = data.draw(st.integers(0, 7))
    first, last = (int(whole.offset[row]) for row in (2 * sample, 2 * sample + 1))
    begin, end = first - 512, last + (int(whole.size[2 * sample + 1]) + 511) // 512 * 512
    for place in data.draw(st.lists(st.integers(begin, end - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    tar.write_bytes(content)
    # A change of a caption, a name, or of pixels whose checksum is not looked at cannot be told without hashes
    streams = [stream(folder, words, rank=rank, world_size=2, epochs=3) for rank in range(2)]
    seen = [list(each) for each in streams]
    assert len(seen[0]) == len(seen[1])
    keys = set()
    for batch in itertools.chain(*seen):
        key = streams[0].source.name(int(batch["image_ids"][0]))[1]
        if key in {f"s{n:02d}" for n in range(8) if n != sample}:
            assert (batch["images"][0].numpy() == np.array(colour(int(key[1:]))).reshape(3, 1, 1)).all()
            keys.add(key)
    assert keys == {f"s{n:02d}" for n in range(8) if n != sample}


def test_a_size_of_sixteen_gigabytes_takes_no_memory(words: object, tmp_path: Path) -> None:
    liar = tarfile.TarInfo("liar.jpg")
    liar.size = 16 << 30
    parts = (sound_entries(range(4)), liar.tobuf(), bytes(512), sound_entries(range(4, 8)))
    epoch = epoch_of(tar_of(tmp_path / "a.tar", *parts), words, tmp_path)
    assert epoch.reasons == {"liar": "member is too large"}
    assert len(epoch.sound()) == 8


@pytest.mark.parametrize("size", ["-1", "-9999", "77777777777"])
def test_headers_that_lead_nowhere_end(size: str, words: object, tmp_path: Path) -> None:
    """A negative size sends Python's tarfile backwards for ever."""
    block = bytearray(tarfile.TarInfo("liar.jpg").tobuf())
    value = int(size, 8) if size.isdigit() else int(size)
    block[124:136] = b"\xff" + value.to_bytes(11, "big", signed=True) if value < 0 else size.encode() + b"\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    parts = (sound_entries(range(4)), bytes(block), sound_entries(range(4, 8)))
    epoch = epoch_of(tar_of(tmp_path / "a.tar", *parts), words, tmp_path)
    assert len(epoch.sound()) == 8
    assert set(epoch.reasons) <= {"liar"}


def test_names_links_and_hidden_members(words: object, tmp_path: Path) -> None:
    """Odd names are keys like others; what is no picture or text of a sample stands in nobody's way."""
    one, two = sound(0)["s00.png"], CAPTION
    long = "d" * 120 + "/" + "n" * 130
    names = ["./dot/s00", "../up/s00", "/root/s00", "with space/s00", "Flughäfen/s00", "a.b/c/s00", f"{long}/s00"]
    parts = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name in names:
            place = f"{form}/{name}" if not name.startswith((".", "/")) else f"{name[:-3]}{form}/s00"
            parts += [entry(f"{place}.png", one, form=form), entry(f"{place}.json", two, form=form)]
    hidden = [entry(".DS_Store", b"x"), entry("__MACOSX/._s01.png", b"junk"), entry("README", b"text"),
              entry("folder", kind=tarfile.DIRTYPE), entry("pipe.jpg", kind=tarfile.FIFOTYPE),
              entry("device.jpg", kind=tarfile.CHRTYPE)]  # fmt: skip
    between = [entry("s01.png", sound(1)["s01.png"]), entry("._s01.json", b"junk"), entry("s01.json", two)]
    links = [entry("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), entry("link.json", two),
             entry("hard.jpg", kind=tarfile.LNKTYPE, link="s01.png"), entry("hard.json", two),
             entry("blind.json", two)]  # fmt: skip
    tar = tar_of(tmp_path / "a.tar", *parts, *hidden, *between, *links, sound_entries(range(2, 9)))
    epoch = epoch_of(tar, words, tmp_path)
    assert epoch.reasons == {"link": "no image", "hard": "no image", "blind": "no image"}
    shards = ShardSet(str(tar))
    assert len(shards) == 2 * len(names) + 1 + 3 + 7
    assert f"{tarfile.GNU_FORMAT}/{long}/s00" in {shards.key(n) for n in range(len(shards))}
    assert {shards.key(n) for n in range(len(shards))} == set(epoch.keys) | epoch.reasons.keys()


def test_members_far_apart_are_two_half_samples(words: object, tmp_path: Path) -> None:
    """As webdataset has it: a sample is what lies together. Neither half passes for a whole."""
    parts = (entry("far.jpg", encoded(picture(1))), sound_entries(range(4)), entry("far.json", CAPTION))
    tar = tar_of(tmp_path / "a.tar", *parts, sound_entries(range(4, 8)))
    epoch = epoch_of(tar, words, tmp_path)
    assert set(epoch.reasons) == {"far"}
    assert "far" not in epoch.keys
    assert len(epoch.sound()) == 8


def test_two_samples_of_one_key_are_two(words: object, tmp_path: Path) -> None:
    parts = [entry(f"s00.{kind}", data) for kind, data in (("png", sound(0)["s00.png"]), ("json", CAPTION))]
    tar = tar_of(tmp_path / "a.tar", *parts, sound_entries(range(1, 4)), *parts, sound_entries(range(4, 8)))
    assert len(ShardSet(str(tar))) == 9
    assert epoch_of(tar, words, tmp_path).reasons == {}


def test_a_large_foreign_member_between_two_is_not_read(tmp_path: Path) -> None:
    parts = (entry("a.jpg", b"image"), entry("a.lidar", bytes(1 << 24)), entry("a.json", CAPTION))
    shards = ShardSet(str(tar_of(tmp_path / "a.tar", *parts)))
    read: list[int] = []
    plain = os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda file, length, place: read.append(length) or plain(file, length, place))
        assert shards.read(0).image == b"image"
    assert sum(read) < 1 << 16


def test_a_sparse_member_is_told_of(words: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GNU tar -S stores the filled parts only: the bytes at a member's place are not the member."""
    block = bytearray(tarfile.TarInfo("holes.png").tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:410] = b"%011o\0%011o\0" % (0, 0)
    block[483:495] = b"%011o\0" % 4096
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    parts = (sound_entries(range(4)), bytes(block), entry("holes.json", CAPTION), sound_entries(range(4, 8)))
    epoch = epoch_of(tar_of(tmp_path / "a.tar", *parts), words, tmp_path)
    assert epoch.reasons == {"holes": "no image"}
    assert "sparse" in caplog.text


def test_tars_end_to_end_lose_nothing(folder: Path, words: object, tmp_path: Path) -> None:
    joined = tmp_path / "joined.tar"
    joined.write_bytes((folder / "a.tar").read_bytes() + (folder / "b.tar").read_bytes())
    assert len(epoch_of(joined, words, tmp_path).sound()) == 12


def test_what_is_no_tar_is_named_at_the_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data in (b"", b"<html>not found</html>" * 99, bytes(10_240)):
        (folder / "c.tar").write_bytes(data)
        if any(data) or not data:
            with pytest.raises(ValueError, match=r"c\.tar is not an uncompressed tar"):
                ShardSet(str(folder))
        else:
            assert len(ShardSet(str(folder))) == 12  # an end mark and nothing before it: an empty tar
            assert "c.tar is empty" in caplog.text


def test_the_index_of_another_tar_gives_no_captions_to_wrong_images(
    folder: Path, words: object, tmp_path: Path
) -> None:
    indexed(folder)
    shutil.copy(index_path(folder / "a.tar"), index_path(folder / "b.tar"))
    epoch = epoch_of(folder, words, tmp_path)
    assert set(epoch.reasons.values()) <= {"index does not fit", "shard is cut short"}
    assert {row["shard"] for row in rows(tmp_path / "quarantine.jsonl")} == {str(folder / "b.tar")}
    rest = [row["reason"] for row in rows(tmp_path / "quarantine.jsonl")]
    assert len(rest) == 6


@pytest.mark.parametrize("change", ["vanishes", "shrinks", "cannot be opened"])
def test_a_shard_that_changes_between_epochs(change: str, folder: Path, words: object, tmp_path: Path) -> None:
    indexed(folder)
    whole = (folder / "b.tar").read_bytes()
    streams = [stream(folder, words, tmp_path / "q.jsonl", rank=rank, world_size=2, epochs=3) for rank in range(2)]
    batches = [iter(each) for each in streams]

    def epoch() -> set[str]:
        taken = [[next(part) for _ in range(6)] for part in batches]
        ids = [int(batch["image_ids"][0]) for part in taken for batch in part]
        assert len(ids) == 12
        for each in streams:
            each.source.close()
        return {streams[0].source.key(number) for number in ids}

    assert len(epoch()) == 12
    if change == "vanishes":
        (folder / "b.tar").unlink()
    elif change == "shrinks":
        tar_of(folder / "b.tar", sound_entries(range(20, 22)))
    else:
        (folder / "b.tar").unlink()
        (folder / "b.tar").symlink_to("b.tar")  # an error for root, too, to whom nothing is locked
    assert epoch() <= {f"s{number:02d}" for number in range(6)}
    found = rows(tmp_path / "q.jsonl")
    expected = {"vanishes": {"shard is missing"}, "shrinks": {"index does not fit", "shard is cut short"}}
    assert {row["reason"] for row in found} <= expected.get(change, {"shard cannot be read"})
    assert len(found) == len({(row["key"], row["reason"]) for row in found}) == 6
    (folder / "b.tar").unlink(missing_ok=True)
    (folder / "b.tar").write_bytes(whole)  # and it comes back
    assert len(epoch()) == 12


@pytest.mark.parametrize("bad", [0, 1, 30])
def test_sixty_four_ranks_take_the_same_number_of_steps(bad: int, words: object, tmp_path: Path) -> None:
    """However the bad ones fall to the ranks: each step has 64 sound pictures, and no rank ends early."""
    members: dict[str, bytes] = {}
    for number in range(200):
        broken = number % (200 // bad) == 3 if bad else False
        image = encoded(Image.new("RGB", (SIDE, SIDE), colour(number)), "PNG")
        members |= {f"k{number:03d}.png": image[: len(image) // 2 if broken else None], f"k{number:03d}.json": CAPTION}
    tar, book = write_tar(tmp_path / "a.tar", members), tmp_path / "q.jsonl"
    broken_keys = {f"k{number:03d}" for number in range(200) if bad and number % (200 // bad) == 3}
    shards = ShardSet(str(tar))
    config = DataConfig(str(tar), image_size=SIDE, workers=0, max_bad_share=0.3, quarantine=str(book))
    streams = [ShardStream(shards, None, config, global_batch=64, train=False, rank=rank, world_size=64, epochs=3)
               for rank in range(64)]  # fmt: skip
    seen = [list(each) for each in streams]
    assert {len(batches) for batches in seen} == {200 // 64 * 3}
    assert len({str(each.state_dict()) for each in streams}) == 1
    keys = set()
    for batch in itertools.chain(*seen):
        key = shards.key(int(batch["image_ids"][0]))
        assert (batch["images"][0].numpy() == np.array(colour(int(key[1:]))).reshape(3, 1, 1)).all(), key
        keys.add(key)
    assert not keys & broken_keys
    assert {line["key"] for line in rows(book)} == broken_keys  # of three epochs, each met all of them but eight
    assert bool(sum(each.skipped.total() for each in streams)) == bool(bad)


# -- the quarantine ---------------------------------------------------------------------------------------------------


def row(number: int, reason: str = "no image") -> dict[str, str]:
    return {"shard": "a.tar", "key": f"k{number}\udcff", "reason": reason, "detail": ""}


def test_the_quarantine_holds_a_sample_once_over_epochs_ranks_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "q.jsonl"
    ranks = [Quarantine(str(path)) for _ in range(3)]
    for epoch in range(4):
        for number in range(9):
            ranks[(number + epoch) % 3].add([row(number)], epoch, 99)
    Quarantine(str(path)).add([row(3), row(3), row(4, "empty image")], 0, 99)
    assert rows(path) == [*map(row, range(9)), row(4, "empty image")]
    assert sum(rank.skipped["no image"] for rank in ranks) == 36


def test_ranks_append_at_once_and_lines_stay_whole(tmp_path: Path) -> None:
    import multiprocessing

    path = tmp_path / "q.jsonl"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=append_many, args=(str(path), rank)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0
    assert sorted(found["key"] for found in rows(path)) == sorted(f"{r}-{n}" for r in range(3) for n in range(100))


def append_many(path: str, rank: int) -> None:
    book = Quarantine(path)
    for number in range(100):
        book.add([{"shard": "s", "key": f"{rank}-{number}", "reason": "r", "detail": "d" * 3000}], 0, 999)


def test_a_quarantine_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"data\.quarantine: .*file/q\.jsonl cannot be written"):
        Quarantine(str(tmp_path / "file" / "q.jsonl"))


def test_a_disk_that_fills_up_costs_the_list_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Quarantine(str(tmp_path / "q.jsonl"))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("priorclip.data_shards.stream.quarantine.os.write", full)
    for number in range(3):
        book.add([row(number)], 0, 99)
    assert book.skipped["no image"] == 3
    assert caplog.text.count("bad samples are now counted and not listed") == 1


def test_a_sample_met_again_as_a_replacement_counts_once(tmp_path: Path) -> None:
    book = Quarantine()
    for _ in range(5):
        book.add([row(1)], 0, 1)
    with pytest.raises(TooManyBadSamples, match=r"2 bad samples in epoch 0.*a\.tar \(2\)"):
        book.add([row(2)], 0, 1)
