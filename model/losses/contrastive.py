"""Symmetric contrastive loss over the global batch of all ranks.

Each rank has B of the N = W * B pairs. It computes the B x N block of the similarity matrix of its images with all
texts, in square blocks, once in the forward pass and again in the backward pass. The sums of each text over all images
come from adding the ranks' parts, N numbers. So no rank holds N x N or B x N, and image features are not sent.
The loss of a rank is that of its own pairs, scaled so that the MEAN over ranks is the loss of the global batch.
Half precision inputs are computed in float32; float64 stays float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from priorclip.model.losses.gather import (
    average_gradient,
    gather_integers,
    gather_rows_with_gradient,
    log_sum_over_ranks,
    own_share,
)
from priorclip.model.losses.hard_negatives import HardNegativeCrossEntropy
from priorclip.model.losses.pairs import Pairs, leave_out, pairs_of, positive_means, subtract_positives
from priorclip.model.losses.similarity_blocks import (
    block_side,
    check_chunk,
    log_sum,
    similarity_blocks,
    widest_precision,
)


class SymmetricCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the similarity matrix along rows and along columns; all pairs of one image are positives.

        S_ij = s <r_i, c_j>
        row_i    = logsumexp_j S_ij - mean over j in the group of i of S_ij
        column_j = logsumexp_i S_ij - mean over i in the group of j of S_ij        i over the rows of all ranks

    Ignored entries are in no sum. rows (B, d) of this rank, columns (N, d) of all ranks, scale (), pairs, side of the
    square blocks -> the losses of this rank's rows (B,) and of its columns (B,)
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, side: int
    ) -> tuple[Tensor, Tensor]:
        scaled = scale * rows
        row_log, column_log = rows.new_full((len(rows),), -torch.inf), rows.new_full((len(columns),), -torch.inf)
        for i, j, logits, spare in similarity_blocks(scaled, columns, side):
            leave_out(logits, pairs.ignored(i, j))
            row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
            column_log[j] = torch.logaddexp(column_log[j], log_sum(logits, 0, spare))
        column_log = log_sum_over_ranks(column_log)
        row_positive, column_positive = positive_means(scaled, columns, pairs)
        ctx.save_for_backward(rows, columns, scale, row_log, column_log)
        ctx.pairs, ctx.side = pairs, side
        return row_log - row_positive, own_share(column_log - column_positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_log, column_log = ctx.saved_tensors
        by_row, by_column = gradients[0].contiguous(), gather_integers(gradients[1].contiguous())
        scaled = scale * rows
        into_rows, into_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for i, j, logits, spare in similarity_blocks(scaled, columns, ctx.side):
            leave_out(logits, ctx.pairs.ignored(i, j))
            torch.sub(logits, row_log[i, None], out=spare).exp_().mul_(by_row[i, None])
            spare += logits.sub_(column_log[None, j]).exp_().mul_(by_column[None, j])
            into_rows[i].addmm_(spare, columns[j])
            into_columns[j].addmm_(spare.T, scaled[i])
        subtract_positives(into_rows, into_columns, scaled, columns, ctx.pairs, by_row, by_column)
        into_scale = torch.linalg.vecdot(into_rows, rows).sum()
        return into_rows.mul_(scale), into_columns, into_scale, None, None


class ContrastiveLoss(nn.Module):
    """Symmetric image-text contrastive loss over the global batch; all pairs with the same image id are positives.

    Args:
        chunk: side of the blocks of the similarity matrix; None: chosen by the device
        hard_negatives: see `HardNegativeCrossEntropy`; 0: all negatives weigh the same
    Raises:
        ValueError: ``hard_negatives`` is negative
    """

    def __init__(self, chunk: int | None = None, hard_negatives: float = 0.0):
        super().__init__()
        if hard_negatives < 0:
            raise ValueError(f"hard_negatives must not be negative, but is {hard_negatives}")
        self.chunk, self.hard_negatives = check_chunk(chunk), hard_negatives

    def forward(
        self, image: Tensor, text: Tensor, scale: Tensor, image_ids: Tensor, caption_ids: Tensor | None = None
    ) -> Tensor:
        """Returns the loss, ().

        Args:
            image: (B, d) L2-normalised; B is the same on all ranks
            text: (B, d) L2-normalised
            scale: ()
            image_ids: (B,) integers, equal for captions of one image on all ranks
            caption_ids: (B,) integers, equal for equal captions: such pairs of other images are ignored; None: they are
                negatives
        """
        image, text, scale = widest_precision(image, text, scale)
        with torch.autocast(image.device.type, enabled=False):
            pairs, side = pairs_of(image_ids, caption_ids), block_side(self.chunk, image.device)
            texts, scale = gather_rows_with_gradient(text), average_gradient(scale)
            if self.hard_negatives:
                losses = HardNegativeCrossEntropy.apply(image, texts, scale, pairs, side, self.hard_negatives)
            else:
                losses = SymmetricCrossEntropy.apply(image, texts, scale, pairs, side)
            return (losses[0].mean() + losses[1].mean()) / 2
