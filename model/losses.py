"""Contrastive and attribution losses over the global batch, of all ranks together.

    outputs = model(images, input_ids, attention_mask)
    loss, parts = RetrievalLoss(lambda_cs=1.0)(outputs, image_ids, labels)
    engine.backward(loss)           # mean over ranks of the gradients = gradient of one process with the whole batch

Every rank has B of the N = W * B pairs. It computes the loss of its own rows against all columns, scaled so that the
MEAN over ranks is the loss of the global batch. Memory is B x chunk for logits and N x d for gathered features, never
N x N. Half precision inputs are computed in float32; float64 stays float64.

Source: PriorCLIP, arXiv 2405.10160, section III (attribution loss; affiliation loss in PIR, ACM MM 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.gather import gather_integers, gather_rows, rank, sum_over_ranks, world_size

Parts = dict[str, Tensor]
IGNORED = -1  # the label of a sample whose scene is not known


class StreamingCrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows against columns, soft targets uniform over columns of equal id, chunk by chunk.

        loss_i = logsumexp_j(s <r_i, c_j>) - mean over j with id_j = id_i of s <r_i, c_j>

    rows (B, d), columns (N, d), scale s (), row_ids (B,), column_ids (N,) -> (B,). The logits of a chunk are computed
    once in the forward and once more in the backward pass, so no more than (B, chunk) of them ever stand in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        chunk: int,
    ) -> Tensor:
        log_sum = rows.new_full((len(rows),), -torch.inf)
        positive, count = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
        for part in range(0, len(columns), chunk):
            logits = scale * (rows @ columns[part : part + chunk].T)
            same = row_ids[:, None] == column_ids[None, part : part + chunk]
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
            positive += (logits * same).sum(1)
            count += same.sum(1)
        ctx.save_for_backward(rows, columns, scale, row_ids, column_ids, log_sum, count)
        ctx.chunk = chunk
        return log_sum - positive / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale, row_ids, column_ids, log_sum, count = ctx.saved_tensors
        into_rows, into_columns = torch.zeros_like(rows), torch.empty_like(columns)
        into_scale = torch.zeros_like(scale)
        for part in range(0, len(columns), ctx.chunk):
            some = columns[part : part + ctx.chunk]
            products = rows @ some.T
            same = row_ids[:, None] == column_ids[None, part : part + ctx.chunk]
            wrong = (scale * products - log_sum[:, None]).exp() - same / count[:, None]
            wrong = wrong * gradients[0][:, None]
            into_rows += scale * (wrong @ some)
            into_columns[part : part + ctx.chunk] = scale * (wrong.T @ rows)
            into_scale += (wrong * products).sum()
        return into_rows, into_columns, into_scale, None, None, None


class ContrastiveLoss(nn.Module):
    """Symmetric image-text contrastive loss over the global batch; all pairs of one image id are positives.

    Args:
        chunk: columns whose logits are held at once
    """

    def __init__(self, chunk: int = 4096):
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self.chunk = chunk

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, image_ids: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), image_ids (B,) -> (). B is the same on all ranks."""
        image, text, scale = same_precision(image, text, scale)
        with torch.autocast(image.device.type, enabled=False):
            ids = gather_integers(image_ids)
            to_text = StreamingCrossEntropy.apply(image, gather_rows(text), scale, image_ids, ids, self.chunk)
            to_image = StreamingCrossEntropy.apply(text, gather_rows(image), scale, image_ids, ids, self.chunk)
            return (to_text.mean() + to_image.mean()) / 2


class AttributionLoss(nn.Module):
    """Each sample is drawn to the centre of its scene class in the other modality, and away from the other centres.

    Centres are the means of the L2-normalised features of a class over the global batch; gradients pass through them.
    Cross-entropy over the distinct classes present, both ways, mean over the samples whose label is not -1. Sums of
    classes travel, (C, d), so time and memory are linear in N. Zero, with zero gradients, where no sample has a label.
    """

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        """image and text (B, d) L2-normalised, scale (), labels (B,) with -1 for none -> ()."""
        image, text, scale = same_precision(image, text, scale)
        everybody = gather_integers(labels)
        classes, counts = everybody[everybody != IGNORED].unique(return_counts=True)
        if len(classes) == 0:
            return 0 * (image.sum() + text.sum() + scale)  # in the graph: every rank runs the same backward pass
        with torch.autocast(image.device.type, enabled=False):
            valid = labels != IGNORED
            target = torch.searchsorted(classes, labels[valid])
            member = F.one_hot(target, len(classes)).to(image.dtype)  # (V, C)
            sums = sum_over_ranks(torch.stack([member.T @ image[valid], member.T @ text[valid]]))
            image_centres, text_centres = sums / counts[:, None]
            to_text = F.cross_entropy(scale * (image[valid] @ text_centres.T), target, reduction="sum")
            to_image = F.cross_entropy(scale * (text[valid] @ image_centres.T), target, reduction="sum")
            return (to_text + to_image) / 2 * world_size() / counts.sum()


class RetrievalLoss(nn.Module):
    """Contrastive loss plus ``lambda_cs`` times attribution loss.

    Args:
        contrastive: weight of the contrastive loss; 0: it is not computed
        lambda_cs: weight of the attribution loss; 0: it is not computed
        chunk: see `ContrastiveLoss`
        shared_captions: false: captions of one image are no positives of each other, each stands for its pair alone
    """

    def __init__(
        self, contrastive: float = 1.0, lambda_cs: float = 0.0, chunk: int = 4096, shared_captions: bool = True
    ):
        super().__init__()
        if contrastive < 0 or lambda_cs < 0:
            raise ValueError(f"loss weights must not be negative: contrastive {contrastive}, lambda_cs {lambda_cs}")
        self.weight, self.lambda_cs, self.shared_captions = contrastive, lambda_cs, shared_captions
        self.contrastive = ContrastiveLoss(chunk)
        self.attribution = AttributionLoss()

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
