"""Hashes of images: near pairs, changed copies, and pictures that only look alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from duplicate_images import MAX_PIXELS, UCMERCED, evaluation_of, hash_columns, photograph, sea
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from small_data import encoded, picture

from priorclip.data_shards.dedupe import hash_columns as hashing
from priorclip.data_shards.dedupe import near_hashes
from priorclip.data_shards.dedupe.image_hashes import PERCEPTUAL, SYMMETRIES, hash_image
from priorclip.data_shards.dedupe.leakage import find_leaks
from priorclip.data_shards.dedupe.near_hashes import Pieces, near_pairs
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool
from priorclip.data_shards.sources import Record


def plain_pairs(left: np.ndarray, right: np.ndarray | None, distance: int) -> set[tuple[int, int, int]]:
    """Compares all hashes."""
    other = left if right is None else right
    return {
        (i, j, bits)
        for i, a in enumerate(left.tolist())
        for j, b in enumerate(other.tolist())
        if (bits := (a ^ b).bit_count()) <= distance and (right is not None or i < j)
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    distance=st.integers(0, 16),
    flips=st.integers(0, 20),
    within=st.booleans(),
    pieces=st.integers(3, 17),
    large=st.sampled_from((1, 50, near_hashes.LARGE)),
    block=st.sampled_from((1, 7, near_hashes.BLOCK)),
)
def test_near_pairs_are_those_of_all_comparisons(
    seed: int, sizes: tuple[int, int], distance: int, flips: int, within: bool, pieces: int, large: int, block: int
) -> None:
    """The hashes are near a few centres, so that there are equal ones and pairs at each distance.

    Each number of pieces finds all pairs; large and small buckets and blocks give the same pairs.
    """
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, 3, dtype=np.uint64)

    def draw(count: int) -> np.ndarray:
        hashes = centres[rng.integers(0, 3, count)]
        for _ in range(int(rng.integers(0, flips + 1))):
            hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64))
        return hashes

    left, right = draw(sizes[0]), None if within else draw(sizes[1])
    chosen = Pieces.of(max(pieces, -(-(distance + 1) // 3)), distance)  # more than 2 bits of a piece are slow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_hashes, "LARGE", large)
        patch.setattr(near_hashes, "BLOCK", block)
        patch.setattr(Pieces, "cheapest", lambda *_: chosen)
        found = [(int(i), int(j), int(b)) for part in near_pairs(left, right, distance) for i, j, b in zip(*part)]
    assert len(found) == len(set(found)), "a pair came twice"
    assert set(found) == plain_pairs(left, right, distance)


@pytest.mark.parametrize("distance", [0, 3, 6, 8, 10])
def test_near_pairs_among_many_are_the_planted_ones(distance: int) -> None:
    """20,000 random hashes differ in at least 11 bits, except the planted pairs."""
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    for copy in range(200):
        bits = rng.choice(64, copy % (distance + 3), replace=False)
        hashes[19_000 + copy] = hashes[copy] ^ np.uint64(sum(1 << int(bit) for bit in bits))
    expected = {(copy, 19_000 + copy, copy % (distance + 3)) for copy in range(200)}
    found = {(int(i), int(j), int(b)) for part in near_pairs(hashes, None, distance) for i, j, b in zip(*part)}
    assert {row for row in expected if row[2] <= distance} <= found
    assert all(row[2] <= distance for row in found)
    assert len(found) < 400


def test_too_large_a_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 16 of 64 bits"):
        list(near_pairs(np.zeros(2, np.uint64), None, 17))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 30": lambda image: encoded(image, quality=30),
    "half as wide": lambda image: encoded(image.resize((image.width // 2, image.height // 2), Image.BICUBIC)),
    "twice as wide": lambda image: encoded(image.resize((image.width * 2, image.height * 2), Image.BICUBIC)),
    "a rim of 1 % cut off": lambda image: encoded(image.crop((1, 1, image.width - 1, image.height - 1))),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.15)),
    "PNG": lambda image: encoded(image, "PNG"),
}


@pytest.mark.parametrize("change", COPIES)
def test_changed_copies_are_found_in_every_orientation(change: str) -> None:
    originals = [photograph(seed) for seed in range(8)]
    evaluation = evaluation_of([encoded(image, quality=90) for image in originals])
    turned = [
        Image.fromarray(np.ascontiguousarray(np.moveaxis(turn(np.moveaxis(np.asarray(image), 2, 0)), 0, 2)))
        for image, turn in zip(originals, SYMMETRIES.values())
    ]
    found = find_leaks(hash_columns([COPIES[change](image) for image in turned]), evaluation)
    assert [(leak.image, leak.evaluated, leak.kind, leak.turn) for leak in found] == [
        (place, place, "near", place) for place in range(8)
    ]


def test_other_pictures_and_other_seas_are_not_thrown_away() -> None:
    evaluation = evaluation_of([encoded(make(seed)) for make in (photograph, sea) for seed in range(30)])
    others = [encoded(make(seed)) for make in (photograph, sea) for seed in range(100, 160)]
    assert find_leaks(hash_columns(others), evaluation) == []
    copies = [encoded(sea(seed), quality=75) for seed in range(30)]
    assert [leak.evaluated for leak in find_leaks(hash_columns(copies), evaluation)] == list(range(30, 60))


def test_pictures_without_content_are_compared_by_bytes_only() -> None:
    """Empty tiles have equal perceptual hashes, which does not mean that they are copies of a test image."""
    black, other = (encoded(Image.new("RGB", (64, 64), colour)) for colour in ("black", "#010203"))
    assert not hash_image(black, PERCEPTUAL, MAX_PIXELS)["textured"]
    found = find_leaks(hash_columns([other, black]), evaluation_of([black]))
    assert [(leak.image, leak.kind) for leak in found] == [(1, "exact")]


@pytest.mark.skipif(not UCMERCED.is_dir(), reason="UC Merced's photographs are not here")
def test_real_photographs(tmp_path: Path) -> None:
    """No scene of 84 (21 classes) is a copy of another. All mirrored and re-encoded copies are found."""
    paths = [path for scene in sorted(UCMERCED.iterdir()) for path in sorted(scene.glob("*.jpg"))[::25][:4]]
    images = [path.read_bytes() for path in paths]
    assert find_leaks(hash_columns(images[1::2]), evaluation_of(images[::2])) == []
    copies = []
    for data in images[::2]:
        with Image.open(io.BytesIO(data)) as image:
            mirrored = image.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            copies.append(encoded(mirrored.resize((160, 160), Image.BICUBIC), quality=60))
    found = find_leaks(hash_columns(copies), evaluation_of(images[::2]))
    assert [leak.image for leak in found] == [leak.evaluated for leak in found]
    assert len(found) >= 0.97 * len(copies)


def test_prints_are_the_same_from_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PART", 50)  # images
    made = [Record(f"r{n}", encoded(picture(n)), ["x"]) for n in range(110)]
    one = hashing.hash_records(made, tmp_path / "one", PERCEPTUAL, MAX_PIXELS, WorkerPool(1), TaskShare())
    two = hashing.hash_records(made, tmp_path / "two", PERCEPTUAL, MAX_PIXELS, WorkerPool(2), TaskShare())
    files = [[path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 3
    some = np.array([105, 3, 105, 49, 50])
    assert np.array_equal(one.thumbnails(some), np.concatenate([np.load(p)["thumb"] for p in two.parts])[some])
