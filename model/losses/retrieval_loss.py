"""The training loss: a loss of pairs plus ``lambda_cs`` times attribution loss, over the batch of all ranks.

    outputs = model(images, input_ids, attention_mask)
    loss, parts = RetrievalLoss(lambda_cs=1.0)(outputs, image_ids, labels)
    engine.backward(loss)           # mean over ranks of the gradients = gradient of one process with the whole batch

The loss of pairs is the symmetric contrastive loss, SigLIP's pairwise sigmoid loss, or that of distributions.

Source: PriorCLIP, arXiv 2405.10160, section III.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from priorclip.model.config import PairLoss
from priorclip.model.losses.attribution import UNLABELLED, AttributionLoss
from priorclip.model.losses.contrastive import ContrastiveLoss
from priorclip.model.losses.gather import rank
from priorclip.model.losses.pairs import hash_tokens
from priorclip.model.losses.probabilistic import as_products
from priorclip.model.losses.sigmoid import SigmoidLoss

Parts = dict[str, Tensor]


class RetrievalLoss(nn.Module):
    """A loss of pairs plus ``lambda_cs`` times attribution loss.

    Args:
        contrastive: weight of the loss of pairs; 0: not computed
        lambda_cs: weight of the attribution loss; 0: not computed
        chunk: see `ContrastiveLoss`, `SigmoidLoss` and `AttributionLoss`
        shared_captions: false: a caption is a positive of its own pair only, not of other pairs of the same image
        compat: see `AttributionLoss`
        kind: the loss of pairs: contrastive; sigmoid, whose model needs a logit_bias; or probabilistic, whose model
            needs uncertainty too
        equal_captions: whether another image's pair with the same words is a negative, or ignored
        hard_negatives: see `ContrastiveLoss`
        classes: see `AttributionLoss`
    """

    def __init__(
        self,
        contrastive: float = 1.0,
        lambda_cs: float = 0.0,
        chunk: int | None = None,
        shared_captions: bool = True,
        compat: Literal["paper", "released"] = "paper",
        kind: PairLoss = "contrastive",
        equal_captions: Literal["negative", "ignored"] = "negative",
        hard_negatives: float = 0.0,
        classes: int | None = None,
    ):
        super().__init__()
        if contrastive < 0 or lambda_cs < 0:
            raise ValueError(f"loss weights must not be negative: contrastive {contrastive}, lambda_cs {lambda_cs}")
        self.weight, self.lambda_cs, self.shared_captions = contrastive, lambda_cs, shared_captions
        self.ignores_equal_captions = equal_captions == "ignored"
        self.has_variances = kind == "probabilistic"
        self.contrastive = ContrastiveLoss(chunk, hard_negatives) if kind == "contrastive" else SigmoidLoss(chunk)
        self.attribution = AttributionLoss(chunk, compat, classes)

    def forward(
        self,
        outputs: Mapping[str, Tensor | None],
        image_ids: Tensor,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Parts]:
        """Returns the loss and its detached parts.

        Args:
            outputs: the model's outputs for images and texts
            image_ids: (B,) integers, equal for captions of one image on all ranks
            labels: (B,) scene class, -1 if unknown; None: all unknown
            input_ids: (B, T) padded token ids on any device; only ``equal_captions: ignored`` reads them
        Raises:
            ValueError: the outputs lack one of the two modalities or the bias, or input_ids are missing
        """
        image, text, scale, attribution_scale = features_of(outputs)
        # The scale of a loss that is off stays in the graph because ZeRO expects a gradient for every parameter.
        contrastive = self.of_pairs(image, text, scale, outputs, image_ids, input_ids) if self.weight > 0 else 0 * scale
        if self.lambda_cs > 0:
            labels = torch.full_like(image_ids, UNLABELLED) if labels is None else labels
            attribution = self.attribution(image, text, attribution_scale, labels)
        else:
            attribution = 0 * attribution_scale
        loss = (self.weight or 1.0) * contrastive + (self.lambda_cs or 1.0) * attribution
        # So do the bias of the sigmoid loss and the heads of the variances, if a model has them and the loss does not.
        for name in ("logit_bias", "image_uncertainty", "text_uncertainty"):
            if (unread := outputs.get(name)) is not None:
                loss = loss + 0 * unread.sum()
        return loss, {"contrastive": contrastive.detach(), "attribution": attribution.detach()}

    def of_pairs(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        outputs: Mapping[str, Tensor | None],
        image_ids: Tensor,
        input_ids: Tensor | None,
    ) -> Tensor:
        """Returns the loss of pairs, ()."""
        captions = None
        if self.ignores_equal_captions:
            if input_ids is None:
                raise ValueError("equal_captions 'ignored' needs the input_ids of the captions")
            captions = hash_tokens(input_ids).to(image.device, non_blocking=True)
        ids = image_ids if self.shared_captions else pair_ids(image_ids)
        if isinstance(self.contrastive, ContrastiveLoss):
            return self.contrastive(image, text, scale, ids, captions)  # type: ignore[no-any-return]
        bias = outputs.get("logit_bias")
        if bias is None:
            raise ValueError("the sigmoid loss needs a model with a bias: set model.logit_bias_init, -10 as in SigLIP")
        if self.has_variances:
            of_image, of_text = outputs.get("image_uncertainty"), outputs.get("text_uncertainty")
            if of_image is None or of_text is None:
                raise ValueError("the probabilistic loss needs a model with variances: set model.uncertainty true")
            image, text, scale, bias = as_products(image, text, of_image, of_text, scale, bias)
        return self.contrastive(image, text, scale, bias, ids, captions)  # type: ignore[no-any-return]


def pair_ids(image_ids: Tensor) -> Tensor:
    """Returns an id (B,) for each pair that is unique over all ranks."""
    first = rank() * len(image_ids)
    return torch.arange(first, first + len(image_ids), device=image_ids.device)


def features_of(outputs: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns both features and both scales. Raises ValueError if the model was called with one modality only."""
    values = [outputs[key] for key in ("image_features", "text_features", "logit_scale", "attribution_scale")]
    if any(value is None for value in values):
        raise ValueError("the losses need image_features and text_features: call the model with both")
    return tuple(values)  # type: ignore[return-value]
