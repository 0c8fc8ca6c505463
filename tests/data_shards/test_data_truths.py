"""Masks and boxes in a stream: they are cut, flipped and turned as their images are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import encoded, records

from priorclip.data_shards import ShardSet, ShardStream, eval_batches
from priorclip.data_shards.config import DataConfig, RandAugmentConfig
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.sources import Record
from priorclip.data_shards.stream.truths import MEMBERS, boxes_in_part, parse_boxes

WIDTH, HEIGHT, COUNT = 80, 64, 12


def painted(index: int) -> tuple[np.ndarray, list[list[int]]]:
    """A black picture with three white rectangles that do not touch, and their boxes."""
    rng = np.random.default_rng(index)
    picture, boxes = np.zeros((HEIGHT, WIDTH), np.uint8), []
    for column in range(3):
        left, top = column * 26 + rng.integers(2, 6), rng.integers(2, 30)
        box = [int(left), int(top), int(left + rng.integers(8, 18)), int(top + rng.integers(8, 30))]
        picture[box[1] : box[3], box[0] : box[2]] = 255
        boxes.append(box)
    return picture, boxes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are their own masks, without loss."""
    folder = tmp_path_factory.mktemp("truths") / "shards"
    made = []
    for index in range(COUNT):
        picture, boxes = painted(index)
        png = encoded(Image.fromarray(picture).convert("RGB"), "PNG")
        found = json.dumps({"noun": "x", "size": [WIDTH, HEIGHT], "boxes": boxes}).encode()
        members = {"mask.png": encoded(Image.fromarray(picture), "PNG"), "boxes.json": found}
        made.append(Record(f"{index:03d}", png, ["words"], "field", members=members))
    pack(made, folder, PackPlan(shard_size=5))
    return folder


def stream(shards: Path, truth: Any, side: int = 48, **options: Any) -> ShardStream:
    config = DataConfig(str(shards), image_size=side, workers=0, **options)
    return ShardStream(ShardSet(str(shards)), None, config, global_batch=4, seed=3, epochs=4, truth=truth)


@pytest.mark.parametrize("kept", [0, "10MB"])
def test_a_mask_is_cut_and_turned_as_its_image(shards: Path, kept: Any) -> None:
    seen = set()
    for batch in stream(shards, "masks", scale=1 if kept else 0.4, keep_pixels=kept):
        assert batch["masks"].dtype == torch.uint8
        assert torch.equal(batch["masks"], batch["images"][:, 0])
        seen |= {mask.numpy().tobytes() for mask in batch["masks"]}
    assert len(seen) > (COUNT if kept else 2 * COUNT)  # flips and turns differ from epoch to epoch


def test_a_stream_with_truth_has_the_images_of_one_without(shards: Path) -> None:
    for one, other in zip(stream(shards, "boxes"), stream(shards, None), strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["image_ids"], other["image_ids"])


@pytest.mark.parametrize("kept", [0, "10MB"])
def test_boxes_lie_on_what_the_image_shows(shards: Path, kept: Any) -> None:
    """The reference is the pixels: each box is full, and all that is white is in a box or was nearly cut away."""
    side, boxes_seen = 96, 0
    for batch in stream(shards, "boxes", side=side, scale=1 if kept else 0.4, keep_pixels=kept):
        for image, boxes in zip(batch["images"][:, 0].numpy(), batch["boxes"].numpy(), strict=True):
            covered = np.zeros((side, side), bool)
            for left, top, right, bottom in boxes[~np.isnan(boxes[:, 0])]:
                assert 0 <= left < right <= side
                assert 0 <= top < bottom <= side
                inner = image[int(top) + 3 : int(bottom) - 2, int(left) + 3 : int(right) - 2]
                assert inner.size == 0 or inner.min() > 200
                covered[max(0, int(top) - 3) : int(bottom) + 4, max(0, int(left) - 3) : int(right) + 4] = True
                boxes_seen += 1
            if kept:  # all of the image is seen, so no rectangle is cut
                assert not (image[~covered] > 60).any()
                assert np.isfinite(boxes).all()
    assert boxes_seen > 2 * COUNT


