"""Contrastive and attribution losses over the global batch, of all ranks together.

    outputs = model(images, input_ids, attention_mask)
    loss, parts = RetrievalLoss(lambda_cs=1.0)(outputs, image_ids, labels)
    engine.backward(loss)           # mean over ranks of the gradients = gradient of one process with the whole batch

Every rank has B of the N = W * B pairs, and computes the B x N block of the similarity matrix that its images have with
all texts, in square pieces, once forward and once again backward. The texts' sums over all images come from adding up
the ranks' parts, N numbers. So no rank holds N x N or B x N, and image features do not travel. The loss of a rank is
that of its own pairs, scaled so that the MEAN over ranks is the loss of the global batch. Half precision inputs are
computed in float32; float64 stays float64.

Source: PriorCLIP, arXiv 2405.10160, section III (attribution loss; affiliation loss in PIR, ACM MM 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from priorclip.model.losses.gather import (
    average_gradient,
    gather_integers,
    gather_rows,
    log_sum_over_ranks,
    own_share,
    rank,
    sum_over_ranks,
    world_size,
)

Parts = dict[str, Tensor]
IGNORED = -1  # the label of a sample whose scene is not known
SIDE = {"cpu": 4096}  # of a square piece of the similarity matrix: 64 MB
SIDE_ON_GPU = 8192  # 256 MB: few launches, each of them long


class SymmetricCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the similarity matrix along rows and along columns; pairs of one place are all positives.

        S_ij = s <r_i, c_j>
        row_i    = logsumexp_j S_ij - mean over j of i's place of S_ij
        column_j = logsumexp_i S_ij - mean over i of j's place of S_ij             i over the rows of all ranks

    The positive part is linear in the features, so that it needs sums by place (U, d) and not the matrix.

    Args:
        rows: (B, d), of this rank
        columns: (N, d), of all ranks
        scale: ()
        row_places: (B,) integers in [0, U)
        column_places: (N,) integers in [0, U); every rank's rows have the places of its own columns
        places: U
        chunk: side of the square pieces
    Returns:
        losses of this rank's rows (B,) and of its columns (B,)
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        row_places: Tensor,
        column_places: Tensor,
        places: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        scaled = scale * rows
        row_log, column_log = rows.new_full((len(rows),), -torch.inf), rows.new_full((len(columns),), -torch.inf)
        for i, j, logits, spare in pieces(scaled, columns, chunk):
            row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
            column_log[j] = torch.logaddexp(column_log[j], log_sum(logits, 0, spare))
        column_log = log_sum_over_ranks(column_log)

        counts = column_places.bincount(minlength=places).to(rows.dtype)
        means = sums_by(column_places, columns, places) / counts[:, None]
        row_positive = (means[row_places].mul_(scaled)).sum(1)
        del means
        means = sums_by(row_places, scaled, places) / counts[:, None]  # this rank's part
        column_positive = sum_over_ranks((means[column_places].mul_(columns)).sum(1))
        ctx.save_for_backward(rows, columns, scale, row_places, column_places, counts, row_log, column_log)
        ctx.chunk = chunk
        return row_log - row_positive, own_share(column_log - column_positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_places, column_places, counts, row_log, column_log = ctx.saved_tensors
        by_row, by_column = gradients[0].contiguous(), gather_integers(gradients[1].contiguous())
        scaled = scale * rows
        into_rows, into_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for i, j, logits, spare in pieces(scaled, columns, ctx.chunk):
            torch.sub(logits, row_log[i, None], out=spare).exp_().mul_(by_row[i, None])
            spare += logits.sub_(column_log[None, j]).exp_().mul_(by_column[None, j])
            into_rows[i].addmm_(spare, columns[j])
            into_columns[j].addmm_(spare.T, scaled[i])

        places, share = len(counts), (1 / counts)[:, None]
        into_rows -= (sums_by(column_places, columns, places) * share)[row_places].mul_(by_row[:, None])
        into_rows -= (sums_by(column_places, columns * by_column[:, None], places) * share)[row_places]
        into_columns -= (sums_by(row_places, scaled, places) * share)[column_places].mul_(by_column[:, None])
        into_columns -= (sums_by(row_places, scaled * by_row[:, None], places) * share)[column_places]
        into_scale = torch.linalg.vecdot(into_rows, rows).sum()
        return into_rows.mul_(scale), into_columns, into_scale, None, None, None, None


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows against columns, summed: the target of a row is one column.

    rows (V, d), columns (C, d), scale (), target (V,) integers in [0, C), chunk -> ()

    Up to ``chunk`` columns, the derivative of the products is kept for the backward pass, (V, C); of more, it is
    computed again in pieces.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, target: Tensor, chunk: int) -> Tensor:
        scaled = scale * columns  # of both the few
        ctx.chunk = chunk
        if len(columns) <= chunk:
            log_share = torch.log_softmax(rows @ scaled.T, 1)
            place = target[:, None]
            total = -log_share.gather(1, place).sum()
            share = log_share.exp_()
            share.scatter_add_(1, place, share.new_tensor(-1).expand_as(place))
            ctx.save_for_backward(rows, columns, scale, target, share)
            return total
        row_log = rows.new_full((len(rows),), -torch.inf)
        for i, _, logits, spare in pieces(rows, scaled, chunk):
            row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
        ctx.save_for_backward(rows, columns, scale, target, row_log)
        return row_log.sum() - (sums_by(target, rows, len(columns)) * scaled).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, target, kept = ctx.saved_tensors
        gradient = gradients[0]
        scaled = scale * columns
        if len(columns) <= ctx.chunk:
            into_rows, into_columns = kept @ (scaled * gradient), kept.T @ rows
        else:
            into_rows, into_columns = torch.zeros_like(rows), torch.zeros_like(columns)
            for i, j, logits, _ in pieces(rows, scaled, ctx.chunk):
                share = logits.sub_(kept[i, None]).exp_()
                place = (target[i] - j.start)[:, None]
                wanted = (place >= 0) & (place < share.shape[1])  # its target is a column of this piece
                share.scatter_add_(1, place.clamp(0, share.shape[1] - 1), -wanted.to(share.dtype))
                into_rows[i].addmm_(share, scaled[j])
                into_columns[j].addmm_(share.T, rows[i])
            into_rows.mul_(gradient)
        into_scale = torch.linalg.vecdot(into_columns, columns).sum()
        return into_rows, into_columns.mul_(scale * gradient), into_scale * gradient, None, None


def pieces(rows: Tensor, columns: Tensor, chunk: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Products of rows (B, d) and columns (N, d) in pieces of (chunk, chunk) at most, and as much spare memory.

    Yields the slice of rows, that of columns, the products, the spare. Both memories are the next piece's too.
    """
    high, wide = min(chunk, len(rows)), min(chunk, len(columns))
    products, spare = rows.new_empty(high * wide), rows.new_empty(high * wide)
    for top in range(0, len(rows), chunk):
        some = rows[top : top + chunk]
        for left in range(0, len(columns), chunk):
            others = columns[left : left + chunk]
            shape = (len(some), len(others))
            size = shape[0] * shape[1]
            piece = torch.mm(some, others.T, out=products[:size].view(shape))
            yield slice(top, top + chunk), slice(left, left + chunk), piece, spare[:size].view(shape)


