"""Small files that ask decoders for minutes or gigabytes: scans of JPEGs, parts of JPEG 2000s. Others are read."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images import decoding_work
from priorclip.data_shards.images.decode import MAX_PIXELS, open_image, upright_rgb
from priorclip.data_shards.images.decoding_work import (
    MAX_SCANS,
    SCANS_OF_LARGEST,
    check_codestreams,
    check_scene,
    count_parts,
    count_scans,
)
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.rasters.values import DEFAULT
from priorclip.data_shards.sources.scenes import open_scene

ORDINARY = 10  # scans of a progressive colour JPEG of libjpeg


def photo(wide: int = 96, high: int = 64) -> Image.Image:
    ramp = np.add.outer(np.arange(high) * 2, np.arange(wide) * 3) % 256
    return Image.fromarray(np.dstack([ramp, ramp[::-1], 255 - ramp]).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def many_scans(scans: int, image: Image.Image | None = None, before: bytes = b"") -> bytes:
    """Returns a progressive JPEG whose last scan is repeated until it has ``scans`` of them, after segments."""
    data = encoded(image or photo(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    whole = data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]
    return whole[:2] + before + whole[2:]


def segment(body: bytes) -> bytes:
    return b"\xff\xe1" + (len(body) + 2).to_bytes(2) + body


def reason(data: bytes, side: int = 32) -> str:
    """Returns why an image is refused, which takes less than 2 seconds; "" if it is read."""
    begun = time.thread_time()
    try:
        eval_transform(data, side)
    except BadSample as error:
        assert time.thread_time() - begun < 2
        return error.reason
    return ""


@pytest.mark.parametrize("before", [b"", segment(b"Exif\0\0" + bytes(20))])
def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(before: bytes) -> None:
    data = many_scans(20_000, Image.new("L", (2000, 2000)), before)  # four minutes, in 200 kB
    assert len(data) < 500_000
    assert reason(data) == "too many scans"
    with pytest.raises(BadSample, match=f"20000 scans of 4000000 pixels, limit {MAX_SCANS}"), open_image(data):
        pass


def test_larger_images_may_have_fewer_scans() -> None:
    data = many_scans(20, Image.new("L", (1000, 1000)))
    assert reason(data) == ""
    with open_image(data, 20 * 1_000_000 // SCANS_OF_LARGEST + 1) as image:
        assert image.size == (1000, 1000)
    with pytest.raises(BadSample, match="limit 15"), open_image(data, 1_000_000):
        pass


def test_an_ordinary_progressive_jpeg_is_read_at_the_limit_of_pixels() -> None:
    data = encoded(photo(), "JPEG", progressive=True)
    assert count_scans(data) == data.count(b"\xff\xda") == ORDINARY < SCANS_OF_LARGEST
    with open_image(data, 96 * 64) as image:
        assert np.array_equal(np.asarray(upright_rgb(image)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_markers_inside_segments_are_no_scans() -> None:
    data = encoded(photo(), "JPEG")
    assert reason(data[:2] + segment(b"\xff\xda" * 500) + data[2:]) == ""


def test_markers_after_the_end_are_no_scans() -> None:
    """Telephones append a film to the picture."""
    assert reason(encoded(photo(), "JPEG") + b"\xff\xda" * 500) == ""


@settings(deadline=None, max_examples=60)
@given(st.integers(ORDINARY, 60), st.binary(max_size=200), st.integers(0, 3))
def test_scans_are_counted(scans: int, body: bytes, fill: int) -> None:
    assert count_scans(many_scans(scans, before=segment(body) + b"\xff" * fill)) == scans


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damage_never_hides_more_than_it_covers(data: st.DataObject) -> None:
    """A damaged byte outside of the segments' lengths hides at most the scan that it is in."""
    whole = bytearray(many_scans(40))
    place = data.draw(st.integers(whole.index(b"\xff\xda") + 20, len(whole) - 3))
    if whole[place - 1] != 0xFF and 0xFF not in whole[place - 14 : place + 1]:
        whole[place] = data.draw(st.integers(0, 254))
        assert 39 <= count_scans(bytes(whole)) <= 41


def jpeg_in_tiff(jpeg: bytes, side: int) -> bytes:
    entries = [(256, side), (257, side), (258, 8), (259, 7), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, side)]
    entries.append((279, len(jpeg)))
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(4) + jpeg


def test_a_tiff_may_hold_a_jpeg_with_few_scans() -> None:
    grey = photo(64, 64).convert("L")
    assert reason(jpeg_in_tiff(many_scans(SCANS_OF_LARGEST - 2, grey), 64)) == ""
    assert reason(jpeg_in_tiff(many_scans(SCANS_OF_LARGEST + 5, grey), 64)) == "unreadable image"


def jpeg_2000(side: int, layers: int = 1, boxed: bool = False, **options: object) -> bytes:
    """Returns a JPEG 2000 of 256 x 256 flat pixels whose header says ``side`` x ``side``."""
    data = bytearray(encoded(Image.new("RGB", (256, 256)), "JPEG2000", no_jp2=not boxed, **options))
    size = data.index(b"\xff\x51")
    struct.pack_into(">II", data, size + 6, side, side)
    if "tile_size" not in options:
        struct.pack_into(">II", data, size + 22, side, side)
    struct.pack_into(">H", data, data.index(b"\xff\x52") + 6, layers)
    if boxed:
        struct.pack_into(">II", data, data.index(b"ihdr") + 4, side, side)
    return bytes(data)


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(
    ("side", "layers", "options"),
    [
        (8192, 1, {"codeblock_size": (4, 4)}),  # 6 GB
        (9000, 1, {"codeblock_size": (16, 16), "precinct_size": (32, 32)}),  # 3.5 GB, 20 s
        (4096, 65_535, {"precinct_size": (256, 256)}),  # 40 s
    ],
)
def test_a_small_jpeg_2000_takes_no_gigabytes(side: int, layers: int, options: dict, boxed: bool) -> None:
    data = jpeg_2000(side, layers, boxed, **options)
    assert len(data) < 5000
    assert side**2 < MAX_PIXELS
    assert reason(data) == "too many parts"


