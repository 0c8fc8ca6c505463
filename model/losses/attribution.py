"""Attribution loss: samples against the centres of the scene classes in the other modality, over the global batch.

The loss of a rank is scaled so that the MEAN over ranks is the loss of the global batch.

Source: PriorCLIP, arXiv 2405.10160, section III (attribution loss; affiliation loss in PIR, ACM MM 2023). `released`:
github.com/jaychempan/PIR-CLIP, ``src/open_clip/loss.py`` (``ClipLoss.get_aff_logits``).
"""

from __future__ import annotations

from typing import Any, Literal

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

STATIC_CLASSES = 4096
UNLABELLED = -1  # the label of a sample whose scene class is unknown


class SummedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of rows against columns: the target of a row is one column.

    rows (V, d), columns (C, d), scale (), target (V,) integers in [0, C), side, log_times (C,) or None, kept (V,) or
    None -> ()

    With ``log_times``, each column stands for exp(log_times) equal columns, and the target is one of them. With
    ``kept``, only the rows where it is true are in the sum.

    With up to ``side`` columns, the derivative of the products (V, C) is kept for the backward pass. With more, the
    backward pass computes it again in blocks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        target: Tensor,
        side: int,
        log_times: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        scaled = scale * columns  # the smaller of the two
        ctx.side, ctx.log_times, ctx.kept = side, log_times, kept
        if len(columns) <= side:
            log_share = torch.log_softmax(repeated(rows @ scaled.T, log_times), 1)
            place = target[:, None]
            total = -only(log_share.gather(1, place).squeeze(1), kept).sum()
            if log_times is not None:
                total += only(log_times[target], kept).sum()  # log_share is that of all equal columns together
            share = log_share.exp_()
            share.scatter_add_(1, place, share.new_full((), -1).expand_as(place))
            share = only(share, kept)
            ctx.save_for_backward(rows, columns, scale, target, share)
            return total
        row_log = rows.new_full((len(rows),), -torch.inf)
        for i, j, logits, spare in similarity_blocks(rows, scaled, side):
            repeated(logits, log_times, j)
            row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
        ctx.save_for_backward(rows, columns, scale, target, row_log)
        return only(row_log, kept).sum() - (sum_by_group(target, only(rows, kept), len(columns)) * scaled).sum()

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
                share = repeated(logits, ctx.log_times, j).sub_(kept[i, None]).exp_()
                place = (target[i] - j.start)[:, None]
                inside = (place >= 0) & (place < share.shape[1])  # the target is a column of this block
                share.scatter_add_(1, place.clamp(0, share.shape[1] - 1), -inside.to(share.dtype))
                share = only(share, None if ctx.kept is None else ctx.kept[i])
                into_rows[i].addmm_(share, scaled[j])
                into_columns[j].addmm_(share.T, rows[i])
            into_rows.mul_(gradient)
        into_scale = torch.linalg.vecdot(into_columns, columns).sum()
        return into_rows, into_columns.mul_(scale * gradient), into_scale * gradient, None, None, None, None


def only(x: Tensor, kept: Tensor | None) -> Tensor:
    """Sets the rows of x (V, ...) to 0 where ``kept`` (V,) is false, also those that are not finite."""
    return x if kept is None else x.where(kept.view(-1, *[1] * (x.dim() - 1)), 0)


def repeated(logits: Tensor, log_times: Tensor | None, columns: slice = slice(None)) -> Tensor:
    """Adds ``log_times`` (C,) to the logits (V, c) of some columns in place: exp(logits) is then that of all copies."""
    return logits if log_times is None else logits.add_(log_times[columns])


