"""PriorITR: the closed domain model; progressive attention encoders over visual and text tokens.

    image: backbone tokens -> linear F (B, L, d); prior -> linear f (B, d)
           belief keeps or weighs F under f -> Spatial-PAE(F, f) -> normalise(global + head(first token))
    text:  encoder tokens -> linear (B, T, d) -> Temporal-PAE -> normalise(global + head(first token))

The image's global feature is the backbone's pooled feature projected by the same linear layer. In the released code
that pooled token also stands among the tokens that belief ranks (50 for Swin-T); with ``compat="paper"`` they
are the grid alone.

Source: PriorCLIP, arXiv 2405.10160, section III (closed domain), and PIR (ACM MM 2023), its first form.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.belief import apply_belief, belief_map
from model.config import ModelConfig
from model.pae import PAE
from model.priorclip import Outputs, fill_resolved, unit
from model.scale import clamped_exp
from model.text import TextEncoder
from model.vision import ImageEncoder, VisualTokens


class PriorITR(nn.Module):
    """The closed domain model. The same methods as `PriorCLIP`."""

    def __init__(self, config: ModelConfig, vocab_size: int | None = None):
        super().__init__()
        self.config = copy.deepcopy(config)
        d, pae = config.embed_dim, config.pae
        self.vision = ImageEncoder(self.config.vision, pool=False)
        self.prior = ImageEncoder(self.config.prior, pool=True)
        self.text = TextEncoder(self.config.text, vocab_size)
        self.vision_projection = nn.Linear(self.vision.width, d)
        self.prior_projection = nn.Linear(self.prior.width, d)
        self.text_projection = nn.Linear(self.text.width, d)
        self.spatial = PAE(d, pae.spatial_layers, pae.heads, pae.dropout)
        self.temporal = PAE(d, pae.temporal_cycles, pae.heads, pae.dropout)
        self.image_head = nn.Linear(d, d)
        self.text_head = nn.Linear(d, d)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale_init)]))
        self.attribution_scale = nn.Parameter(torch.tensor([math.log(config.attribution_scale_init)]))
        fill_resolved(self.config, self.text)

    def forward(
        self,
        images: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Outputs:
        """Features and scales; see `PriorCLIP.forward`."""
        limit = math.log(self.config.logit_scale_max)
        return {
            "image_features": None if images is None else self.encode_image(images),
            "text_features": None if input_ids is None else self.encode_text(input_ids, attention_mask),
            "logit_scale": clamped_exp(self.logit_scale, limit),
            "attribution_scale": clamped_exp(self.attribution_scale, limit),
        }

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> L2-normalised (B, d), float32 at least."""
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
        self.spatial.grad_checkpointing = self.temporal.grad_checkpointing = enable
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
