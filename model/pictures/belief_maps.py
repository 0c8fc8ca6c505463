"""Belief maps as pictures: where in the image the instruction looks, painted over the image.

    belief = model.belief_map(images)                   # (B, h, w), each sums to 1
    paint_belief(images[0], belief[0]).save("belief.png")

The image fades to grey and the belief shines through it in colour, smoothly enlarged from the grid to the pixels. The
brightest colour is the highest belief, but at least twice that of an even spread: a model that believes in every place
alike gives an even, middling colour, not a picture of its rounding errors.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLOURS = "inferno"
FAINTEST, STRONGEST = 0.25, 0.8  # share of the colour in a pixel, at belief 0 and at the brightest


def paint_belief(image: Tensor, belief: Tensor) -> Image.Image:
    """The belief over the image.

    Args:
        image: uint8 (3, H, W)
        belief: (h, w), any grid
    Raises:
        ValueError: one of them has another form
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or belief.ndim != 2:
        raise ValueError(
            f"a picture takes an image uint8 (3, H, W) and belief (h, w), not {image.dtype} {tuple(image.shape)} and "
            f"{tuple(belief.shape)}"
        )
    from matplotlib import colormaps

    height, width = image.shape[1:]
    photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    grey = np.asarray(photo.convert("L"), dtype=np.float32)[..., None]
    shine = enlarged(brightness(belief), width, height)
    colour = colormaps[COLOURS](shine)[..., :3] * 255
    share = (FAINTEST + (STRONGEST - FAINTEST) * shine)[..., None]
    return Image.fromarray((grey * (1 - share) + colour * share).round().astype(np.uint8))


def brightness(belief: Tensor) -> Tensor:
    """Belief (h, w) -> 0 to 1: 1 is the highest, or twice the even share where none is that high."""
    values = belief.detach().float().cpu()
    return values / max(float(values.max()), 2 / values.numel())


def enlarged(grid: Tensor, width: int, height: int) -> np.ndarray:
    """(h, w) -> (height, width), smooth, within the values of the grid."""
    drawn = Image.fromarray(grid.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(drawn).clip(float(grid.min()), float(grid.max()))


def belief_panel(images: Tensor, beliefs: Tensor, gap: int = 4) -> Image.Image:
    """Images above, their belief maps below: uint8 (B, 3, H, W) and (B, h, w) -> one picture."""
    count, _, height, width = images.shape
    panel = Image.new("RGB", (count * (width + gap) - gap, 2 * height + gap), "white")
    for place, (image, belief) in enumerate(zip(images, beliefs, strict=True)):
        left = place * (width + gap)
        panel.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (left, 0))
        panel.paste(paint_belief(image, belief), (left, height + gap))
    return panel
