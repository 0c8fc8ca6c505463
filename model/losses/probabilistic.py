"""Loss of pairs of distributions over the global batch of all ranks: an unsure image or text counts less.

    d_ij = |mu_i - mu_j|^2 + u_i + u_j          mu: features, u: sums of their variances
    loss = 1/N sum over all i, j of -log sigmoid(z_ij (b - s d_ij))     z = 1 for the same image, -1 for other images

With features of length 1, b - s d_ij is a product of rows and columns with two more entries each:

    s <[2 mu_i, -u_i, 1], [mu_j, 1, -u_j]> + b - 2 s

So it is the pairwise sigmoid loss of these, with its blocks, its exact gradients on any number of ranks and its linear
memory:

    SigmoidLoss(chunk)(*as_products(mu_r, mu_c, u_r, u_c, scale, bias), image_ids)

Source: PCME++, arXiv 2305.18171, equations 1 and 2 (closed-form sampled distance, matching loss). Left out are its
pseudo-positives, mixed images and information bottleneck: ``loss.equal_captions`` knows the pairs that its
pseudo-positives guess, if the words are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_products(
    image: Tensor, text: Tensor, image_uncertainty: Tensor, text_uncertainty: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns rows and columns (B, d + 2), scale () and bias (), whose logits s <row, column> + b are b - s d_ij.

    Args:
        image: (B, d) L2-normalised means
        text: (B, d) L2-normalised means
        image_uncertainty: (B,) sums of the variances
        text_uncertainty: (B,) sums of the variances
        scale: () s
        bias: () b
    """
    one = torch.ones_like(image_uncertainty).unsqueeze(1)
    rows = torch.cat([2 * image, -image_uncertainty.unsqueeze(1), one], dim=1)
    columns = torch.cat([text, one, -text_uncertainty.unsqueeze(1)], dim=1)
    return rows, columns, scale, bias - 2 * scale
