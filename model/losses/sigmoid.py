"""Pairwise sigmoid loss over the global batch of all ranks.

    S_ij = s <r_i, c_j> + b                       s: logit_scale, b: logit_bias
    loss = 1/N sum over all i, j of -log sigmoid(z_ij S_ij)       z = 1 for the same image, -1 for other images

Each rank computes the B x N block of its images with all texts, in square pieces. The derivative of an entry needs no
sum over its row. So one pass gives the loss and its gradient, and the backward pass computes no product again. Ranks
exchange text features and nothing of N x N. The loss of a rank is scaled so that the MEAN over ranks is the loss of the
global batch.

Source: SigLIP, arXiv 2303.15343, section 3.2 and algorithm 1. There a text has one image. Here all pairs of one image
are positives, so that several captions of an image can be in one batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from priorclip.model.losses.gather import average_gradient, gather_rows_with_gradient, sum_over_ranks
from priorclip.model.losses.pairs import Pairs, pairs_of
from priorclip.model.losses.similarity_blocks import block_side, check_chunk, similarity_blocks, widest_precision


class SummedPairwiseSigmoid(torch.autograd.Function):
    """Sum over this rank's rows and all columns of -log sigmoid(z S).

    rows (B, d), columns (N, d), scale (), bias (), pairs, side -> ()
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, side: int
    ) -> Tensor:
        scaled, total = scale * rows, torch.zeros((), dtype=torch.float64, device=rows.device)
        into_rows, into_columns, into_bias = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(total)
        for i, j, logits, spare in similarity_blocks(scaled, columns, side):
            positive, ignored = pairs.positive(i, j), pairs.ignored(i, j)
            logits += bias
            log_right = F.logsigmoid(torch.where(positive, logits, -logits, out=spare))
            slope = logits.sigmoid_().sub_(positive.to(logits.dtype))  # of the loss, in the logit
            if ignored is not None:
                log_right, slope = log_right.masked_fill_(ignored, 0), slope.masked_fill_(ignored, 0)
            total -= log_right.sum()
            into_rows[i].addmm_(slope, columns[j])
            into_columns[j].addmm_(slope.T, scaled[i])
            into_bias += slope.sum()
        into_scale = torch.linalg.vecdot(into_rows, rows).sum()
        ctx.save_for_backward(into_rows.mul_(scale), into_columns, into_scale, into_bias.to(rows.dtype))
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        into_rows, into_columns, into_scale, into_bias = (value * gradients[0] for value in ctx.saved_tensors)
        return into_rows, into_columns, into_scale, into_bias, None, None


class SigmoidLoss(nn.Module):
    """Each pair of an image and a text of the global batch is a question with two answers; N x N of them.

    Args:
        chunk: side of the blocks of the similarity matrix; None: chosen by the device
    """

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = check_chunk(chunk)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        image_ids: Tensor,
        caption_ids: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss, ().

        Args:
            image: (B, d) L2-normalised; B is the same on all ranks
            text: (B, d) L2-normalised
            scale: ()
            bias: ()
            image_ids: (B,) integers, equal for captions of one image on all ranks
            caption_ids: (B,) integers, equal for equal captions: such pairs of other images are ignored; None: they are
                negatives
        """
        image, text, scale, bias = widest_precision(image, text, scale, bias)
        with torch.autocast(image.device.type, enabled=False):
            pairs, side = pairs_of(image_ids, caption_ids), block_side(self.chunk, image.device)
            texts, scale, bias = gather_rows_with_gradient(text), average_gradient(scale), average_gradient(bias)
            loss = SummedPairwiseSigmoid.apply(image, texts, scale, bias, pairs, side) / len(image)
            # The other ranks do not read this rank's images. A NaN of them must still reach all losses.
            return loss + 0 * sum_over_ranks(loss.detach())  # type: ignore[no-any-return]
