"""Decoded images in memory: the same batches as without it, nothing is read twice, and a bound on the memory."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import encoded, picture, write_tar
from stream_data import assert_same, config, stream_of, take

from priorclip.data_shards import ShardStream
from priorclip.data_shards.stream.kept_samples import DecodedSample, KeptSamples

EPOCHS = 3
IMAGE = 3 * 24 * 24  # bytes of an image of the streams below


def batches(packed: Path, tokenizer: Path, keep: int | str, **options: object) -> list[dict]:
    settings = {"scale": 1.0, "keep_pixels": keep, "caption_noise": 0.2, "label_noise": 0.2} | options
    return take(stream_of(config(packed, **settings), str(tokenizer)), 5 * EPOCHS)


@pytest.mark.parametrize("keep", ["1MB", 20 * IMAGE])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_without_kept_pixels(packed: Path, tokenizer_folder: Path, keep: int, workers: int) -> None:
    expected = batches(packed, tokenizer_folder, 0)
    assert_same(batches(packed, tokenizer_folder, keep, workers=workers), expected)


def test_an_evaluation_keeps_its_squares(packed: Path) -> None:
    one, other = (stream_of(config(packed, scale=1.0, keep_pixels=keep), train=False, batch=46) for keep in (0, "1MB"))
    assert_same(take(other, 3), take(one, 3))
    assert len(other.fetcher.kept) == 46


def test_a_kept_sample_is_neither_read_nor_decoded_again(
    packed: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(config(packed, scale=1.0, keep_pixels="1MB", caption_noise=0.5), str(tokenizer_folder), batch=46)
    first, *_ = take(stream, 1)
    for name in ("read", "text", "captions"):
        monkeypatch.setattr(stream.source, name, lambda *_: pytest.fail("a kept sample was read"))
    monkeypatch.setattr(stream.fetcher, "decode", lambda *_: pytest.fail("a kept sample was decoded"))
    (second,) = take(stream, 1)
    assert sorted(second["image_ids"].tolist()) == sorted(first["image_ids"].tolist()) == list(range(46))
    assert [second["epoch"], stream.state_dict()["epoch"]] == [1, 2]


def damaged_tar(folder: Path) -> Path:
    """Writes 8 samples. Number 3 is not an image and number 5 has no caption."""
    members = {}
    for index in range(8):
        members[f"{index}.jpg"] = b"no image" if index == 3 else encoded(picture(index))
        members[f"{index}.txt"] = b"" if index == 5 else f"caption {index} variant 0".encode()
    return write_tar(folder / "a.tar", members)


def test_bad_samples_are_reported_in_every_epoch(tmp_path: Path, tokenizer_folder: Path) -> None:
    def run(keep: int | str) -> tuple[ShardStream, list[dict]]:
        options = {"scale": 1.0, "max_bad_share": 1.0, "keep_pixels": keep}
        stream = stream_of(config(damaged_tar(tmp_path), **options), str(tokenizer_folder), batch=8)
        return stream, take(stream, EPOCHS)

    (plain, expected), (keeping, found) = run(0), run("1MB")
    assert_same(found, expected)
    assert keeping.skipped == plain.skipped
    assert keeping.skipped["not an image"] >= EPOCHS
    assert keeping.skipped["no caption"] >= EPOCHS
    assert 3 not in keeping.fetcher.kept
    assert 5 not in keeping.fetcher.kept
    assert len(keeping.fetcher.kept) == 6


def sample(side: int, words: int) -> DecodedSample:
    return DecodedSample(np.zeros((3, side, side), np.uint8), ["word " * words], 0)


@settings(deadline=None)
@given(st.integers(0, 30_000), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), max_size=30))
def test_the_memory_stays_below_the_limit_and_what_is_kept_stays(limit: int, shapes: list[tuple[int, int]]) -> None:
    kept = KeptSamples(limit)
    total = 0
    for index, shape in enumerate(shapes):
        before = {number for number in range(index) if number in kept}
        kept.add(index, sample(*shape))
        assert (index in kept) == (total + sample(*shape).bytes <= limit and limit > 0)
        total += sample(*shape).bytes if index in kept else 0
        assert before <= {number for number in range(index + 1) if number in kept}
    assert kept.bytes == total <= limit


def test_the_estimate_of_a_sample_covers_what_python_takes() -> None:
    import tracemalloc

    kept = KeptSamples(10**9)
    tracemalloc.start()
    for index in range(2000):
        kept.add(index, DecodedSample(np.empty((3, 8, 8), np.uint8), [f"caption {index} {n}" for n in range(5)], index))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.8 * taken < kept.bytes < 1.6 * taken


def test_kept_pixels_cannot_be_changed_and_stay_in_their_process() -> None:
    kept = KeptSamples(10**6)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3).transpose(2, 0, 1)
    kept.add(0, DecodedSample(pixels, ["a"], 2))
    found = kept.get(0)
    assert found is not None
    assert np.array_equal(found.pixels, pixels)
    with pytest.raises(ValueError, match="read-only"):
        found.pixels[0, 0, 0] = 1
    copy = pickle.loads(pickle.dumps(kept))
    assert (len(copy), copy.bytes, copy.limit) == (0, 0, 10**6)


def test_options_are_checked_and_the_log_says_how_much_fits(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"data\.keep_pixels needs data\.scale 1, not 0\.5"):
        config(packed, keep_pixels="1MB")
    with pytest.raises(ValueError, match=r"data\.keep_pixels: '5 apples' is not a size"):
        config(packed, keep_pixels="5 apples", scale=1.0)
    with caplog.at_level(logging.INFO):
        stream_of(config(packed, keep_pixels=20 * IMAGE, scale=1.0))
    assert "keeps up to 20 of 46 decoded images" in caplog.text
