"""libjpeg-turbo compared with Pillow: the same pixels, and the same images are damaged."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import encoded, picture

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.jpeg import decode_jpeg, has_exif, jpeg_size
from priorclip.data_shards.images.transforms import align_box, eval_transform, random_box, train_transform

UCMERCED = Path(__file__).parents[3] / "shared/data/ucmerced/images"


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_at_full_scale_the_pixels_are_pillows(subsampling: str, mode: str, progressive: bool) -> None:
    options = {} if mode == "L" else {"subsampling": subsampling}
    data = encoded(picture(5, 117, 91).convert(mode), quality=85, progressive=progressive, **options)
    assert jpeg_size(data) == (117, 91)
    assert np.array_equal(decode_jpeg(data, (117, 91), 1), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_at_reduced_scale_they_are_the_means_of_pillows(denominator: int) -> None:
    data = encoded(picture(6, 160, 96), quality=95, subsampling="4:4:4")
    whole = np.asarray(Image.open(io.BytesIO(data))).astype(float)
    means = whole.reshape(96 // denominator, denominator, 160 // denominator, denominator, 3).mean((1, 3))
    found = decode_jpeg(data, (160, 96), denominator)
    assert found.shape == means.shape
    assert np.abs(found - means).mean() < 1
    odd = encoded(picture(6, 161, 97))
    assert decode_jpeg(odd, (161, 97), denominator).shape == (-(-97 // denominator), -(-161 // denominator), 3)


def test_what_is_no_plain_jpeg_is_left_to_pillow() -> None:
    assert jpeg_size(encoded(picture(1), "PNG")) is None
    assert jpeg_size(encoded(picture(1).convert("CMYK"))) is None
    assert jpeg_size(b"") is None
    assert jpeg_size(b"\xff\xd8\xff") is None
    upright, turned = Image.Exif(), Image.Exif()
    upright[0x0112], turned[0x0112] = 1, 6
    assert jpeg_size(encoded(picture(1), exif=upright)) == picture(1).size
    assert jpeg_size(encoded(picture(1), exif=turned)) is None


def test_an_exif_segment_is_found_behind_a_colour_profile_and_not_in_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    profile = bytes(range(256)) * 700 + b"\xff\xda"  # more than two segments, with bytes that look like their end
    assert has_exif(encoded(picture(2), exif=exif, icc_profile=profile))
    assert not has_exif(encoded(picture(2), icc_profile=profile + b"Exif\0\0"))
    assert not has_exif(encoded(picture(2)) + b"Exif\0\0")


@settings(deadline=None)
@given(st.data())
def test_a_damaged_jpeg_is_bad_or_has_pillows_pixels(data: st.DataObject) -> None:
    image = bytearray(encoded(picture(3), quality=80))
    for place in data.draw(st.lists(st.integers(2, len(image) - 1), min_size=1, max_size=3)):
        image[place] ^= 1 << data.draw(st.integers(0, 7))
    image = image[: data.draw(st.integers(len(image) // 2, len(image)))]
    try:
        found = eval_transform(bytes(image), 64, max_pixels=100_000)
    except BadSample:
        return
    expected = eval_transform(encoded(Image.open(io.BytesIO(image)).convert("RGB"), "PNG"), 64)
    assert np.array_equal(found, expected)


@pytest.mark.skipif(not UCMERCED.is_dir(), reason="the UC Merced photographs are not here")
@pytest.mark.parametrize(("side", "limit"), [(256, 0.5), (768, 2)])
def test_photographs_are_within_two_grey_levels_of_pillow(side: int, limit: float) -> None:
    from priorclip.data_shards.inspect.bench import photographs
    from priorclip.data_shards.sources import imagefolder

    errors = []
    for seed, record in enumerate(photographs(imagefolder(UCMERCED), side, 12)):
        assert isinstance(record.image, bytes)
        found = train_transform(record.image, 224, random.Random(seed), hflip=False, vflip=False, rot90=False)
        box = align_box(random_box(side, side, 0.5, random.Random(seed)), 224)
        crop = Image.open(io.BytesIO(record.image)).convert("RGB").crop(box)
        expected = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        errors.append(np.abs(found.astype(int) - expected).mean())
    assert np.mean(errors) < limit
