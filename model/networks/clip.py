"""Plain CLIP: the two towers of PriorCLIP without a prior, for published CLIP checkpoints and as a baseline.

    images -> visual encoder -> its global feature -> linear -> L2-norm     (B, d)
    tokens -> text encoder -> pooled -> linear -> L2-norm                   (B, d)

Its weights have the same names as in PriorCLIP, so a PriorCLIP can start from a plain CLIP's export folder:

    finetune instruct --init_from converted --model.kind priorclip --model.prior.weights runs/prior/export
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from priorclip.model.config import ModelConfig
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.networks.two_towers import (
    Projected,
    TwoTowers,
    fill_resolved,
    log_scales,
    start_bias,
    start_projection,
    start_uncertainty,
)


class PlainVision(nn.Module):
    """The visual encoder alone, by the name that it has in PriorCLIP."""

    def __init__(self, encoder: ImageEncoder):
        super().__init__()
        self.encoder, self.width = encoder, encoder.width

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, width)."""
        return self.encoder.tokens(images).pooled


class PlainCLIP(TwoTowers):
    """``kind: clip``. ``prior``, ``belief`` and ``fusion`` of the configuration are not used."""

    has_belief = False

    def __init__(self, config: ModelConfig, vocab_size: int | None = None):
        super().__init__()
        self.config = copy.deepcopy(config)
        encoder = ImageEncoder(self.config.vision, pool=False)
        self.visual = PlainVision(encoder)
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
        hidden = self.visual(images)
        return Projected(hidden, self.image_projection(hidden))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass: less memory, a third more time."""
        self.visual.encoder.model.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
