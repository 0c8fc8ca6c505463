"""Pixels compared with slow references: Pillow and torchvision on the fully decoded image."""

from __future__ import annotations

import contextlib
import functools
import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import encoded, picture

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import align_box, eval_transform, random_box, train_transform


@functools.cache
def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Image with detail at every scale, like a photo: random fields whose amplitude falls with the frequency."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(3, 9):
        cells = rng.normal(size=(2**octave, 2**octave, 3)) * 2.0**-octave * 400
        for channel in range(3):
            field = Image.fromarray(cells[..., channel].astype(np.float32))
            total[..., channel] += np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(128 + total, 0, 255).astype(np.uint8))


def reference(data: bytes, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Decodes the whole image, crops, resizes."""
    image = Image.open(io.BytesIO(data)).convert("RGB").crop(tuple(round(edge) for edge in box))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("side", [64, 256, 300, 768, 1500])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_eval_is_the_resized_centre(side: int, kind: str) -> None:
    data = encoded(photograph(side + 60, side), kind, **({"quality": 90} if kind != "PNG" else {}))
    found = eval_transform(data, 128)
    assert found.shape == (3, 128, 128)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    expected = reference(data, (30, 0, side + 30, side), 128)
    assert np.abs(found - expected).mean() < (2 if kind == "JPEG" else 0.1)  # JPEGs are decoded at reduced scale


def test_centre_of_a_tall_image_with_an_odd_margin() -> None:
    data = encoded(photograph(200, 301), "PNG")
    crops = [reference(data, (0, top, 200, top + 200), 100) for top in (50, 51)]
    found = eval_transform(data, 100)
    assert np.abs(found - (crops[0] + crops[1]) / 2).mean() < 3


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(256, 256), (900, 700), (80, 400)]), st.sampled_from([0.08, 0.5, 1.0]))
def test_random_crop_is_the_reference_crop(seed: int, shape: tuple[int, int], scale: float) -> None:
    data = encoded(photograph(*shape), quality=92)
    found = train_transform(data, 96, random.Random(seed), scale=scale, hflip=False, vflip=False, rot90=False)
    box = align_box(random_box(*shape, scale, random.Random(seed)), 96)
    assert np.abs(found - reference(data, box, 96)).mean() < 2


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.floats(0.01, 1), st.integers(0, 2**32))
def test_boxes_lie_inside_and_keep_their_share(width: int, height: int, scale: float, seed: int) -> None:
    left, top, right, bottom = random_box(width, height, scale, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_boxes_are_distributed_as_torchvisions() -> None:
    from torch import manual_seed, zeros
    from torchvision.transforms import RandomResizedCrop

    rng, blank = random.Random(0), zeros(3, 200, 300)
    manual_seed(0)
    ours = np.array([random_box(300, 200, 0.3, rng) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    top, left, height, width = theirs.T
    theirs = np.stack([left, top, left + width, top + height], axis=1)
    for share in (10, 50, 90):
        assert np.abs(np.percentile(ours, share, axis=0) - np.percentile(theirs, share, axis=0)).max() < 9


def test_flips_and_turns_cover_the_eight_symmetries() -> None:
    data = encoded(photograph(64, 64), "PNG")
    plain = eval_transform(data, 64)
    seen = {train_transform(data, 64, random.Random(seed), scale=1.0).tobytes() for seed in range(200)}
    symmetries = {
        np.ascontiguousarray(np.rot90(mirrored, turns, axes=(1, 2))).tobytes()
        for mirrored in (plain, plain[:, :, ::-1])
        for turns in range(4)
    }
    assert len(symmetries) == 8
    assert seen == symmetries


def test_switching_an_option_does_not_move_the_crop() -> None:
    data = encoded(photograph(100, 90), "PNG")
    flipped = train_transform(data, 50, random.Random(3), vflip=False, rot90=False)
    plain = train_transform(data, 50, random.Random(3), hflip=False, vflip=False, rot90=False)
    assert np.array_equal(plain, flipped) or np.array_equal(plain, flipped[:, :, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(160, 80), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == ((80, 160) if orientation > 4 else (160, 80))
    found = eval_transform(data, 40)
    expected = eval_transform(encoded(upright, "PNG"), 40)
    assert np.abs(found.astype(int) - expected).mean() < 2


def deep(values: np.ndarray, kind: str = "PNG") -> bytes:
    return encoded(Image.fromarray(values), kind)


def test_every_mode_becomes_rgb() -> None:
    photo = photograph(48, 48)
    plain = eval_transform(encoded(photo, "PNG"), 48).astype(int)
    grey = np.asarray(photo.convert("L")).astype(int)
    noise = np.random.default_rng(0).integers(0, 256, (48, 48), np.uint8)
    alpha = photo.copy()
    alpha.putalpha(Image.fromarray(noise))
    frames = [photo, Image.new("RGB", (48, 48), "red")]
    ramp = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    black, white = np.percentile(grey, (2, 98))
    by_percentiles = np.clip((grey - black) / (white - black) * 255, 0, 255)  # many bits: by the values, not the type
    cases = {
        "alpha": (encoded(alpha, "PNG"), plain, 0),
        "four bands": (encoded(alpha, "TIFF"), plain, 0),
        "CMYK": (encoded(photo.convert("CMYK"), "JPEG", quality=95), plain, 8),
        "palette": (encoded(photo.quantize(256), "PNG"), plain, 8),
        "animated": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), plain, 0),
        "grey": (encoded(photo.convert("L"), "PNG"), np.stack([grey] * 3), 0),
        "16 bit": (deep(ramp), np.stack([by_percentiles] * 3), 1),
        "16 bit tiff": (deep(ramp, "TIFF"), np.stack([by_percentiles] * 3), 1),
        "1 bit": (encoded(photo.convert("1"), "PNG"), np.stack([np.asarray(photo.convert("1")) * 255] * 3), 0),
    }
    for name, (data, expected, tolerance) in cases.items():
        found = eval_transform(data, 48)
        assert found.shape == (3, 48, 48), name
        assert np.abs(found - expected).mean() <= tolerance, name
    reflectance = np.asarray(photo.convert("L")).astype(np.float32) / 4000
    reflectance[0, 0] = np.nan
    found = eval_transform(deep(reflectance, "TIFF"), 48)
    assert np.corrcoef(found[0, 1:].ravel(), by_percentiles[1:].ravel())[0, 1] > 0.999
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"GIF89a", "not an image"),
        (encoded(picture(1))[:-300], "unreadable image"),
        (encoded(picture(1), "PNG")[:200], "unreadable image"),
        (encoded(Image.new("RGB", (1001, 1000)), "PNG"), "too many pixels"),
    ],
)
def test_bad_images_are_bad_samples(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as error:
        eval_transform(data, 32, max_pixels=1_000_000)
    assert error.value.reason == reason


@settings(deadline=None)
@given(st.data())
def test_flipped_bits_never_escape_as_another_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]))
    image = bytearray(encoded(picture(data.draw(st.integers(0, 3))), kind))
    for place in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=6)):
        image[place] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(BadSample):
        assert eval_transform(bytes(image), 16, max_pixels=100_000).shape == (3, 16, 16)
