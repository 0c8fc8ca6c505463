"""PriorITR: the closed domain model; progressive attention encoders over visual and text tokens.

    image: backbone tokens -> linear F (B, L, d); prior -> linear f (B, d)
           belief keeps or weighs F under f -> Spatial-PAE(F, f) -> normalise(global + head(first token))
    text:  encoder tokens -> linear (B, T, d) -> Temporal-PAE -> normalise(global + head(first token))

Without layers in the Spatial-PAE there is no prior either, and an image is its global feature alone; without cycles in
the Temporal-PAE a text is. With neither this is a plain dual encoder, the baseline of the paper's ablations.

The image's global feature is the backbone's pooled feature projected by the same linear layer. In the released code
that pooled token also stands among the tokens that belief ranks (50 for Swin-T); with ``compat="paper"`` they
are the grid alone.

Source: PriorCLIP, arXiv 2405.10160, section III (closed domain), and PIR (ACM MM 2023), its first form.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from priorclip.model.config import ModelConfig
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder, VisualTokens
from priorclip.model.losses.logit_scale import log_scale
from priorclip.model.networks.belief import apply_belief, belief_map
from priorclip.model.networks.pae import PAE
from priorclip.model.networks.two_towers import TwoTowers, fill_resolved, unit


class PriorITR(TwoTowers):
    """The closed domain model. The same methods as `PriorCLIP`."""

    def __init__(self, config: ModelConfig, vocab_size: int | None = None):
        super().__init__()
        self.config = copy.deepcopy(config)
        d, pae = config.embed_dim, config.pae
        self.vision = ImageEncoder(self.config.vision, pool=False)
        self.text = TextEncoder(self.config.text, vocab_size)
        self.vision_projection = nn.Linear(self.vision.width, d)
        self.text_projection = nn.Linear(self.text.width, d)
        self.has_belief, self.has_cycles = pae.spatial_layers > 0, pae.temporal_cycles > 0
        if self.has_belief:
            self.prior = ImageEncoder(self.config.prior, pool=True)
            self.prior_projection = nn.Linear(self.prior.width, d)
            self.spatial = PAE(d, pae.spatial_layers, pae.heads, pae.dropout)
            self.image_head = nn.Linear(d, d)
        if self.has_cycles:
            self.temporal = PAE(d, pae.temporal_cycles, pae.heads, pae.dropout)
            self.text_head = nn.Linear(d, d)
        self.logit_scale = log_scale(config.logit_scale_init, config.learn_logit_scale)
        self.attribution_scale = log_scale(config.attribution_scale_init, config.learn_attribution_scale)
        fill_resolved(self.config, self.text)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> L2-normalised (B, d), float32 at least."""
        if not self.has_belief:
            return unit(self.vision_projection(self.vision.tokens(images).pooled))
        seen, instruction = self.see(images)
        tokens = seen.tokens
        if self.config.belief.compat == "released":
            tokens = torch.cat([seen.pooled.unsqueeze(1), tokens], dim=1)
        local = self.spatial(apply_belief(tokens, instruction, self.config.belief), instruction)
        return unit(seen.pooled + self.image_head(local[:, 0]))

    def see(self, images: Tensor) -> tuple[VisualTokens, Tensor]:
        """Projected visual tokens and instruction f (B, d)."""
        seen = self.vision.tokens(images)
        tokens, pooled = self.vision_projection(seen.tokens), self.vision_projection(seen.pooled)
        return VisualTokens(tokens, pooled, seen.grid), self.prior_projection(self.prior(images))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> L2-normalised (B, d), float32 at least."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens = self.text_projection(self.text(input_ids, mask))
        if not self.has_cycles:
            return unit(self.text.pool(tokens, mask))
        local = self.temporal(tokens, mask=mask)
        return unit(self.text.pool(tokens, mask) + self.text_head(local[:, 0]))

    def belief_map(self, images: Tensor) -> Tensor:
        """M over the grid of visual tokens, (B, h, w), sums to 1."""
        seen, instruction = self.see(images)
        return belief_map(seen.tokens, instruction).unflatten(1, seen.grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass: less memory, a third more time."""
        self.vision.model.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
        for encoder in (module for module in self.children() if isinstance(module, PAE)):
            encoder.grad_checkpointing = enable
        if self.has_belief and self.config.prior.trainable:
            self.prior.model.set_grad_checkpointing(enable)
