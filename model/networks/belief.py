"""Belief: how much a scene instruction believes in each visual token.

    M = softmax over l of <F_l, f>          belief of token l under the instruction f
    R = rank of l by M, 1 is the highest
    soft: F_l * (M_l + 1 / sqrt(R_l))       hard: the k tokens of highest M, highest first

Example, L = 3 tokens with <F, f> = (0, 2, 1): M = (.09, .67, .24), R = (3, 1, 2), soft weights (.67, 1.67, .95).

Source: PriorCLIP, arXiv 2405.10160, section III (soft and hard belief). The authors' released code differs: in place of
the rank it has the l-th entry of the argsort, so the weight is 1/sqrt(index + 1), and it L2-normalises the weighted
tokens over the token axis. ``compat="released"`` computes that. So its factor of a token depends on the order of the
tokens, which the paper's does not.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from priorclip.model.belief_config import BeliefConfig


def float32_at_least(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def affinity(tokens: Tensor, instruction: Tensor) -> Tensor:
    """Returns <F_l, f>, at least float32: tokens (B, L, d), instruction (B, d) -> (B, L)."""
    dtype = float32_at_least(tokens)
    device = tokens.device.type
    # The meta device, which counts FLOPs and parameters, has no autocast.
    with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
        return torch.einsum("bld,bd->bl", tokens.to(dtype), instruction.to(dtype))


def belief_map(tokens: Tensor, instruction: Tensor, rival: nn.Module | None = None) -> Tensor:
    """Returns M, the belief of each token, (B, L), at least float32; rows sum to 1.

    With a rival of soft belief it returns the rival's factors, divided by their sum.
    """
    if rival is None:
        return affinity(tokens, instruction).softmax(dim=-1)
    weights = rival(tokens, instruction)
    return weights / weights.sum(dim=-1, keepdim=True)


def order_descending(scores: Tensor) -> Tensor:
    """Returns indices that sort each row of scores (B, L) from high to low; equal scores keep their order."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def belief_rank(scores: Tensor) -> Tensor:
    """Returns R, the rank of each entry of scores (B, L) in its row: 1 is the highest, ties by position."""
    order = order_descending(scores)
    ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def soft_weights(tokens: Tensor, instruction: Tensor, compat: str = "paper") -> Tensor:
    """Returns the factor of each token for soft belief, (B, L)."""
    scores = affinity(tokens, instruction)
    # Ranks of the logits, because small beliefs M can underflow to equal zeros.
    place = belief_rank(scores) if compat == "paper" else order_descending(scores) + 1
    return scores.softmax(dim=-1) + place.to(scores.dtype).rsqrt()


def token_weights(
    tokens: Tensor, instruction: Tensor, config: BeliefConfig, rival: nn.Module | None = None
) -> Tensor | None:
    """Returns the factor of each token, (B, L), for soft belief and its rivals, None for hard and none.

    Args:
        tokens: F, (B, L, d)
        instruction: f, (B, d)
        rival: computes the factors in place of soft belief (`rivals.build_rival`)
    """
    if config.mode == "hard":
        return None
    if rival is not None:
        return rival(tokens, instruction)
    return soft_weights(tokens, instruction, config.compat) if config.mode == "soft" else None


def apply_belief(tokens: Tensor, instruction: Tensor, config: BeliefConfig, rival: nn.Module | None = None) -> Tensor:
    """Weights or filters the tokens by belief.

    Args:
        tokens: F, (B, L, d)
        instruction: f, (B, d)
        rival: computes the factors in place of soft belief; for hard, the scores whose k highest are kept
    Returns:
        (B, L, d) for soft, its rivals and none, (B, k, d) for hard
    Raises:
        ValueError: hard belief must keep more tokens than there are
    """
    if config.mode == "hard":
        return keep_top(tokens, instruction, config.k or 0, rival)
    weights = token_weights(tokens, instruction, config, rival)
    return tokens if weights is None else weight_tokens(tokens, weights, config.compat)


def weight_tokens(tokens: Tensor, weights: Tensor, compat: str = "paper") -> Tensor:
    """Multiplies tokens (B, L, d) by their factors (B, L)."""
    weighted = tokens * weights.to(tokens.dtype).unsqueeze(-1)
    # Over the tokens, as in the released code.
    return F.normalize(weighted, dim=1) if compat == "released" else weighted


def keep_top(tokens: Tensor, instruction: Tensor, k: int, rival: nn.Module | None = None) -> Tensor:
    """Returns the k tokens of highest belief, or of the highest factor of a rival, highest first, (B, k, d)."""
    if not 1 <= k <= tokens.shape[1]:
        raise ValueError(f"belief.k is {k}, but the visual encoder gives {tokens.shape[1]} tokens")
    scores = affinity(tokens, instruction) if rival is None else rival(tokens, instruction)
    order = order_descending(scores)[:, :k]
    return tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
