"""The masks of drawn scenes, as `data_shards pack --masks true` writes them, in the square that the model sees.

masks = TrueMasks(gallery, max_pixels)
masks.square(3)                        # (H, W) float64 in 0..1, of the centred square of image 3
masks.shares(3, (7, 7))                # (7, 7): the share of each visual token's place
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.transforms import centred_square
from priorclip.data_shards.shards import ShardSet
from priorclip.model.localization import cell_shares
from priorclip.retrieval.gallery import Gallery

MEMBER = "mask.png"


class TrueMasks:
    """The masks of a gallery's images. Raises ValueError if the gallery is not of shards."""

    def __init__(self, gallery: Gallery, data: str, max_pixels: int) -> None:
        self.gallery, self.data, self.max_pixels = gallery, data, max_pixels
        if not isinstance(gallery.origin, ShardSet):
            raise ValueError(f"--data {data} has no masks: {self.hint}")
        self.shards = gallery.origin

    @property
    def hint(self) -> str:
        return "name shards that `python -m data_shards pack --source synthetic --masks true` wrote"

    def square(self, image: int) -> Tensor:
        """Returns the mask (S, S) float64 of the centred square of an image. Raises ValueError, which names the key."""
        key = self.gallery.source.name(image)[1]
        try:
            data = self.shards.member(self.gallery.places[image], MEMBER)
        except BadSample as error:
            raise ValueError(f"--data {self.data}, {key}: {error}; {self.hint}") from error
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                if picture.width * picture.height > self.max_pixels:
                    raise ValueError(f"it has more than {self.max_pixels} pixels")
                values = np.asarray(picture.convert("L"), np.float64) / 255
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"--data {self.data}, {key}.{MEMBER} cannot be read: {error}") from error
        left, top, right, bottom = centred_square(values.shape[1], values.shape[0])
        return torch.from_numpy(values[top:bottom, left:right].copy())

    def shares(self, image: int, grid: tuple[int, int]) -> Tensor:
        """Returns the share of each cell of the grid (h, w) that the main thing covers."""
        return cell_shares(self.square(image), grid)
