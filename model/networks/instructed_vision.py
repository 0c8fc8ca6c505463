"""Two visual encoders that use an instruction, one for plain ViTs and one for every other backbone.

InstructedViT (the paper's): belief weights the patch tokens after the pre-norm. The instruction is the first token. It
goes through the ViT's blocks with the others, and its state is the pooled feature:

    embed + position -> pre-norm -> belief -> [f; class; patches] -> blocks -> norm -> first token (B, C)

InstructedBackbone (NCHW, NHWC and hierarchical nets, which cannot take an extra token): the instruction is put before
the output tokens, and it reads them under belief in a few transformer layers. The backbone's global feature is added
(a residual), so that pretrained features pass from the first step on and little data is enough:

    backbone -> linear -> [f; tokens] -> fusion layers under belief -> norm(first token + mean of the tokens)

A fusion layer begins with a LayerNorm, which removes any positive factor of a token. So soft belief acts after it, in
each of these layers: keys and values come from norm(F_l) * (M_l + 1/sqrt(R_l)), and those of f from norm(f).

Without fusion layers (``fusion.layers: 0``) no layer between backbone and instruction is trained, which is best for
little data. Belief then acts in the mean: soft belief weights it, and hard belief takes it over the kept tokens:

    backbone -> linear -> norm(f + mean of the tokens under belief)

Both take images (B, 3, H, W) and the prior's feature (B, P) and return (B, width); belief_map returns (B, h, w).
"""

from __future__ import annotations

import types

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from priorclip.model.belief_config import BeliefConfig
from priorclip.model.config import FusionConfig
from priorclip.model.encoders.vision import ImageEncoder, grid_of
from priorclip.model.networks.belief import apply_belief, belief_map, keep_top, token_weights, weight_tokens
from priorclip.model.networks.pae import MultiHeadAttention
from priorclip.model.networks.rivals import build_rival