def log_sum(logits: Tensor, dim: int, spare: Tensor) -> Tensor:
    """logsumexp along ``dim`` with the exponentials written into ``spare``. Not finite where a logit is not."""
    top = logits.amax(dim, keepdim=True)
    return torch.sub(logits, top, out=spare).exp_().sum(dim).log_().add_(top.squeeze(dim))


def sums_by(places: Tensor, x: Tensor, count: int) -> Tensor:
    """x (n, d) summed by place: (count, d)."""
    return x.new_zeros((count, x.shape[1])).index_add(0, places, x)


def side_of(chunk: int | None, device: torch.device) -> int:
    """The given side of a piece, or where it is None what suits the device."""
    return chunk or SIDE.get(device.type, SIDE_ON_GPU)


def check_chunk(chunk: int | None) -> int | None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    return chunk


class ContrastiveLoss(nn.Module):
    """Symmetric image-text contrastive loss over the global batch; all pairs of one image id are positives.

    Args:
        chunk: side of the pieces in which the similarity matrix is computed; None: by the device
    """

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = check_chunk(chunk)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, image_ids: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), image_ids (B,) -> (). B is the same on all ranks."""
        image, text, scale = same_precision(image, text, scale)
        with torch.autocast(image.device.type, enabled=False):
            unique, places = gather_integers(image_ids).unique(return_inverse=True)
            chunk = side_of(self.chunk, image.device)
            to_text, to_image = SymmetricCrossEntropy.apply(
                image, gather_rows(text), average_gradient(scale), own_share(places), places, len(unique), chunk
            )
            return (to_text.mean() + to_image.mean()) / 2


class AttributionLoss(nn.Module):
    """Each sample is drawn to the centre of its scene class in the other modality, and away from the other centres.

    Centres are the means of the L2-normalised features of a class over the global batch; gradients pass through them.
    Cross-entropy over the distinct classes present, both ways, mean over the samples whose label is not -1. Sums of
    classes travel, (C, d), so time and memory are linear in N. Zero, with zero gradients, where no sample has a label.

    Args:
        chunk: side of the pieces in which samples meet centres; None: by the device
    """

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = check_chunk(chunk)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), labels (B,) with -1 for none -> ()."""
        image, text, scale = same_precision(image, text, scale)
        everybody = gather_integers(labels)
        classes, counts = everybody[everybody != IGNORED].unique(return_counts=True)
        if len(classes) == 0:
            return 0 * (image.sum() + text.sum() + scale)  # in the graph: every rank runs the same backward pass
        with torch.autocast(image.device.type, enabled=False):
            valid = labels != IGNORED
            if not valid.all():
                image, text, labels = image[valid], text[valid], labels[valid]
            scale, target = average_gradient(scale), torch.searchsorted(classes, labels)
            sums = torch.stack([sums_by(target, image, len(classes)), sums_by(target, text, len(classes))])
            image_centres, text_centres = sum_over_ranks(sums) / counts[:, None]
            chunk = side_of(self.chunk, image.device)
            to_text = SummedCrossEntropy.apply(image, text_centres, scale, target, chunk)
            to_image = SummedCrossEntropy.apply(text, image_centres, scale, target, chunk)
            # A rank without labels meets no centre, but must not take a step that the others' NaN has spoilt.
            shown = 0 * (image_centres.sum() + text_centres.sum()).detach()
            return (to_text + to_image) / 2 * world_size() / counts.sum() + shown


