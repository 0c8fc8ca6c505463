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
    sum_over_ranks,
)
from priorclip.model.losses.similarity_blocks import (
    block_side,
    check_chunk,
    log_sum,
    similarity_blocks,
    sum_by_group,
    widest_precision,
)


class SymmetricCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the similarity matrix along rows and along columns; all pairs of one group are positives.

        S_ij = s <r_i, c_j>
        row_i    = logsumexp_j S_ij - mean over j in the group of i of S_ij
        column_j = logsumexp_i S_ij - mean over i in the group of j of S_ij        i over the rows of all ranks

    The positive part is linear in the features, so it needs sums by group (U, d) and not the matrix.

    Args:
        rows: (B, d) of this rank
        columns: (N, d) of all ranks
        scale: ()
        row_groups: (B,) integers in [0, U)
        column_groups: (N,) integers in [0, U); the rows of each rank have the groups of its own columns
        groups: U
        side: of the square blocks
    Returns:
        the losses of this rank's rows (B,) and of its columns (B,)
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        row_groups: Tensor,
        column_groups: Tensor,
        groups: int,
        side: int,
    ) -> tuple[Tensor, Tensor]:
        scaled = scale * rows
        row_log, column_log = rows.new_full((len(rows),), -torch.inf), rows.new_full((len(columns),), -torch.inf)
        for i, j, logits, spare in similarity_blocks(scaled, columns, side):
            row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
            column_log[j] = torch.logaddexp(column_log[j], log_sum(logits, 0, spare))
        column_log = log_sum_over_ranks(column_log)

        counts = column_groups.bincount(minlength=groups).to(rows.dtype)
        means = sum_by_group(column_groups, columns, groups) / counts[:, None]
        row_positive = (means[row_groups].mul_(scaled)).sum(1)
        del means
        means = sum_by_group(row_groups, scaled, groups) / counts[:, None]  # of this rank
        column_positive = sum_over_ranks((means[column_groups].mul_(columns)).sum(1))
        ctx.save_for_backward(rows, columns, scale, row_groups, column_groups, counts, row_log, column_log)
        ctx.side = side
        return row_log - row_positive, own_share(column_log - column_positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_groups, column_groups, counts, row_log, column_log = ctx.saved_tensors
        by_row, by_column = gradients[0].contiguous(), gather_integers(gradients[1].contiguous())
        scaled = scale * rows
        into_rows, into_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for i, j, logits, spare in similarity_blocks(scaled, columns, ctx.side):
            torch.sub(logits, row_log[i, None], out=spare).exp_().mul_(by_row[i, None])
            spare += logits.sub_(column_log[None, j]).exp_().mul_(by_column[None, j])
            into_rows[i].addmm_(spare, columns[j])
            into_columns[j].addmm_(spare.T, scaled[i])

        groups, share = len(counts), (1 / counts)[:, None]
        into_rows -= (sum_by_group(column_groups, columns, groups) * share)[row_groups].mul_(by_row[:, None])
        into_rows -= (sum_by_group(column_groups, columns * by_column[:, None], groups) * share)[row_groups]
        into_columns -= (sum_by_group(row_groups, scaled, groups) * share)[column_groups].mul_(by_column[:, None])
        into_columns -= (sum_by_group(row_groups, scaled * by_row[:, None], groups) * share)[column_groups]
        into_scale = torch.linalg.vecdot(into_rows, rows).sum()
        return into_rows.mul_(scale), into_columns, into_scale, None, None, None, None


class ContrastiveLoss(nn.Module):
    """Symmetric image-text contrastive loss over the global batch; all pairs with the same image id are positives.

    Args:
        chunk: side of the blocks of the similarity matrix; None: chosen by the device
    """

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = check_chunk(chunk)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, image_ids: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), image_ids (B,) -> (). B is the same on all ranks."""
        image, text, scale = widest_precision(image, text, scale)
        with torch.autocast(image.device.type, enabled=False):
            unique, groups = gather_integers(image_ids).unique(return_inverse=True)
            side = block_side(self.chunk, image.device)
            texts, scale = gather_rows_with_gradient(text), average_gradient(scale)
            to_text, to_image = SymmetricCrossEntropy.apply(
                image, texts, scale, own_share(groups), groups, len(unique), side
            )
            return (to_text.mean() + to_image.mean()) / 2
