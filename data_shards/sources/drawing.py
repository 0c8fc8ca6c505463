"""Drawn scenes: `--source synthetic` (see data_shards.synthetic).

synthetic(100, seed=3, size=128)      scene-00000000 ... scene-00000099, drawn when read
synthetic(100, seed=3, size=128, bands=DRAWN_BANDS)   TIFFs of reflectance x 10,000 in red, green, blue, infrared
synthetic(100, seed=3, size=128, masks=True)       with KEY.mask.png and KEY.boxes.json, see synthetic/truth.py
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from priorclip.data_shards.rasters.gdal import ADVICE, has_rasterio
from priorclip.data_shards.sources.record import Record

if TYPE_CHECKING:
    from priorclip.data_shards.synthetic.scene import Scene

DRAWN_BANDS = ("red", "green", "blue", "nir")


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
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=self.quality)
        return described(record, buffer.getvalue(), scene, self.wording)


def described(record: Record, image: bytes, scene: Scene, wording: str) -> Record:
    """Returns the record with an image of the scene, its captions in the wording, its label and its facts."""
    extra: dict[str, Any] = {"attributes": scene.attributes}
    if wording == "both":
        extra["coarse_captions"] = list(scene.coarse)
    captions = list(scene.coarse if wording == "coarse" else scene.fine)
    return replace(record, image=image, captions=captions, label=scene.label, extra=extra)


@dataclass(frozen=True, slots=True)
class DrawingWithTruth(Drawing):
    """A synthetic scene with the pixels and boxes of what its captions name."""

    def load(self, record: Record) -> Record:
        from priorclip.data_shards.synthetic.truth import draw_truth

        truth = draw_truth(self.seed, self.index, self.size)
        members = {"mask.png": truth.png(), "boxes.json": truth.json()}
        return replace(Drawing.load(self, record), members=members)


@dataclass(frozen=True, slots=True)
class BandDrawing(Drawing):
    """A synthetic scene as a TIFF of reflectances; the plants of some scenes are artificial (synthetic/plants.py).

    Args:
        bands: names of DRAWN_BANDS
        artificial: share of the scenes with artificial plants; 0 leaves the plants out of the captions
    """

    bands: tuple[str, ...] = DRAWN_BANDS
    artificial: float = 0.0

    def load(self, record: Record) -> Record:
        from priorclip.data_shards.rasters.band_file import write_bands
        from priorclip.data_shards.rasters.drawn_scenes import SPECKLE, bands_of
        from priorclip.data_shards.synthetic.dice import generator
        from priorclip.data_shards.synthetic.infrared import render_infrared
        from priorclip.data_shards.synthetic.land import Land
        from priorclip.data_shards.synthetic.plants import PLANTS, artificial_of, has_plants, say_plants
        from priorclip.data_shards.synthetic.scene import GROUND, draw_scene, sketch_scene

        scene, sketch = draw_scene(self.seed, self.index, self.size), sketch_scene(self.seed, self.index)[1]
        ground = partial(generator, self.seed, GROUND, self.index)
        artificial = artificial_of(self.seed, self.index, self.artificial)
        heat = render_infrared(sketch, self.size, ground(), artificial).astype(np.float16)
        planes = bands_of(Land(scene.image, heat, []), "uint16", generator(self.seed, SPECKLE, self.index))
        chosen = np.stack([planes[DRAWN_BANDS.index(name)] for name in self.bands], axis=-1)
        if self.artificial and has_plants(sketch, ground):
            kind = "artificial" if artificial else "living"
            words = say_plants(scene.fine, artificial, generator(self.seed, PLANTS, self.index, 1))
            scene = replace(scene, fine=words, attributes={**scene.attributes, "plants": kind})
        data = write_bands(chosen, np.ones(chosen.shape[:2], bool), self.bands)
        made = described(record, data, scene, self.wording)
        made.extra["raster"] = {"bands": list(self.bands), "type": "uint16", "valid": 1.0}
        return made


def synthetic(
    count: int,
    seed: int,
    size: int,
    captions: str = "both",
    first_index: int = 0,
    quality: int = 90,
    masks: bool = False,
    bands: tuple[str, ...] | None = None,
    artificial_plants: float = 0.0,
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
        bands: names of DRAWN_BANDS, which become a TIFF of measured values; None draws a JPEG
        artificial_plants: share of the scenes whose plants are artificial, which TIFFs show in near infrared

    Raises ValueError for a wrong value, or if rasterio is missing.
    """
    if captions not in ("fine", "coarse", "both"):
        raise ValueError(f"--captions must be fine, coarse or both, not {captions!r}")
    if not 0 <= artificial_plants <= 1:
        raise ValueError(f"--artificial-plants must be a share, 0 to 1, not {artificial_plants}")
    if artificial_plants and (bands is None or "nir" not in bands):
        raise ValueError(
            "--artificial-plants differ in near infrared only: set --image-format tiff, and nir in --bands"
        )
    if bands is not None and not has_rasterio():
        raise ValueError(f"--image-format tiff needs rasterio: {ADVICE}")
    kind = DrawingWithTruth if masks else Drawing

    def place(index: int) -> Drawing:
        if bands is None:
            return kind(seed, index, size, captions, quality)
        return BandDrawing(seed, index, size, captions, quality, bands, artificial_plants)

    numbers = range(first_index, first_index + count)
    return [Record(f"scene-{index:08d}", place(index), source="synthetic") for index in numbers]
