"""Does a map of an image point at what it should? Three measures of a map against the true mask, on the map's own grid.

    image    mask, share of each cell    map      pointing             .5   the highest cell shows the thing by half
             0  .5                       1  4     energy               .4   two fifths of the map lie on the thing
             0   0                       2  3     average precision    .5   half of the best cell, which no other helps

A map is constant in each cell of its grid, and a mask says which share of a cell the thing covers. So a measure is that
of all pixels, each with the value of its cell, and thin things count by their area. A map that is the same everywhere
scores the area of the thing in all three, which is chance.

Sources: the pointing game is Zhang et al. 2016 (Excitation backprop, arXiv 1608.00507), energy is the energy-based
pointing game of Wang et al. 2020 (Score-CAM, arXiv 1910.01279).
"""

from __future__ import annotations

import torch
from torch import Tensor

MEASURES = ("pointing", "average_precision", "energy")


def cell_shares(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the mean of a mask (H, W) in each cell of a grid (h, w), float64. A pixel on an edge counts in part.

    Masks (..., H, W) give (..., h, w).
    """
    rows, columns = (overlap(*each).to(mask.device) for each in zip(mask.shape[-2:], grid, strict=True))
    return rows @ mask.double() @ columns.T


def overlap(pixels: int, cells: int) -> Tensor:
    """Returns which share of a cell each pixel of a line takes, (cells, pixels) float64; rows sum to 1."""
    wide = pixels / cells
    left = torch.arange(cells, dtype=torch.float64)[:, None] * wide
    start = torch.arange(pixels, dtype=torch.float64)[None]
    return (torch.minimum(left + wide, start + 1) - torch.maximum(left, start)).clamp(min=0) / wide


def measure_map(scores: Tensor, shares: Tensor) -> dict[str, float]:
    """Returns ``pointing``, ``average_precision`` and ``energy``, each 0 to 1.

    Args:
        scores: the map (h, w), not negative
        shares: share of each cell that the thing covers, (h, w) in 0..1, not all 0
    Raises:
        ValueError: a score is negative or not finite, the thing covers nothing, or the shapes differ
    """
    flat, truth = scores.flatten().double(), shares.flatten().double()
    if scores.shape != shares.shape or not flat.isfinite().all() or (flat < 0).any() or not truth.sum() > 0:
        raise ValueError(
            f"a map {(*scores.shape,)} of finite values from 0 on is measured against shares {(*shares.shape,)} that "
            "are not all 0"
        )
    total = flat.sum()
    return {
        "pointing": float(truth[flat == flat.max()].mean()),
        "average_precision": average_precision(flat, truth),
        "energy": float((flat * truth).sum() / total) if total > 0 else float(truth.mean()),
    }


def average_precision(scores: Tensor, shares: Tensor) -> float:
    """Returns scikit-learn's average precision over cells (L,), each positive by its share and negative by the rest."""
    from sklearn.metrics import average_precision_score

    truth = torch.cat([torch.ones_like(shares), torch.zeros_like(shares)])
    weight = torch.cat([shares, 1 - shares])
    return float(average_precision_score(truth.numpy(), scores.repeat(2).numpy(), sample_weight=weight.numpy()))


def centre_map(grid: tuple[int, int]) -> Tensor:
    """Returns a bell around the centre of the image, (h, w) float64, with a deviation of a quarter of its side."""
    axes = [(2 * torch.arange(cells, dtype=torch.float64) + 1 - cells) / (2 * cells) for cells in grid]
    return (-(axes[0][:, None] ** 2 + axes[1][None] ** 2) / (2 * 0.25**2)).exp()
