"""Pictures of images of measured bands, for people to look at.

    in_colours(images, ("blue", "green", "red", "nir"))    float32 (B, 4, H, W) -> uint8 (B, 3, H, W): red, green, blue

Without these three bands the first three are shown, or the first one in grey. Black and white of a band are percentiles
2 and 98 of all images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from priorclip.model.encoders.bands import COLOURS

BLACK, WHITE = 0.02, 0.98
SAMPLE = 1 << 20  # values of a band that the percentiles are taken from


def in_colours(images: Tensor, bands: Sequence[str] | None) -> Tensor:
    """Returns images as pictures, uint8 (B, 3, H, W). Pictures, ``bands`` None, stay as they are.

    Args:
        images: uint8 (B, 3, H, W), or measured values (B, n, H, W)
        bands: n names
    """
    if bands is None or not len(images):
        return images if bands is None else images.new_zeros((0, 3, *images.shape[2:]), dtype=torch.uint8)
    names = [band.lower() for band in bands]
    places = [names.index(colour) for colour in COLOURS] if set(COLOURS) <= set(names) else list(range(len(names)))[:3]
    shown = images[:, places if len(places) == 3 else places[:1] * 3].float()
    planes = shown.transpose(0, 1).flatten(1)
    planes = planes[:, :: -(-planes.shape[1] // SAMPLE)]
    low, high = (planes.quantile(share, dim=1).view(1, 3, 1, 1) for share in (BLACK, WHITE))
    return ((shown - low) / (high - low).clamp_min(1e-12) * 255).round().clamp(0, 255).to(torch.uint8)
