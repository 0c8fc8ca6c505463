"""Heads that tell how unsure an embedding is: each image and each text is a normal distribution, not a point.

    hidden (B, w) -> layer norm -> linear -> log of the variances (B, d) -> their sum u (B,)

The mean of the distribution is the feature that retrieval compares. The sum of the variances is all that the
probabilistic loss reads, because its distance is |mu_r - mu_c|^2 + u_r + u_c (`as_products`).

Source: PCME++, arXiv 2305.18171, section 3.1. There the variances have a whole layer of the encoder; here a linear one.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

VARIANCES = "uncertainty."  # first part of the names of their weights in a state
START = 0.1  # sum of the variances at the start; the squared distance of two unrelated features is about 2


class VarianceHead(nn.Module):
    """(B, w) -> the sum u (B,) of the d variances, float32 at least, above 0."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, embed_dim)
        nn.init.normal_(self.linear.weight, std=0.1 * width**-0.5)
        nn.init.constant_(self.linear.bias, math.log(START / embed_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        logs: Tensor = self.linear(self.norm(hidden))
        return logs.to(torch.promote_types(logs.dtype, torch.float32)).exp().sum(-1)


class Uncertainty(nn.Module):
    """The heads of both towers."""

    def __init__(self, image_width: int, text_width: int, embed_dim: int):
        super().__init__()
        self.image, self.text = VarianceHead(image_width, embed_dim), VarianceHead(text_width, embed_dim)


def means_only(model: Any) -> Any:
    """Returns the model without its variances, for formats that have none; a model without variances as it is.

    Scale and bias become those of the product of means: s <r, c> + b is then the logit of a pair without variances.
    """
    if model.uncertainty is None:
        return model
    plain = copy.deepcopy(model)
    plain.uncertainty, plain.config.uncertainty = None, False
    scale = plain.logit_scale.exp().clamp(max=plain.config.logit_scale_max)
    plain.config.logit_scale_max *= 2
    with torch.no_grad():
        if plain.logit_bias is not None:
            plain.logit_bias -= 2 * scale
        plain.logit_scale.copy_((2 * scale).log())
    return plain
