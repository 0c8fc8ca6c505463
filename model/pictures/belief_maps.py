"""Belief maps as pictures: the places that the instruction believes in, painted over the image.

    belief = model.belief_map(images)                   # (B, h, w), each sums to 1
    paint_belief(images[0], belief[0]).save("belief.png")

The image becomes grey, and the belief is painted over it in colour, smoothly resized from the grid to the pixels. The
brightest colour is the highest belief, but at least twice the even share. So a model with equal belief everywhere gives
an even, medium colour and no picture of rounding errors.

    paint_belief(images[0], soft_map(belief[0]))        # the weights of soft belief
    paint_kept(images[0], hard_map(belief[0], k=12))    # the tokens that hard belief keeps
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from priorclip.model.networks.belief import belief_rank, order_descending

COLOURS = "inferno"
FAINTEST, STRONGEST = 0.25, 0.8  # share of the colour in a pixel at brightness 0 and 1
DARKENED = 0.3  # brightness of a place that hard belief drops


def paint_belief(image: Tensor, belief: Tensor) -> Image.Image:
    """Returns the image with the belief painted over it.

    Args:
        image: uint8 (3, H, W)
        belief: (h, w), any grid
    Raises:
        ValueError: one of them has another shape or dtype
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
    shine = resize_smoothly(brightness(belief), width, height)
    colour = colormaps[COLOURS](shine)[..., :3] * 255
    share = (FAINTEST + (STRONGEST - FAINTEST) * shine)[..., None]
    return Image.fromarray((grey * (1 - share) + colour * share).round().astype(np.uint8))


def brightness(belief: Tensor) -> Tensor:
    """Scales belief (h, w) to [0, 1]: 1 is the highest belief, or twice the even share if that is higher."""
    values = belief.detach().float().cpu()
    return values / max(float(values.max()), 2 / values.numel())


def resize_smoothly(grid: Tensor, width: int, height: int) -> np.ndarray:
    """Resizes (h, w) -> (height, width), within the range of the grid's values."""
    drawn = Image.fromarray(grid.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(drawn).clip(float(grid.min()), float(grid.max()))


def belief_panel(images: Tensor, beliefs: Tensor, gap: int = 4) -> Image.Image:
    """Draws images above their belief maps: uint8 (B, 3, H, W) and (B, h, w) -> one picture."""
    count, _, height, width = images.shape
    panel = Image.new("RGB", (count * (width + gap) - gap, 2 * height + gap), "white")
    for place, (image, belief) in enumerate(zip(images, beliefs, strict=True)):
        left = place * (width + gap)
        panel.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), (left, 0))
        panel.paste(paint_belief(image, belief), (left, height + gap))
    return panel


def soft_map(belief: Tensor) -> Tensor:
    """Returns the paper's weights of soft belief, M + 1/sqrt(R): belief (h, w) -> (h, w).

    Beliefs that underflow to equal zeros rank by position, so take them in float64.
    """
    flat = belief.flatten()
    return (flat + belief_rank(flat).to(flat.dtype).rsqrt()).view_as(belief)


def hard_map(belief: Tensor, k: int) -> Tensor:
    """Marks the k tokens that hard belief keeps: belief (h, w) -> bool (h, w). Raises ValueError for a wrong k."""
    if not 1 <= k <= belief.numel():
        raise ValueError(f"hard belief cannot keep {k} of {belief.numel()} tokens")
    kept = torch.zeros(belief.numel(), dtype=torch.bool, device=belief.device)
    kept[order_descending(belief.flatten())[:k]] = True
    return kept.view_as(belief)


def paint_kept(image: Tensor, kept: Tensor) -> Image.Image:
    """Returns the image, uint8 (3, H, W), with the places that bool (h, w) does not mark in dark grey."""
    height, width = image.shape[1:]
    photo = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    dark = photo.convert("L").point(lambda value: value * DARKENED).convert("RGB")
    mask = Image.fromarray(kept.cpu().numpy().astype(np.uint8) * 255)
    return Image.composite(photo, dark, mask.resize((width, height), Image.Resampling.NEAREST))
