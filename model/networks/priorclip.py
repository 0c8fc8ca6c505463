"""PriorCLIP: a CLIP-style image-text model. A scene recognition prior instructs its visual encoder.

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

from torch import Tensor, nn

from priorclip.model.config import ModelConfig
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder, is_plain_vit
from priorclip.model.networks.instructed_vision import InstructedBackbone, InstructedViT
from priorclip.model.networks.two_towers import (
    Projected,
    TwoTowers,
    fill_resolved,
    log_scales,
    start_bias,
    start_projection,
    start_uncertainty,
)


class PriorCLIP(TwoTowers):
    """The open domain model. Its ``config`` is resolved: it rebuilds this model without hub or packages.

    Raises:
        ValueError: an encoder or weights of the configuration do not fit
        FileNotFoundError: a weight file is missing
    """

    def __init__(self, config: ModelConfig, vocab_size: int | None = None):
        super().__init__()
        self.config = copy.deepcopy(config)
        encoder = ImageEncoder(self.config.vision, pool=False)
        self.prior = ImageEncoder(self.config.prior, pool=True, given=self.config.vision.bands)
        self.visual: InstructedViT | InstructedBackbone
        if is_plain_vit(encoder.model):
            self.visual = InstructedViT(encoder, self.prior.width, config.belief)
        else:
            self.visual = InstructedBackbone(encoder, self.prior.width, config.belief, config.fusion)
        self.text = TextEncoder(self.config.text, vocab_size)
        self.image_projection = nn.Linear(self.visual.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text.width, config.embed_dim, bias=False)
        self.logit_scale, self.attribution_scale = log_scales(config)
        self.logit_bias = start_bias(config)
        self.uncertainty = start_uncertainty(config, self.visual.width, self.text.width)
        start_projection(self.image_projection, encoder.clip_projection)
        start_projection(self.text_projection, self.text.clip_projection)
        fill_resolved(self.config, self.text)

    def project_image(self, images: Tensor) -> Projected:
        """Images (B, 3, H, W) -> their feature (B, d), of any length, and what it was projected from."""
        hidden = self.visual(images, self.prior(images))
        return Projected(hidden, self.image_projection(hidden))

    def belief_map(self, images: Tensor) -> Tensor:
        """Returns M, the belief of the instruction in each place of the image, (B, h, w), sums to 1."""
        return self.visual.belief_map(images, self.prior(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass: less memory, a third more time."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
        if self.config.prior.trainable:
            self.prior.model.set_grad_checkpointing(enable)
