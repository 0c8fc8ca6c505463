"""Position embeddings for another image size or text length than that of a checkpoint.

Images: the grid is resampled, bicubic with antialiasing, and the class token's position is kept, as in open_clip.
Texts: the first positions are kept; longer texts are an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resampled(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Resamples positions (1 + g*g, C) of a class token and a square grid -> ``shape``, (1 + G*G, C)."""
    positions = found[0].float()
    old, new = math.isqrt(positions.shape[0] - 1), math.isqrt(shape[-2] - 1)
    if old != new:
        first, grid = positions[:1], positions[1:]
        square = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        positions = torch.cat([first, square.permute(0, 2, 3, 1).reshape(new * new, -1)])
    return positions.reshape(shape) if positions.numel() == shape.numel() else positions


def first_positions(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Takes the first of the positions (T, C). Raises ValueError if there are too few."""
    if found[0].shape[0] < shape[0]:
        raise ValueError(f"--context_length {shape[0]}: the checkpoint has positions for {found[0].shape[0]} tokens")
    return found[0][: shape[0]]
