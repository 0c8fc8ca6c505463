"""Threads that decode images share a bound of memory, and a text query does not wait for them."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_galleries import TestSet, picture, write_karpathy

from priorclip.data_shards.format.sample import BadSample
from priorclip.retrieval import Encoder, Searcher, build_index
from priorclip.retrieval.commands import IndexConfig
from priorclip.retrieval.image_gate import READERS, ImageGate, count_pixels

LIMIT = 100 * 100


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


class Meter:
    """Counts the pixels that are decoded at the same time, and the images that were read and wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pixels = self.most_pixels = self.waiting = self.most_waiting = 0

    def add(self, pixels: int = 0, waiting: int = 0) -> None:
        with self.lock:
            self.pixels, self.waiting = self.pixels + pixels, self.waiting + waiting
            self.most_pixels = max(self.most_pixels, self.pixels)
            self.most_waiting = max(self.most_waiting, self.waiting)


def test_all_images_inside_stay_below_the_limit_and_all_pass() -> None:
    gate, meter, draw = ImageGate(LIMIT), Meter(), random.Random(3)
    sides = [draw.choice([10, 40, 60, 99, 100]) for _ in range(80)]

    def read(side: int) -> bytes:
        meter.add(waiting=1)
        return png(side)

    def pass_through(side: int) -> int:
        with gate.reading(lambda: read(side)) as data:
            meter.add(side * side, waiting=-1)
            time.sleep(0.002)
            meter.add(-side * side)
            return count_pixels(data)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(pass_through, sides)) == [side * side for side in sides]
    assert 60 * 60 < meter.most_pixels <= LIMIT
    assert meter.most_waiting <= 2 * READERS  # those that wait, and those that are just let in; 20 without a bound


def test_an_image_above_the_limit_passes_alone() -> None:
    with ImageGate(LIMIT).reading(lambda: png(300)) as data:
        assert count_pixels(data) == 90_000


@pytest.mark.parametrize("failing", [lambda: b"no image", Path("/nowhere").read_bytes])
def test_a_failure_leaves_no_room_occupied(failing: Callable[[], bytes]) -> None:
    gate = ImageGate(LIMIT)
    for _ in range(3 * READERS):
        with pytest.raises((BadSample, OSError)), gate.reading(failing):
            pass
        with pytest.raises(RuntimeError), gate.reading(lambda: png(100)):
            raise RuntimeError("decoding failed")
    with gate.reading(lambda: png(100)) as data:
        assert data


@pytest.fixture(scope="module")
def searcher(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    folder = tmp_path_factory.mktemp("large")
    picture(0).save(folder / "small.png")
    picture(1).resize((6000, 6000)).save(folder / "large.png", compress_level=1)
    names = ("small.png", "large.png")
    entries = [{"filename": name, "split": "test", "sentences": [{"raw": "a river"}]} for name in names]
    data = write_karpathy(folder / "set.json", entries)
    config = IndexConfig(
        model=str(test_set.export), data=str(data), images=str(folder), output=str(folder / "index"), device="cpu"
    )
    return Searcher(build_index(config), Encoder.load(test_set.export, "cpu"))


def test_a_text_query_does_not_wait_while_images_are_decoded(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An upload, an image and a belief map hang in their decoder; the text query answers all the same."""
    decode, hold, inside = searcher.encoder.decode, threading.Event(), threading.Semaphore(0)

    def slow(*args: object, **options: object) -> torch.Tensor:
        inside.release()
        assert hold.wait(30)
        return decode(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(searcher.encoder, "decode", slow)
    with ThreadPoolExecutor(2) as pool:
        upload = pool.submit(searcher.by_image, png(50), 1)
        belief = pool.submit(searcher.belief, 0, 32)
        try:
            assert all(inside.acquire(timeout=20) for _ in range(2))
            assert len(searcher.by_text("a river", 2)) == len(searcher.by_row(1, 2)) == 2
            assert not upload.done()
            assert not belief.done()
        finally:
            hold.set()
        assert len(upload.result(30)) == 1
        assert belief.result(30).size == (32, 32)


def test_large_previews_come_one_after_the_other(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images of 36 megapixels: at most two are within the limit of 100 at the same time."""
    meter = Meter()
    decode = searcher.encoder.decode

    def counted(data: bytes, side: int | None = None) -> torch.Tensor:
        meter.add(count_pixels(data))
        try:
            return decode(data, side)
        finally:
            meter.add(-count_pixels(data))

    monkeypatch.setattr(searcher.encoder, "decode", counted)
    with ThreadPoolExecutor(6) as pool:
        assert {image.size for image in pool.map(lambda _: searcher.belief(1, 24), range(6))} == {(24, 24)}
    assert 36_000_000 <= meter.most_pixels <= 72_000_000