def test_a_box_is_cut_and_left_out_when_little_is_seen() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 30], [37, 0, 57, 10]], np.float32)
    found = boxes_in_part(boxes, (5, 0, 45, 40), 80)  # twice as large; 8 of the last box's 20 columns are seen
    assert found.tolist() == [[0, 0, 10, 20], [30, 40, 70, 60], [64, 0, 80, 20]]
    assert boxes_in_part(boxes, (8, 0, 41, 33), 33).tolist() == [[12, 20, 32, 30]]


@pytest.mark.parametrize("truth", ["masks", "boxes"])
def test_an_evaluation_has_the_centred_square(shards: Path, truth: Any) -> None:
    batches = eval_batches(ShardSet(str(shards)), None, 64, 5, truth=truth)
    (batch, *_) = batches.images()
    for row, index in enumerate(batch["index"].tolist()):
        picture, boxes = painted(index)
        if truth == "masks":
            assert np.array_equal(batch["masks"][row].numpy(), picture[:, 8:72])
        else:
            wanted = boxes_in_part(np.array(boxes, np.float32), (8, 0, 72, 64), 64)
            found = batch["boxes"][row]
            assert np.array_equal(found[~found[:, 0].isnan()].numpy(), wanted)
    *_, last = batches.images()
    assert (last["index"] == -1).sum() == 3
    assert (last["masks"][2:] == 0).all() if truth == "masks" else last["boxes"][2:].isnan().all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1", "is not JSON"),
        (b'{"size": [80, 64]}', "'boxes' must be at most 1000 lists"),
        (b'{"size": [64, 80], "boxes": []}', "of an image with the size"),
        (b'{"size": [80, 64], "boxes": [[0, 0, 90, 10]]}', "no box inside an image of 80 x 64"),
        (b'{"size": [80, 64], "boxes": [[9, 0, 9, 10]]}', "no box inside"),
        (b'{"size": [80, 64], "boxes": [[NaN, 0, 9, 10]]}', "'boxes' must be"),
        (b'{"size": [80, 64], "boxes": [[1e400, 0, 9, 10]]}', "'boxes' must be"),
        (b'{"size": [80, 64], "boxes": [["0", 0, 9, 10]]}', "'boxes' must be"),
        (b'{"size": [80, 64], "boxes": [%s]}' % b",".join([b"[0,0,1,1]"] * 1001), "at most 1000"),
    ],
)
def test_boxes_that_cannot_be_are_named(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_boxes(content, (80, 64))


def test_a_bad_truth_is_a_bad_sample(tmp_path: Path) -> None:
    """A mask of another size is replaced in training, and ends an evaluation by its name."""
    made = [
        replace(record, members={"mask.png": encoded(Image.new("L", (64, 72) if number == 7 else (72, 64)), "PNG")})
        for number, record in enumerate(records(10))
    ]
    pack(made, tmp_path / "shards", PackPlan())
    config = DataConfig(str(tmp_path / "shards"), image_size=32, workers=0, max_bad_share=1)
    source = ShardSet(config.shards)
    training = ShardStream(source, None, config, global_batch=10, epochs=1, truth="masks")
    (batch,) = training
    assert 7 not in batch["image_ids"]
    assert training.skipped == {"mask does not fit": 1}
    with pytest.raises(ValueError, match=r"area/00007.*mask does not fit: it has 64 x 72 pixels"):
        list(eval_batches(source, None, 32, 10, truth="masks").images())


def test_shards_without_truth_are_refused_at_the_start(packed: Path) -> None:
    for kind, member in MEMBERS.items():
        with pytest.raises(ValueError, match=rf"has no {kind}: the sample has no \.{member}; {kind} are read from"):
            stream(packed, kind)


def test_an_augmentation_that_moves_pixels_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.randaugment moves the pixels of an image but not its masks"):
        stream(shards, "masks", randaugment=RandAugmentConfig())
