"""Attribution loss: samples against the centres of the scene classes in the other modality, over the global batch.

The loss of a rank is scaled so that the MEAN over ranks is the loss of the global batch.

Source: PriorCLIP, arXiv 2405.10160, section III (attribution loss; affiliation loss in PIR, ACM MM 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from priorclip.model.losses.gather import average_gradient, gather_integers, sum_over_ranks, world_size
from priorclip.model.losses.similarity_blocks import (
    block_side,
    check_chunk,
    log_sum,
    similarity_blocks,
    sum_by_group,
    widest_precision,
)

UNLABELLED = -1  # the label of a sample whose scene class is unknown


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of rows against columns: the target of a row is one column.

    rows (V, d), columns (C, d), scale (), target (V,) integers in [0, C), side -> ()

    With up to ``side`` columns, the derivative of the products (V, C) is kept for the backward pass. With more, the
    backward pass computes it again in blocks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, target: Tensor, side: int) -> Tensor:
        scaled = scale * columns  # the smaller of the two
        ctx.side = side
        if len(columns) <= side:
            log_share = torch.log_softmax(rows @ scaled.T, 1)
            place = target[:, None]
            total = -log_share.gather(1, place).sum()
            share = log_share.exp_()
            share.scatter_add_(1, place, share.new_tensor(-1).expand_as(place))
            ctx.save_for_backward(rows, columns, scale, target, share)
            return total
        row_log = rows.new_full((len(rows),), -torch.inf)
        for i, _, logits, spare in similarity_blocks(rows, scaled, side):
            row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
        ctx.save_for_backward(rows, columns, scale, target, row_log)
        return row_log.sum() - (sum_by_group(target, rows, len(columns)) * scaled).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, target, kept = ctx.saved_tensors
        gradient = gradients[0]
        scaled = scale * columns
        if len(columns) <= ctx.side:
            into_rows, into_columns = kept @ (scaled * gradient), kept.T @ rows
        else:
            into_rows, into_columns = torch.zeros_like(rows), torch.zeros_like(columns)
            for i, j, logits, _ in similarity_blocks(rows, scaled, ctx.side):
                share = logits.sub_(kept[i, None]).exp_()
                place = (target[i] - j.start)[:, None]
                inside = (place >= 0) & (place < share.shape[1])  # the target is a column of this block
                share.scatter_add_(1, place.clamp(0, share.shape[1] - 1), -inside.to(share.dtype))
                into_rows[i].addmm_(share, scaled[j])
                into_columns[j].addmm_(share.T, rows[i])
            into_rows.mul_(gradient)
        into_scale = torch.linalg.vecdot(into_columns, columns).sum()
        return into_rows, into_columns.mul_(scale * gradient), into_scale * gradient, None, None


class AttributionLoss(nn.Module):
    """Pulls each sample to the centre of its scene class in the other modality, and away from the other centres.

    Centres are the means of the L2-normalised features of a class over the global batch; gradients pass through them.
    The loss is the cross-entropy over the classes in the batch, in both directions, as a mean over the samples whose
    label is not -1. Ranks exchange sums by class, (C, d), so time and memory are linear in N. If no sample has a label,
    the loss and its gradients are zero.

    Args:
        chunk: side of the blocks of the matrix of samples and centres; None: chosen by the device
    """

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = check_chunk(chunk)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), labels (B,), -1 if unknown -> ()."""
        image, text, scale = widest_precision(image, text, scale)
        all_labels = gather_integers(labels)
        classes, counts = all_labels[all_labels != UNLABELLED].unique(return_counts=True)
        if len(classes) == 0:
            return 0 * (image.sum() + text.sum() + scale)  # in the graph, so that all ranks run the same backward pass
        with torch.autocast(image.device.type, enabled=False):
            valid = labels != UNLABELLED
            if not valid.all():
                image, text, labels = image[valid], text[valid], labels[valid]
            scale, target = average_gradient(scale), torch.searchsorted(classes, labels)
            sums = torch.stack([sum_by_group(target, image, len(classes)), sum_by_group(target, text, len(classes))])
            image_centres, text_centres = sum_over_ranks(sums) / counts[:, None]
            side = block_side(self.chunk, image.device)
            to_text = SummedCrossEntropy.apply(image, text_centres, scale, target, side)
            to_image = SummedCrossEntropy.apply(text, image_centres, scale, target, side)
            # A rank without labels uses no centre. A NaN of another rank must still reach its loss.
            nan_of_any_rank = 0 * (image_centres.sum() + text_centres.sum()).detach()
            return (to_text + to_image) / 2 * world_size() / counts.sum() + nan_of_any_rank
