"""Two visual encoders that read the image under an instruction, for plain ViTs and for every other backbone.

InstructedViT (the paper's): belief weighs the patch tokens after the pre-norm, the instruction is put in front as a
token of its own, goes through the ViT's blocks with them, and is what is pooled:

    embed + position -> pre-norm -> belief -> [f; class; patches] -> blocks -> norm -> first token (B, C)

InstructedBackbone (NCHW, NHWC and hierarchical nets, which have no place for a token): the instruction is put in front
of the finished tokens, and a few transformer layers let it read them under belief. The backbone's global feature is
added to what it read (a residual), so that pretrained features pass from the first step on and little data suffices:

    backbone -> linear -> [f; tokens] -> fusion layers under belief -> norm(first token + mean of the tokens)

A fusion layer begins with a LayerNorm, which takes any positive factor of a token away again. So soft belief acts after
it, in each of these layers: keys and values are made of norm(F_l) * (M_l + 1/sqrt(R_l)), those of f of norm(f).

Without fusion layers (``fusion.layers: 0``) nothing has to be learned between backbone and instruction, which is what
little data bears best. Belief then acts in the mean: soft belief weighs it, hard belief takes it of the tokens kept:

    backbone -> linear -> norm(f + mean of the tokens under belief)

Both take images (B, 3, H, W) and the prior's feature (B, P), and give (B, width) and the belief map (B, h, w).
"""

from __future__ import annotations

import types

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from priorclip.model.config import BeliefConfig, FusionConfig
from priorclip.model.encoders.vision import ImageEncoder, VisualTokens, grid_of
from priorclip.model.networks.belief import apply_belief, belief_map, keep_top, soft_weights, weigh
from priorclip.model.networks.pae import MultiHeadAttention


def embed_patches(vit: nn.Module, images: Tensor) -> Tensor:
    """Prefix and patch tokens up to the pre-norm, (B, prefix + L, C)."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))  # type: ignore[operator]


def read_with_instruction(
    vit: nn.Module, images: Tensor, instruction: Tensor, belief: BeliefConfig, embed_only: bool = False
) -> Tensor:
    """The forward of a timm ViT with belief and instruction token: (B, C), or the embedded tokens.

    It is bound to the ViT as its ``forward``, because ZeRO-3 gathers a module's own parameters (class token, position
    embedding) only around a call of that module.
    """
    tokens = embed_patches(vit, images)
    if embed_only:
        return tokens
    # As released, prefix tokens are weighed too; the paper's belief is over image regions.
    prefix = 0 if belief.compat == "released" else vit.num_prefix_tokens
    weighed = apply_belief(tokens[:, prefix:], instruction, belief)  # type: ignore[misc]
    x = torch.cat([instruction.unsqueeze(1).to(tokens.dtype), tokens[:, :prefix], weighed], dim=1)  # type: ignore[misc]
    x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing else vit.blocks(x)  # type: ignore[operator]
    return vit.fc_norm(vit.norm(x[:, 0]))  # type: ignore[operator]


class InstructedViT(nn.Module):
    """A timm ViT whose pooled token is the instruction."""

    def __init__(self, encoder: ImageEncoder, prior_width: int, belief: BeliefConfig):
        super().__init__()
        self.encoder, self.belief, self.width = encoder, belief, encoder.width
        encoder.model.forward = types.MethodType(read_with_instruction, encoder.model)
        self.instruction = nn.Linear(prior_width, self.width)

    def forward(self, images: Tensor, prior: Tensor) -> Tensor:
        """Images (B, 3, H, W), prior feature (B, P) -> (B, width)."""
        instruction = self.instruction(prior)
        return self.encoder.model(self.encoder.normalise(images), instruction, self.belief)

    def belief_map(self, images: Tensor, prior: Tensor) -> Tensor:
        """M over the patch grid, (B, h, w)."""
        pixels, instruction = self.encoder.normalise(images), self.instruction(prior)
        tokens = self.encoder.model(pixels, instruction, self.belief, embed_only=True)
        tokens = tokens[:, self.encoder.model.num_prefix_tokens :]
        return belief_map(tokens, instruction).unflatten(1, grid_of(tokens.shape[1]))

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.encoder.model.set_grad_checkpointing(enable)


class FusionLayer(nn.Module):
    """Pre-norm transformer layer whose attention reads weighed tokens."""

    def __init__(self, width: int, config: FusionConfig):
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, config.heads, config.dropout)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, weights: Tensor | None = None, compat: str = "paper") -> Tensor:
        """x (B, 1 + L, width), soft belief in all but the first token, weights (B, L), or None -> (B, 1 + L, width)."""
        normed = self.norm1(x)
        read = normed
        if weights is not None:
            read = torch.cat([normed[:, :1], weigh(normed[:, 1:], weights, compat)], dim=1)
        x = x + self.dropout(self.attention(normed, read))
        return x + self.dropout(self.mlp(self.norm2(x)))


class InstructedBackbone(nn.Module):
    """Any timm backbone, read by an instruction token through fusion layers, or joined to it without any."""

    def __init__(self, encoder: ImageEncoder, prior_width: int, belief: BeliefConfig, fusion: FusionConfig):
        super().__init__()
        self.encoder, self.belief, self.width = encoder, belief, fusion.width or encoder.width
        same = self.width == encoder.width
        self.narrow = nn.Identity() if same else nn.Linear(encoder.width, self.width)
        self.instruction = nn.Linear(prior_width, self.width)
        self.layers = nn.ModuleList(FusionLayer(self.width, fusion) for _ in range(fusion.layers))
        self.norm = nn.LayerNorm(self.width)
        self.grad_checkpointing = False

    def forward(self, images: Tensor, prior: Tensor) -> Tensor:
        """Images (B, 3, H, W), prior feature (B, P) -> (B, width)."""
        instruction, tokens = self.instruction(prior), self.narrow(self.see(images).tokens)
        mode, compat = self.belief.mode, self.belief.compat
        weights = soft_weights(tokens, instruction, compat) if mode == "soft" else None
        kept = keep_top(tokens, instruction, self.belief.k or 0) if mode == "hard" else tokens
        x = torch.cat([instruction.unsqueeze(1), kept], dim=1)
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, weights, compat, use_reentrant=False)
            else:
                x = layer(x, weights, compat)
        return self.norm(x[:, 0] + (tokens.mean(1) if self.layers else mean_under_belief(kept, weights)))

    def see(self, images: Tensor) -> VisualTokens:
        return self.encoder.tokens(images)

    def belief_map(self, images: Tensor, prior: Tensor) -> Tensor:
        """M over the feature map, (B, h, w)."""
        seen = self.see(images)
        return belief_map(self.narrow(seen.tokens), self.instruction(prior)).unflatten(1, seen.grid)

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.grad_checkpointing = enable
        self.encoder.model.set_grad_checkpointing(enable)


def mean_under_belief(tokens: Tensor, weights: Tensor | None) -> Tensor:
    """Mean (B, d) of the tokens (B, L, d), weighed where there are weights (B, L)."""
    if weights is None:
        return tokens.mean(1)
    return torch.einsum("bld,bl->bd", tokens, (weights / weights.sum(1, keepdim=True)).to(tokens.dtype))