@pytest.mark.parametrize("boxed", [False, True])
def test_a_scene_is_bounded_by_its_tiles(boxed: bool, tmp_path: Path) -> None:
    """A scene may be large, and is read tile by tile."""
    path = tmp_path / "a.jp2"
    path.write_bytes(jpeg_2000(8192, boxed=boxed, codeblock_size=(4, 4)))
    with pytest.raises(BadSample, match="too many parts: a JPEG 2000 of"), open_scene(tmp_path, path.name, DEFAULT):
        pass
    path.write_bytes(jpeg_2000(60_000, boxed=boxed, codeblock_size=(16, 16), tile_size=(256, 256)))
    check_scene(path)
    with pytest.raises(BadSample, match="too many parts"):
        check_codestreams(path.read_bytes())


def test_a_virtual_raster_brings_no_such_scene_in(tmp_path: Path) -> None:
    (tmp_path / "a.jp2").write_bytes(jpeg_2000(8192, codeblock_size=(4, 4)))
    source = '<SourceFilename relativeToVRT="1">a.jp2</SourceFilename><SourceBand>1</SourceBand>'
    band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{source}</SimpleSource></VRTRasterBand>'
    (tmp_path / "a.vrt").write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64">{band}</VRTDataset>')
    with (
        pytest.raises(BadSample, match=r"a\.vrt names 'a\.jp2': .*too many parts"),
        open_scene(tmp_path, "a.vrt", DEFAULT),
    ):
        pass


def test_a_scene_is_looked_through_once_and_not_for_each_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(decoding_work, "check_codestreams", lambda data, **_: seen.append(len(data)))
    path = tmp_path / "a.jp2"
    for side in (64, 96):  # another file in its place
        path.write_bytes(encoded(photo(side, side), "JPEG2000"))
        for _ in range(3):
            with open_scene(tmp_path, path.name, DEFAULT):
                pass
    assert len(seen) == len(set(seen)) == 2


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codeblock_size": (32, 32), "precinct_size": (256, 256)},
        {"tile_size": (128, 128), "num_resolutions": 4},
        {"irreversible": True, "quality_mode": "rates", "quality_layers": [40, 20, 5]},
    ],
)
def test_ordinary_jpeg_2000s_are_read(options: dict, boxed: bool) -> None:
    image = photo(300, 200)
    assert reason(encoded(image, "JPEG2000", no_jp2=not boxed, **options)) == ""


def test_blocks_and_precincts_are_counted() -> None:
    """64 x 32 pixels in one more resolution of 32 x 16: blocks of 16 x 8, precincts of 32 x 32, then 16 x 16."""
    style = bytes([1, 2, 1, 0, 0, 0x44, 0x55])
    assert count_parts(64, 32, style) == (2 * 2 + 4 * 4, 2 * 1 + 2 * 1)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300))
def test_damaged_codestreams_are_refused_by_name(tail: bytes) -> None:
    """Nothing but BadSample, and in time, whatever follows the size of the image."""
    data = jpeg_2000(256)
    cut = data.index(b"\xff\x52") + 2
    assert reason(data[:cut] + tail) in ("", "unreadable image", "not an image", "too many parts")
    assert reason(data[: cut - 20] + tail) in (
        "",
        "unreadable image",
        "not an image",
        "too many parts",
        "too many pixels",
    )


def run_length_bmp(wide: int, high: int, body: bytes) -> bytes:
    start = 14 + 40 + 4 * 256
    header = struct.pack("<IiiHHIIiiII", 40, wide, high, 1, 8, 1, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + bytes(4 * 256) + body


SLOW_IN_PYTHON = {
    "a line of ten million pixels, of 4 bytes": run_length_bmp(10_000_000, 1, b"\1\1\0\0\0\1"),
    "150,000 comments": b"P3\n1000 1000\n255\n" + b"#\n" * 150_000,
    "text of 6 MB": b"P3\n1000 1000\n255\n" + b"0 " * 3_000_000,
    "another white than 255": b"P6\n2000 1000\n254\n" + bytes(6_000_000),
}


@pytest.mark.parametrize("name", SLOW_IN_PYTHON)
def test_what_pillow_decodes_slowly_is_refused_at_once(name: str) -> None:
    assert reason(SLOW_IN_PYTHON[name]) == "slow to decode"


@pytest.mark.parametrize(
    "data",
    [
        run_length_bmp(2, 2, b"\2\7\0\0\2\7\0\1"),
        b"P3\n# a comment\n2 2\n255\n" + b"0 " * 12,
        b"P6\n2 2\n254\n" + bytes(12),
        b"P6\n3000 2000\n255\n" + bytes(18_000_000),  # decoded in C
    ],
)
def test_other_images_of_these_formats_are_read(data: bytes) -> None:
    assert reason(data) == ""