def embed_patches(vit: nn.Module, images: Tensor) -> Tensor:
    """Returns prefix and patch tokens after the pre-norm, (B, prefix + L, C)."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))  # type: ignore[operator]


def read_with_instruction(
    vit: nn.Module,
    images: Tensor,
    instruction: Tensor,
    belief: BeliefConfig,
    rival: nn.Module | None = None,
    embed_only: bool = False,
) -> Tensor:
    """The forward of a timm ViT with belief and instruction token -> (B, C), or the embedded tokens.

    It replaces the ``forward`` of the ViT, because ZeRO-3 gathers the parameters of a module (class token, position
    embedding) only during a call of that module.
    """
    tokens = embed_patches(vit, images)
    if embed_only:
        return tokens
    # The released code weights prefix tokens too; the paper's belief is over image regions.
    prefix = 0 if belief.compat == "released" else vit.num_prefix_tokens
    weighted = apply_belief(tokens[:, prefix:], instruction, belief, rival)  # type: ignore[misc]
    x = torch.cat([instruction.unsqueeze(1).to(tokens.dtype), tokens[:, :prefix], weighted], dim=1)  # type: ignore[misc]
    x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x)  # type: ignore[operator]
    return vit.fc_norm(vit.norm(x[:, 0]))  # type: ignore[operator]


class InstructedViT(nn.Module):
    """A timm ViT whose pooled token is the instruction."""

    def __init__(self, encoder: ImageEncoder, prior_width: int, belief: BeliefConfig):
        super().__init__()
        self.encoder, self.belief, self.width = encoder, belief, encoder.width
        encoder.model.forward = types.MethodType(read_with_instruction, encoder.model)
        self.instruction = nn.Linear(prior_width, self.width)
        self.rival = build_rival(belief, self.width)

    def forward(self, images: Tensor, prior: Tensor) -> Tensor:
        """Images (B, 3, H, W), prior feature (B, P) -> (B, width)."""
        instruction = self.instruction(prior)
        return self.encoder.model(self.encoder.normalise(images), instruction, self.belief, self.rival)

    def belief_map(self, images: Tensor, prior: Tensor) -> Tensor:
        """Returns M over the patch grid, (B, h, w)."""
        pixels, instruction = self.encoder.normalise(images), self.instruction(prior)
        tokens = self.encoder.model(pixels, instruction, self.belief, embed_only=True)
        tokens = tokens[:, self.encoder.model.num_prefix_tokens :]
        return belief_map(tokens, instruction, self.rival).unflatten(1, grid_of(tokens.shape[1]))

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.encoder.model.set_grad_checkpointing(enable)


class FusionLayer(nn.Module):
    """Pre-norm transformer layer whose attention reads weighted tokens."""

    def __init__(self, width: int, config: FusionConfig):
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, config.heads, config.dropout)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, weights: Tensor | None = None, compat: str = "paper", queries: int | None = None
    ) -> Tensor:
        """Reads the tokens under belief.

        Args:
            x: (B, 1 + L, width)
            weights: factors of belief for all but the first token, (B, L)
            compat: how the factors are applied (`weight_tokens`)
            queries: how many tokens are needed afterwards, from the first on; None means all
        Returns:
            (B, queries or 1 + L, width)
        """
        normed = self.norm1(x)
        memory = normed
        if weights is not None:
            memory = torch.cat([normed[:, :1], weight_tokens(normed[:, 1:], weights, compat)], dim=1)
        x = x[:, :queries] + self.dropout(self.attention(normed[:, :queries], memory))
        return x + self.dropout(self.mlp(self.norm2(x)))


class InstructedBackbone(nn.Module):
    """Any timm backbone whose tokens an instruction token reads in fusion layers, or joins without any."""

    def __init__(self, encoder: ImageEncoder, prior_width: int, belief: BeliefConfig, fusion: FusionConfig):
        super().__init__()
        self.encoder, self.belief, self.width = encoder, belief, fusion.width or encoder.width
        same = self.width == encoder.width
        self.narrow = nn.Identity() if same else nn.Linear(encoder.width, self.width)
        self.instruction = nn.Linear(prior_width, self.width)
        self.layers = nn.ModuleList(FusionLayer(self.width, fusion) for _ in range(fusion.layers))
        self.norm = nn.LayerNorm(self.width)
        self.rival = build_rival(belief, self.width)
        self.grad_checkpointing = False

    def forward(self, images: Tensor, prior: Tensor) -> Tensor:
        """Images (B, 3, H, W), prior feature (B, P) -> (B, width)."""
        instruction, tokens = self.instruction(prior), self.narrow(self.encoder.tokens(images).tokens)
        mode, compat = self.belief.mode, self.belief.compat
        weights = token_weights(tokens, instruction, self.belief, self.rival)
        kept = keep_top(tokens, instruction, self.belief.k or 0, self.rival) if mode == "hard" else tokens
        x = torch.cat([instruction.unsqueeze(1), kept], dim=1)
        for layer in self.layers:
            # After the last layer only the first token is read, so that layer computes no other: a third of the work.
            queries = 1 if layer is self.layers[-1] else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, weights, compat, queries, use_reentrant=False)
            else:
                x = layer(x, weights, compat, queries)
        return self.norm(x[:, 0] + (tokens.mean(1) if self.layers else mean_under_belief(kept, weights)))

    def belief_map(self, images: Tensor, prior: Tensor) -> Tensor:
        """Returns M over the feature map, (B, h, w)."""
        visual = self.encoder.tokens(images)
        tokens, instruction = self.narrow(visual.tokens), self.instruction(prior)
        return belief_map(tokens, instruction, self.rival).unflatten(1, visual.grid)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.grad_checkpointing = enable
        self.encoder.model.set_grad_checkpointing(enable)


def mean_under_belief(tokens: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean (B, d) of tokens (B, L, d), weighted if there are weights (B, L)."""
    if weights is None:
        return tokens.mean(1)
    return torch.einsum("bld,bl->bd", tokens, (weights / weights.sum(1, keepdim=True)).to(tokens.dtype))
