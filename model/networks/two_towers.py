"""The common base of PriorCLIP, PriorITR and plain CLIP: two encoders into one space, and two learned scales.

A subclass has ``config``, ``text``, ``text_projection``, ``logit_scale``, ``attribution_scale`` and ``project_image``.
With a prior it also has ``belief_map``; without a prior ``has_belief`` is false.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from priorclip.model.config import ModelConfig
from priorclip.model.encoders.padding import cut_padding
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import normalisation
from priorclip.model.losses.logit_scale import clamped_exp, log_scale
from priorclip.model.networks.rivals import ToldBelief
from priorclip.model.networks.uncertainty import Uncertainty

Outputs = dict[str, Tensor | None]


class Projected(NamedTuple):
    """Encoded images or texts: ``hidden`` (B, w) before the last projection, ``feature`` (B, d) after it."""

    hidden: Tensor
    feature: Tensor


class TwoTowers(nn.Module):
    """An image and a text encoder whose L2-normalised features are compared."""

    config: ModelConfig
    text: TextEncoder
    text_projection: nn.Linear
    has_belief: bool = True
    logit_scale: nn.Parameter
    attribution_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    uncertainty: Uncertainty | None

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_belief: bool = False,
        masks: Tensor | None = None,
    ) -> Outputs:
        """Returns features and scales, the input of the losses.

        Args:
            images: (B, 3, H, W), uint8 or float in [0, 1]; measured values (B, n, H, W) of model.vision.bands; or None
            input_ids: (B, T) token ids, or None
            attention_mask: (B, T), 1 for real tokens; None: all are real
            return_belief: also return the belief map of the images
            masks: (B, H, W), where the images show what their captions name, for a model whose belief is given
        Returns:
            image_features (B, d) or None, text_features (B, d) or None, logit_scale (), attribution_scale (). With
            ``shared_scale`` both scales are the same tensor, so that its gradient is that of both losses. A model with
            a bias adds logit_bias (). A model with uncertainty adds image_uncertainty and text_uncertainty, (B,) or
            None. With ``return_belief`` belief (B, h, w), which a plain CLIP does not have
        """
        # Before the images, so that a GPU has little to finish when the mask is read. Compiled code keeps its shapes.
        if input_ids is not None and attention_mask is not None and not is_compiling() and self.cuts_padding:
            input_ids, attention_mask = cut_padding(input_ids, attention_mask)
        told = self.told_belief
        if told is not None:
            told.masks = masks
        limit = math.log(self.config.logit_scale_max)
        scale = clamped_exp(self.logit_scale, limit)
        shared = self.config.shared_scale
        image = None if images is None else self.project_image(images)
        text = None if input_ids is None else self.project_text(input_ids, attention_mask)
        outputs: Outputs = {
            "image_features": None if image is None else normalise_features(image.feature),
            "text_features": None if text is None else normalise_features(text.feature),
            "logit_scale": scale,
            "attribution_scale": scale if shared else clamped_exp(self.attribution_scale, limit),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias.to(scale.dtype).reshape(())
        if self.uncertainty is not None:
            outputs["image_uncertainty"] = None if image is None else self.uncertainty.image(image.hidden)
            outputs["text_uncertainty"] = None if text is None else self.uncertainty.text(text.hidden)
        if return_belief and self.has_belief and images is not None:
            outputs["belief"] = self.belief_map(images)
        if told is not None:
            told.masks = None
        return outputs

    @property
    def told_belief(self) -> ToldBelief | None:
        """The belief of a model that is given its belief with the images; None for any other model."""
        holder = getattr(self, "visual", self)
        rival = getattr(holder, "rival", None)
        return rival if isinstance(rival, ToldBelief) else None

    @property
    def cuts_padding(self) -> bool:
        """Whether features of texts are the same if their common padding is cut before the text encoder.

        An encoder that remembers needs it, because the names of its entries are hashes of padded texts.
        """
        return self.text.cuts_padding and self.text.feature_cache is None

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> L2-normalised (B, d), at least float32."""
        return normalise_features(self.project_image(images).feature)

    def project_image(self, images: Tensor) -> Projected:
        """Images (B, 3, H, W) -> their feature (B, d), of any length, and what it was projected from."""
        raise NotImplementedError

    def belief_map(self, images: Tensor) -> Tensor:
        """Returns M over the grid of visual tokens of images (B, 3, H, W): (B, h, w), row-major, each sums to 1.

        It is the belief before the mode applies: ``hard`` keeps the k highest places, ``none`` does not use it.
        """
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> L2-normalised (B, d), at least float32."""
        return normalise_features(self.project_text(input_ids, attention_mask).feature)

    def project_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Projected:
        """Token ids (B, T) -> their feature (B, d), of any length, and what it was projected from."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.text.pool(self.text(input_ids, mask), mask)
        return Projected(hidden, self.text_projection(hidden))


def log_scales(config: ModelConfig) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns the logs of the scales of the contrastive and the attribution loss, each (1,).

    With ``shared_scale`` the second is not learned and not read, but stays in checkpoints.
    """
    attribution_learned = config.learn_attribution_scale and not config.shared_scale
    return (
        log_scale(config.logit_scale_init, config.learn_logit_scale),
        log_scale(config.attribution_scale_init, attribution_learned),
    )


def start_bias(config: ModelConfig) -> nn.Parameter | None:
    """Returns the bias of the sigmoid loss as a parameter (1,), or None if the model has none."""
    return None if config.logit_bias_init is None else nn.Parameter(torch.tensor([config.logit_bias_init]))


def start_uncertainty(config: ModelConfig, image_width: int, text_width: int) -> Uncertainty | None:
    """Returns the heads of the variances, or None if the model has none."""
    return Uncertainty(image_width, text_width, config.embed_dim) if config.uncertainty else None


def start_projection(projection: nn.Linear, pretrained: Tensor | None) -> None:
    """Copies CLIP's own projection (d, C) if the weights hold one that fits, so that its two towers still agree.

    Otherwise the projection starts at random.
    """
    nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    if pretrained is not None and pretrained.shape == projection.weight.shape:
        with torch.no_grad():
            projection.weight.copy_(pretrained)


def normalise_features(x: Tensor) -> Tensor:
    """L2-normalises over the last axis, at least float32: half precision has too few digits for the losses."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def fill_resolved(config: ModelConfig, text: TextEncoder) -> None:
    """Writes the resolved values into the configuration: input normalisation and text architecture."""
    for encoder in config.normalised_encoders:
        encoder.mean, encoder.std = normalisation(encoder)
    config.text.config = text.config.config
