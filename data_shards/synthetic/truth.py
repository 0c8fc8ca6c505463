"""Where a drawn scene shows what its captions name: a mask of its main thing, and a box around each piece of it.

    four white tanks beside a river      mask: share of each pixel that shows a tank, not the river
                                         boxes: four

    truth = draw_truth(seed=1, index=7, size=128)
    truth.mask                    # float32 (128, 128), 0 to 1
    truth.boxes                   # [[left, top, right, bottom], ...] in pixels; right and bottom are outside

The main thing is what every caption begins with, such as the tanks, or the river of a river scene. Whatever lies on it
and is another thing, such as a ship on the river, is not in the mask. Its shadow is not either.
"""

from __future__ import annotations

import io
import json
from typing import NamedTuple

import numpy as np
from PIL import Image

from priorclip.data_shards.synthetic.dice import generator
from priorclip.data_shards.synthetic.render import part_mask
from priorclip.data_shards.synthetic.scene import GROUND, sketch_scene
from priorclip.data_shards.synthetic.sketch import Plane, detail

MAIN = "main"
SEEN = 0.4  # share of a pixel from which on it belongs to a piece
SMALLEST_PIECE = 4  # pixels; smaller pieces, such as what a car leaves of a road's edge, have no box


class Truth(NamedTuple):
    """The main thing of a scene.

    Args:
        mask: share of each pixel that shows it, float32 ``(size, size)`` in 0..1
        noun: its name in the facts
        boxes: a box in pixels around each piece, ``[left, top, right, bottom]``, the largest piece first
    """

    mask: Plane
    noun: str
    boxes: list[list[int]]

    def png(self) -> bytes:
        """Returns the mask as a grey PNG: 255 is a pixel that shows nothing else."""
        buffer = io.BytesIO()
        Image.fromarray(np.round(255 * self.mask).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    def json(self) -> bytes:
        """Returns ``{"noun": ..., "size": [width, height], "boxes": [...]}``."""
        height, width = self.mask.shape
        return json.dumps({"noun": self.noun, "size": [width, height], "boxes": self.boxes}).encode()


def draw_truth(seed: int, index: int, size: int) -> Truth:
    """Returns where the scene of ``draw_scene`` with the same arguments shows its main thing."""
    _, sketch, facts = sketch_scene(seed, index)
    mask = part_mask(sketch, size, (MAIN, detail(MAIN)), generator(seed, GROUND, index))
    return Truth(mask, facts.main.noun, boxes_of(mask))


def boxes_of(mask: Plane) -> list[list[int]]:
    """Returns a box around each connected piece of a mask, the largest piece first."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask > SEEN)
    pixels = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    spans = ndimage.find_objects(pieces)
    kept = [number for number in np.argsort(-pixels, kind="stable").tolist() if pixels[number] >= SMALLEST_PIECE]
    return [[across.start, down.start, across.stop, down.stop] for down, across in (spans[number] for number in kept)]
