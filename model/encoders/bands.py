"""Image encoders of any number of bands, from weights that were trained on red, green and blue.

    kernel (C, 3, k, k) for bands (nir, red, green, blue)        start: meaning
        nir    mean of the three kernels                         red, green, blue take their own kernel, others the mean
        red    kernel of red
        ...
    start: repeat      red, green, blue, red, ... times 3 / n, as timm does for in_chans: bands of any meaning

A band without deviation from its mean (0 after normalisation) adds nothing. So by ``meaning`` the wider encoder starts
as the encoder of colours that it was, and learns what the other bands say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from priorclip.model.config import EncoderConfig

COLOURS = ("red", "green", "blue")


def widen(state: Mapping[str, Tensor], backbone: nn.Module, config: EncoderConfig) -> dict[str, Tensor]:
    """Returns the state of a model of colours for the bands of the configuration.

    Args:
        state: by the names of ``backbone``; its first layer reads red, green and blue
        backbone: timm model whose first layer reads the bands
        config: of the encoder, with bands

    Raises ValueError if the first layer is unknown, or does not read three channels.
    """
    assert config.bands is not None, "an encoder of colours needs no widening"
    name = f"{first_layer(backbone, config.name)}.weight"
    kernel = state.get(name)
    if kernel is None or kernel.ndim != 4 or kernel.shape[1] != len(COLOURS):
        found = "is missing" if kernel is None else f"has the shape {tuple(kernel.shape)}"
        raise ValueError(f"bands of '{config.name}' start from weights of red, green and blue, but '{name}' {found}")
    return {**state, name: widened_kernel(kernel, config.bands, config.band_start)}


def widened_kernel(kernel: Tensor, bands: Sequence[str], start: str) -> Tensor:
    """Returns the kernel (C, n, k, k) for n bands from that of red, green and blue (C, 3, k, k)."""
    if start == "repeat":
        return adapt_input_conv(len(bands), kernel)
    mean = kernel.mean(dim=1)
    names = [band.lower() for band in bands]
    return torch.stack([kernel[:, COLOURS.index(name)] if name in COLOURS else mean for name in names], dim=1)


def first_layer(backbone: Any, name: str) -> str:
    """Returns the dotted name of the layer that reads the image. Raises ValueError if timm names none, or several."""
    found = (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv")
    if not isinstance(found, str):
        raise ValueError(f"bands of '{name}': timm names no single first layer of it, so its weights cannot be widened")
    return found


def band_numbers(bands: Sequence[str], given: Sequence[str], name: str) -> list[int]:
    """Returns the place of each band in the channels of a batch. Raises ValueError for one that the batch lacks."""
    if missing := [band for band in bands if band not in given]:
        raise ValueError(f"bands of '{name}': {', '.join(missing)} is not in the bands of a batch, {', '.join(given)}")
    return [list(given).index(band) for band in bands]


def blank_images(count: int, side: int, bands: Sequence[str] | None, device: Any = None) -> Tensor:
    """Returns images of zeros as a model takes them: uint8 (count, 3, side, side), or float32 with its bands."""
    if bands is None:
        return torch.zeros((count, len(COLOURS), side, side), dtype=torch.uint8, device=device)
    return torch.zeros((count, len(bands), side, side), dtype=torch.float32, device=device)
