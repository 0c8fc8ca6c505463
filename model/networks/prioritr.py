"""PriorITR: the closed domain model with progressive attention encoders over visual and text tokens.

    image: backbone tokens -> linear F (B, L, d); prior -> linear f (B, d)
           belief keeps or weights F by f -> Spatial-PAE(F, f) -> local tokens
           normalise(global + head(read-out of the local tokens))
    text:  encoder tokens -> linear (B, T, d) -> Temporal-PAE -> normalise(global + head(first token))

The read-out of an image does not depend on the place of a token in the grid (`PriorITR.read_spatial`):

    hard, soft   the local token of highest belief: the first one of hard belief, which sorts, as in the released code
    none         the mean of the local tokens, because without belief no token is better than another
    rivals       the local token of the highest factor; for uniform the mean, as for none

The Spatial-PAE has no positions. So the soft read-out is what the first token would be if the tokens were sorted by
belief, as the paper's figure shows them, and the sort is not needed. Only ``compat="released"`` with soft belief still
depends on the order, because the released weight is a function of grid indices (`belief`).

Without Spatial-PAE layers there is no prior, and the global feature represents an image. Without Temporal-PAE cycles
the global feature represents a text. Without both it is a plain dual encoder, the baseline of the paper's ablations.

The image's global feature is the backbone's pooled feature after the same linear layer. In the released code belief
also ranks that pooled token (50 tokens for Swin-T); with ``compat="paper"`` it ranks the grid only.

Source: PriorCLIP, arXiv 2405.10160, section III (closed domain), and PIR (ACM MM 2023), its first form.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from priorclip.model.config import ModelConfig
from priorclip.model.encoders.padding import draws_dropout
from priorclip.model.encoders.text import TextEncoder
from priorclip.model.encoders.vision import ImageEncoder, VisualTokens
from priorclip.model.networks.belief import affinity, belief_map, keep_top, token_weights, weight_tokens
from priorclip.model.networks.pae import PAE
from priorclip.model.networks.rivals import build_rival
from priorclip.model.networks.two_towers import (
    Projected,
    TwoTowers,
    fill_resolved,
    log_scales,
    start_bias,
    start_uncertainty,
)


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
            self.prior = ImageEncoder(self.config.prior, pool=True, given=self.config.vision.bands)
            self.prior_projection = nn.Linear(self.prior.width, d)
            self.spatial = PAE(d, pae.spatial_layers, pae.heads, pae.dropout)
            self.image_head = nn.Linear(d, d)
            self.rival = build_rival(config.belief, d)
        if self.has_cycles:
            self.temporal = PAE(d, pae.temporal_cycles, pae.heads, pae.dropout)
            self.text_head = nn.Linear(d, d)
        self.logit_scale, self.attribution_scale = log_scales(config)
        self.logit_bias = start_bias(config)
        self.uncertainty = start_uncertainty(config, d, d)
        fill_resolved(self.config, self.text)

    @property
    def cuts_padding(self) -> bool:
        """As `TwoTowers.cuts_padding`; the Temporal-PAE must draw no dropout either."""
        return super().cuts_padding and not (self.has_cycles and draws_dropout(self.temporal))

    def project_image(self, images: Tensor) -> Projected:
        """Images (B, 3, H, W) -> their feature (B, d), of any length, which is also what uncertainty reads."""
        if not self.has_belief:
            feature = self.vision_projection(self.vision.tokens(images).pooled)
            return Projected(feature, feature)
        visual, instruction = self.project(images)
        tokens = visual.tokens
        if self.config.belief.compat == "released":
            tokens = torch.cat([visual.pooled.unsqueeze(1), tokens], dim=1)
        read = self.read_spatial(tokens, instruction)
        feature = visual.pooled + self.image_head(read)
        return Projected(feature, feature)

    def read_spatial(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """Projected tokens (B, L, d), instruction (B, d) -> the read-out of the local tokens, (B, d)."""
        belief = self.config.belief
        if belief.mode == "hard":
            return self.spatial(keep_top(tokens, instruction, belief.k or 0, self.rival), instruction)[:, 0]
        weights = token_weights(tokens, instruction, belief, self.rival)
        if weights is None:
            return self.spatial(tokens, instruction).mean(1)
        local = self.spatial(weight_tokens(tokens, weights, belief.compat), instruction)
        if belief.mode == "uniform":
            return local.mean(1)
        # Soft belief reads by <F, f>, because the released factor does not follow it.
        return read_highest(local, affinity(tokens, instruction) if self.rival is None else weights)

    def project(self, images: Tensor) -> tuple[VisualTokens, Tensor]:
        """Returns projected visual tokens and the instruction f (B, d)."""
        visual = self.vision.tokens(images)
        tokens, pooled = self.vision_projection(visual.tokens), self.vision_projection(visual.pooled)
        return VisualTokens(tokens, pooled, visual.grid), self.prior_projection(self.prior(images))

    def project_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Projected:
        """Token ids (B, T) -> their feature (B, d), of any length, which is also what uncertainty reads."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens = self.text_projection(self.text(input_ids, mask))
        feature = self.text.pool(tokens, mask)
        if self.has_cycles:
            feature = feature + self.text_head(self.temporal(tokens, mask=mask)[:, 0])
        return Projected(feature, feature)

    def belief_map(self, images: Tensor) -> Tensor:
        """Returns M over the grid of visual tokens, (B, h, w), sums to 1."""
        visual, instruction = self.project(images)
        return belief_map(visual.tokens, instruction, self.rival).unflatten(1, visual.grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass: less memory, a third more time."""
        self.vision.model.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)
        for encoder in (module for module in self.children() if isinstance(module, PAE)):
            encoder.grad_checkpointing = enable
        if self.has_belief and self.config.prior.trainable:
            self.prior.model.set_grad_checkpointing(enable)


def read_highest(local: Tensor, scores: Tensor) -> Tensor:
    """Returns for each image the local token (B, L, d) of the highest score (B, L), -> (B, d). Of ties, the first."""
    best = scores.argmax(dim=-1)[:, None, None].expand(-1, 1, local.shape[-1])
    return local.gather(1, best).squeeze(1)
