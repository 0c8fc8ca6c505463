"""PriorCLIP: a CLIP-style image-text model whose visual encoder is instructed by a scene recognition prior.

    images -> prior encoder -> instruction f -> instructed visual encoder -> linear -> L2-norm  (B, d)
    tokens -> text encoder -> pooled -> linear -> L2-norm                                       (B, d)

Example:
    model = build_model(load_preset("priorclip-tiny"), vocab_size=4096)
    outputs = model(images, input_ids, attention_mask)
    similarity = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T

Source: PriorCLIP, arXiv 2405.10160, section III (open domain).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.instructed import InstructedBackbone, InstructedViT
from model.scale import clamped_exp
from model.text import TextEncoder
from model.vision import ImageEncoder, is_plain_vit, normalisation

Outputs = dict[str, Tensor | None]


class PriorCLIP(nn.Module):
    """The open domain model. ``config`` is resolved: it rebuilds this model without hub or packages.

    Raises:
        ValueError: the configuration names an encoder or weights that do not fit
        FileNotFoundError: weights are not there
    """

    def __init__(self, config: ModelConfig, vocab_size: int | None = None):
        super().__init__()
        self.config = copy.deepcopy(config)
        encoder = ImageEncoder(self.config.vision, pool=False)
        self.prior = ImageEncoder(self.config.prior, pool=True)
        self.visual: InstructedViT | InstructedBackbone
        if is_plain_vit(encoder.model):
            self.visual = InstructedViT(encoder, self.prior.width, config.belief)
        else:
            self.visual = InstructedBackbone(encoder, self.prior.width, config.belief, config.fusion)
        self.text = TextEncoder(self.config.text, vocab_size)
        self.image_projection = nn.Linear(self.visual.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale_init)]))
        self.attribution_scale = nn.Parameter(torch.tensor([math.log(config.attribution_scale_init)]))
        start_projection(self.image_projection, encoder.clip_projection)
        start_projection(self.text_projection, self.text.clip_projection)
        fill_resolved(self.config, self.text)

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Outputs:
        """Features and scales, what the losses take.

        Args:
            images: (B, 3, H, W), uint8 or float in [0, 1], or None
            input_ids: (B, T) token ids, or None
            attention_mask: (B, T), 1 on real tokens; None: all are real
        Returns:
            image_features (B, d) or None, text_features (B, d) or None, logit_scale (), attribution_scale ()
        """
        limit = math.log(self.config.logit_scale_max)
        return {
            "image_features": None if images is None else self.encode_image(images),
            "text_features": None if input_ids is None else self.encode_text(input_ids, attention_mask),
            "logit_scale": clamped_exp(self.logit_scale, limit),
            "attribution_scale": clamped_exp(self.attribution_scale, limit),
        }

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> L2-normalised (B, d), float32 at least."""
        return unit(self.image_projection(self.visual(images, self.prior(images))))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> L2-normalised (B, d), float32 at least."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return unit(self.text_projection(self.text.pool(self.text(input_ids, mask), mask)))

    def belief_map(self, images: Tensor) -> Tensor:
        """M: the belief of the instruction in each place of the image, (B, h, w), sums to 1."""
        return self.visual.belief_map(images, self.prior(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass: less memory, a third more time."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
        if self.config.prior.trainable:
            self.prior.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        from model.build import undecayed

        return undecayed(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        """The model of an export folder, in eval mode."""
        from model.export import from_pretrained

        return from_pretrained(folder)


def unit(x: Tensor) -> Tensor:
    """L2-normalised over the last axis, float32 at least: the losses need the digits that half precision lacks."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def start_projection(projection: nn.Linear, pretrained: Tensor | None) -> None:
    """CLIP's own projection where the weights hold one that fits, so that its two towers still agree; else random."""
    nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    if pretrained is not None and pretrained.shape == projection.weight.shape:
        with torch.no_grad():
            projection.weight.copy_(pretrained)


def fill_resolved(config: ModelConfig, text: TextEncoder) -> None:
    """Write into the configuration what was looked up while building: input normalisation and text architecture."""
    for encoder in (config.vision, config.prior):
        encoder.mean, encoder.std = normalisation(encoder)
    config.text.config = text.config.config
