"""Where a sample shows what its captions name, cut and turned as its image is: its mask, or boxes around the pieces.

    truths = Truths(shards, "masks", side=224)
    part = SeenPart(centred_square)                  # remembers which part of the image was chosen
    pixels = crop_and_resize(sample.image, 224, part, max_pixels)
    truths.mask(41, part)                            # uint8 (1, 224, 224): a fourth channel of the pixels
    truths.boxes(41, part)                           # float32 (n, 4): left, top, right, bottom in pixels of the result

`pack --source synthetic --masks true` writes both members; streaming reads them only for trainings that ask for them:
`model.belief.mode given` and `finetune prior --targets boxes` or `masks`. A sample without its member, or with one that
cannot be read or does not fit its image, is a bad sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from priorclip.common.untrusted_json import parse_object
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import Box, SeenPart, Turn, crop_and_resize

Kind = Literal["masks", "boxes"]
MEMBERS: dict[Kind, str] = {"masks": "mask.png", "boxes": "boxes.json"}
MOST_BOXES = 1000
SEEN_SHARE = 0.25  # of a box's area: a box of which a crop shows less is left out

Boxes = NDArray[np.float32]


class Truths:
    """Masks or boxes of the samples of shards.

    Args:
        source: the shards
        kind: masks or boxes
        side: of the images that the model gets, pixels
        max_pixels: larger masks are refused before decoding
    Raises:
        ValueError: the source is no set of shards, or its first sample has no such member
    """

    def __init__(self, source: Any, kind: Kind, side: int, max_pixels: int) -> None:
        self.source, self.kind, self.side, self.max_pixels = source, kind, side, max_pixels
        hint = f"{kind} are read from shards that `data_shards pack --source synthetic --masks true` wrote"
        if not hasattr(source, "member"):
            raise ValueError(f"these images have no {kind}: {hint}")
        try:
            source.member(0, MEMBERS[kind])
        except BadSample as error:
            if error.reason == "no member":
                shard, key = source.name(0)
                raise ValueError(f"{shard}: {key} has no {kind}: {error.detail}; {hint}") from error

    def mask(self, sample: int, part: SeenPart) -> NDArray[np.uint8]:
        """Returns the mask of the part of an image that is seen, (1, side, side). Raises BadSample."""
        data = self.source.member(sample, MEMBERS["masks"])

        def choose(width: int, height: int) -> Box:
            if (width, height) != part.size:
                raise BadSample("mask does not fit", f"it has {width} x {height} pixels, its image {part.size}")
            return part.box

        return crop_and_resize(data, self.side, choose, self.max_pixels)[:1]

    def boxes(self, sample: int, part: SeenPart) -> Boxes:
        """Returns the boxes in the part of an image that is seen, (n, 4). Raises BadSample."""
        data = self.source.member(sample, MEMBERS["boxes"])
        try:
            found = parse_boxes(data, part.size)
        except ValueError as error:
            raise BadSample("bad boxes", str(error)) from error
        return boxes_in_part(found, part.box, self.side)


def parse_boxes(data: bytes, size: tuple[int, int]) -> Boxes:
    """Returns the boxes (n, 4) of KEY.boxes.json for an image of ``size`` (width, height).

    Raises ValueError if the file says something else than boxes inside an image of that size.
    """
    values = parse_object(data, "boxes.json")
    if values.get("size") != list(size):
        raise ValueError(f"boxes.json is of an image with the size {values.get('size')!s:.40}, this one has {size}")
    boxes = values.get("boxes")
    if not isinstance(boxes, list) or len(boxes) > MOST_BOXES or not all(map(is_box, boxes)):
        raise ValueError(f"boxes.json: 'boxes' must be at most {MOST_BOXES} lists [left, top, right, bottom]")
    made = np.array(boxes, np.float32).reshape(-1, 4)
    inside = (made[:, :2] >= 0) & (made[:, 2:] <= np.array(size)) & (made[:, :2] < made[:, 2:])
    if not inside.all():
        wrong = made[~inside.all(axis=1)][0].tolist()
        raise ValueError(f"boxes.json: {wrong} is no box inside an image of {size[0]} x {size[1]} pixels")
    return made


def is_box(value: Any) -> bool:
    def is_number(each: Any) -> bool:
        return isinstance(each, int | float) and not isinstance(each, bool) and abs(each) < 1e9 and math.isfinite(each)

    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def boxes_in_part(boxes: Boxes, part: Box, side: int) -> Boxes:
    """Returns the boxes (n, 4) of an image as they lie in a part of it that is resized to a square of ``side``.

    A box is cut at the edge of the part. One of which less than a quarter of the area is left, is left out.
    """
    left, top, right, bottom = part
    corner = np.array([left, top, left, top], np.float32)
    scale = np.array([side / (right - left), side / (bottom - top)] * 2, np.float32)
    whole = (boxes - corner) * scale
    cut = whole.clip(0, side)
    return cut[areas(cut) >= SEEN_SHARE * areas(whole)]


def areas(boxes: Boxes) -> NDArray[np.float32]:
    """Returns the areas (n,) of boxes (n, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def turn_boxes(boxes: Boxes, turn: Turn, side: int) -> Boxes:
    """Returns the boxes (n, 4) of a square image after its pixels were turned by `turn_pixels`."""
    left, top, right, bottom = boxes.T
    if turn.hflip:
        left, right = side - right, side - left
    if turn.vflip:
        top, bottom = side - bottom, side - top
    for _ in range(turn.quarters):  # counter-clockwise: what was on the right is on top
        left, top, right, bottom = top, side - right, bottom, side - left
    return np.stack([left, top, right, bottom], axis=1)


def stack_boxes(rows: Sequence[Boxes]) -> Boxes:
    """Returns the boxes of a batch, (b, most, 4); rows of NaN fill up the images that have fewer."""
    made = np.full((len(rows), max(map(len, rows), default=0), 4), np.nan, np.float32)
    for place, boxes in zip(made, rows, strict=True):
        place[: len(boxes)] = boxes
    return made
