"""Drawn scenes: `--source synthetic` (see data_shards.synthetic).

synthetic(100, seed=3, size=128)      scene-00000000 ... scene-00000099, drawn when read
synthetic(100, seed=3, size=128, masks=True)       with KEY.mask.png and KEY.boxes.json, see synthetic/truth.py
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from priorclip.data_shards.sources.record import Record


@dataclass(frozen=True, slots=True)
class Drawing:
    """A synthetic scene, drawn when it is read; ``wording`` is fine, coarse or both, ``quality`` the JPEG quality."""

    seed: int
    index: int
    size: int
    wording: str = "both"
    quality: int = 90
    describes: ClassVar[bool] = True  # drawing gives captions and label too

    def load(self, record: Record) -> Record:
        from PIL import Image

        from priorclip.data_shards.synthetic import draw_scene

        scene = draw_scene(self.seed, self.index, self.size)
        extra: dict[str, Any] = {"attributes": scene.attributes}
        if self.wording == "both":
            extra["coarse_captions"] = list(scene.coarse)
        captions = list(scene.coarse if self.wording == "coarse" else scene.fine)
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=self.quality)
        return replace(record, image=buffer.getvalue(), captions=captions, label=scene.label, extra=extra)


@dataclass(frozen=True, slots=True)
class DrawingWithTruth(Drawing):
    """A synthetic scene with the pixels and boxes of what its captions name."""

    def load(self, record: Record) -> Record:
        from priorclip.data_shards.synthetic.truth import draw_truth

        truth = draw_truth(self.seed, self.index, self.size)
        members = {"mask.png": truth.png(), "boxes.json": truth.json()}
        return replace(Drawing.load(self, record), members=members)


def synthetic(
    count: int,
    seed: int,
    size: int,
    captions: str = "both",
    first_index: int = 0,
    quality: int = 90,
    masks: bool = False,
) -> list[Record]:
    """Returns records of drawn scenes. Reading a record draws the picture and makes its captions.

    Args:
        count: number of scenes
        seed: seed of the generator
        size: side in pixels
        captions: fine, coarse, or both (fine in ``captions``, coarse in ``coarse_captions``)
        first_index: index of the first scene, so that sets with the same seed need not overlap
        quality: JPEG quality
        masks: also make the members ``mask.png`` and ``boxes.json``
    """
    if captions not in ("fine", "coarse", "both"):
        raise ValueError(f"--captions must be fine, coarse or both, not {captions!r}")
    kind = DrawingWithTruth if masks else Drawing
    return [
        Record(f"scene-{index:08d}", kind(seed, index, size, captions, quality), source="synthetic")
        for index in range(first_index, first_index + count)
    ]