class AttributionLoss(nn.Module):
    """Pulls each sample to the centre of its scene class in the other modality, and away from the other centres.

    Centres are the means of the L2-normalised features of a class over the global batch; gradients pass through them.
    The loss is the cross-entropy over the classes in the batch, in both directions, as a mean over the samples whose
    label is not -1. Ranks exchange sums by class, (C, d), so time and memory are linear in N. If no sample has a label,
    the loss and its gradients are zero.

    `released` repeats a centre once for each sample of its class, and the target of a sample is its own copy. So a
    class of n samples has the weight n in the softmax, and the loss of a sample is -log(share of its class / n).

    Args:
        chunk: side of the blocks of the matrix of samples and centres; None: chosen by the device
        compat: paper: each class counts once. released: as in the authors' code
        classes: number of scene classes, above every label; 0 if no sample has one. The loss then has the same shapes
            in every step, so that the processor does not wait for the device to learn which classes are in the batch.
            None, or more classes than STATIC_CLASSES and the global batch: the tensors have the classes of the batch
    Raises:
        ValueError: ``compat`` is neither
    """

    def __init__(
        self, chunk: int | None = None, compat: Literal["paper", "released"] = "paper", classes: int | None = None
    ):
        super().__init__()
        if compat not in ("paper", "released"):
            raise ValueError(f"compat must be paper or released, not '{compat}'")
        self.chunk, self.compat, self.classes = check_chunk(chunk), compat, classes

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), labels (B,), -1 if unknown -> ()."""
        image, text, scale = widest_precision(image, text, scale)
        all_labels = gather_integers(labels)
        if self.classes is not None and self.classes <= max(STATIC_CLASSES, len(all_labels)):
            with torch.autocast(image.device.type, enabled=False):
                return self.of_all_classes(image, text, average_gradient(scale), labels, all_labels, self.classes)
        classes, counts = all_labels[all_labels != UNLABELLED].unique(return_counts=True)
        if len(classes) == 0:
            return 0 * (image.sum() + text.sum() + scale)  # in the graph, so that all ranks run the same backward pass
        with torch.autocast(image.device.type, enabled=False):
            valid = labels != UNLABELLED
            if not valid.all():
                image, text, labels = image[valid], text[valid], labels[valid]
            scale, target = average_gradient(scale), torch.searchsorted(classes, labels)
            log_times = counts.to(image.dtype).log() if self.compat == "released" else None
            return self.of_centres(image, text, scale, target, counts, log_times)

    def of_all_classes(
        self, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor, all_labels: Tensor, classes: int
    ) -> Tensor:
        """The loss in tensors that have all classes (C,) and all samples of this rank; what is not there counts 0."""
        valid = labels != UNLABELLED
        # An unlabelled sample counts 0 in class 0, which is there also if no sample of any step has a class.
        counts = all_labels.new_zeros(max(1, classes)).scatter_add_(
            0, all_labels.clamp(min=0), (all_labels != UNLABELLED).to(all_labels.dtype)
        )
        # Half the lowest number: a logit added to it stays finite.
        copies = counts.clamp(min=1).to(image.dtype)
        times = copies.log() if self.compat == "released" else torch.zeros_like(copies)
        log_times = times.masked_fill(counts == 0, torch.finfo(image.dtype).min / 2)
        target = labels.clamp(min=0)
        return self.of_centres(only(image, valid), only(text, valid), scale, target, counts, log_times, valid)

    def of_centres(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        target: Tensor,
        counts: Tensor,
        log_times: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The loss of samples of the classes ``target`` (V,), which have ``counts`` (C,) samples on all ranks."""
        classes, side = len(counts), block_side(self.chunk, image.device)
        sums = torch.stack([sum_by_group(target, image, classes), sum_by_group(target, text, classes)])
        image_centres, text_centres = sum_over_ranks(sums) / counts.clamp(min=1)[:, None]
        to_text = SummedCrossEntropy.apply(image, text_centres, scale, target, side, log_times, kept)
        to_image = SummedCrossEntropy.apply(text, image_centres, scale, target, side, log_times, kept)
        # A rank without labels uses no centre. A NaN of another rank must still reach its loss.
        nan_of_any_rank = 0 * (image_centres.sum() + text_centres.sum()).detach()
        return (to_text + to_image) / 2 * world_size() / counts.sum().clamp(min=1) + nan_of_any_rank
