"""Progressive attention encoders (PAE): attention layers with tokens and an activation signal as input.

A layer takes tokens x and a signal x0:

    y = SA(x)                                  self-attention block over x
    y = LN(y + Drop(MHA(q = W x0, k = y, v = y)))
    y = LN(y + Drop(FFN(y)))

Spatial-PAE: x0 is the instruction f at every position, x is the belief-filtered visual tokens.
Temporal-PAE: x0 is the output of the previous cycle, x is the text tokens; padded positions are masked.

Source: PriorCLIP, arXiv 2405.10160, section III.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MultiHeadAttention(nn.Module):
    """Attention with separate q, k, v and merge projections, dropout on the attention weights."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} cannot be divided among {heads} attention heads")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.merge = nn.Linear(dim, dim)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, Q, d), memory (B, L, d), mask (B, L) true for readable positions -> (B, Q, d)."""
        q, k, v = (
            self.split_heads(self.query(query)),
            self.split_heads(self.key(memory)),
            self.split_heads(self.value(memory)),
        )
        attend = None if mask is None else mask[:, None, None, :].bool()
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        return self.merge(read.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def feed_forward(dim: int) -> nn.Sequential:
    """FFN: d -> 2d, LN, GELU, -> d."""
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class AttentionBlock(nn.Module):
    """Post-norm attention and feed-forward over tokens y with query q (self-attention if q is y).

    A query with one position serves all positions: its MHA is computed once and replicated.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.attention = MultiHeadAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = feed_forward(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """query (B, L or 1, d), y (B, L, d), mask (B, L) -> (B, L, d)."""
        y = self.norm1(y + self.dropout(self.attention(query, y, mask).expand_as(y)))
        return self.norm2(y + self.dropout(self.ffn(y)))


class PAELayer(nn.Module):
    """One progressive attention layer by the formula of this module."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.self_attention = AttentionBlock(dim, heads, dropout)
        self.signal = nn.Linear(dim, dim)
        self.cross_attention = AttentionBlock(dim, heads, dropout)

    def forward(self, x: Tensor, signal: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, d), signal x0 (B, L or 1, d), mask (B, L) true for real positions -> (B, L, d)."""
        y = self.self_attention(x, x, mask)
        return self.cross_attention(self.signal(signal), y, mask)


class PAE(nn.Module):
    """A stack of PAE layers: spatial with an instruction, temporal without."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(PAELayer(dim, heads, dropout) for _ in range(layers))
        self.grad_checkpointing = False

    def forward(self, x: Tensor, instruction: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, L, d), instruction (B, d) or None, mask (B, L) or None -> (B, L, d)."""
        for layer in self.layers:
            signal = x if instruction is None else instruction.unsqueeze(1)
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, signal, mask, use_reentrant=False)
            else:
                x = layer(x, signal, mask)
        return x