class RetrievalLoss(nn.Module):
    """Contrastive loss plus ``lambda_cs`` times attribution loss.

    Args:
        contrastive: weight of the contrastive loss; 0: it is not computed
        lambda_cs: weight of the attribution loss; 0: it is not computed
        chunk: see `ContrastiveLoss` and `AttributionLoss`
        shared_captions: false: captions of one image are no positives of each other, each stands for its pair alone
    """

    def __init__(
        self, contrastive: float = 1.0, lambda_cs: float = 0.0, chunk: int | None = None, shared_captions: bool = True
    ):
        super().__init__()
        if contrastive < 0 or lambda_cs < 0:
            raise ValueError(f"loss weights must not be negative: contrastive {contrastive}, lambda_cs {lambda_cs}")
        self.weight, self.lambda_cs, self.shared_captions = contrastive, lambda_cs, shared_captions
        self.contrastive = ContrastiveLoss(chunk)
        self.attribution = AttributionLoss(chunk)

    def forward(
        self, outputs: Mapping[str, Tensor | None], image_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Parts]:
        """The loss to go backward from, and its detached parts.

        Args:
            outputs: of the model's forward, with both features
            image_ids: (B,) integers, equal for captions of one image, across ranks too
            labels: (B,) scene class, -1 where unknown; None: all unknown
        """
        image, text, scale, attribution_scale = features_of(outputs)
        # A scale whose loss is off stays in the graph: ZeRO expects a gradient for every parameter.
        if self.weight > 0:
            ids = image_ids if self.shared_captions else pair_ids(image_ids)
            contrastive = self.contrastive(image, text, scale, ids)
        else:
            contrastive = 0 * scale
        if self.lambda_cs > 0:
            labels = torch.full_like(image_ids, IGNORED) if labels is None else labels
            attribution = self.attribution(image, text, attribution_scale, labels)
        else:
            attribution = 0 * attribution_scale
        loss = (self.weight or 1.0) * contrastive + (self.lambda_cs or 1.0) * attribution
        return loss, {"contrastive": contrastive.detach(), "attribution": attribution.detach()}


def pair_ids(image_ids: Tensor) -> Tensor:
    """An id for each pair that no other pair has, on any rank, (B,)."""
    first = rank() * len(image_ids)
    return torch.arange(first, first + len(image_ids), device=image_ids.device)


def features_of(outputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both features and both scales. Raises ValueError where the model was called with one modality only."""
    values = [outputs[key] for key in ("image_features", "text_features", "logit_scale", "attribution_scale")]
    if any(value is None for value in values):
        raise ValueError("the losses need image_features and text_features: call the model with both")
    return tuple(values)  # type: ignore[return-value]


def same_precision(*tensors: Tensor) -> list[Tensor]:
    """All in the widest dtype among them, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
