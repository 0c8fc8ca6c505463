"""Rivals of soft belief: other rules by which visual tokens F get factors. Each takes the place of M + 1/sqrt(R).

    rival = build_rival(BeliefConfig(mode="entropy"), width=384)      # None for soft, hard and none
    factors = rival(tokens, instruction)                              # (B, L, d), (B, d) -> (B, L)

Example, L = 3 tokens with <F, f> = (0, 2, 1), so M = (.09, .67, .24), soft = (.67, 1.67, .95), their mean 1.09:

    entropy      H(M)/log 3 = .76, so a quarter of soft and three quarters of its mean: (.99, 1.23, 1.06)
    evidential   evidence (.69, 2.13, 1.31), S = 7.13, uncertainty 3/7.13: factors (.71, 1.31, .97), mean 1
    uniform      (1.09, 1.09, 1.09)
    random       soft's factors, but of other tokens

All are computed in float32 at least and outside autocast, because half precision cannot tell small beliefs apart.
A learned rival has few parameters of its own, so every rival leaves the rest of the model as it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priorclip.model.belief_config import BeliefConfig
from priorclip.model.encoders.vision import grid_of
from priorclip.model.localization import cell_shares
from priorclip.model.networks.belief import affinity, float32_at_least, soft_weights


def build_rival(config: BeliefConfig, width: int) -> nn.Module | None:
    """Returns the rival of soft belief that the options ask for; None for soft, hard and none.

    Args:
        config: its ``mode`` chooses
        width: d, the width of tokens and instruction
    """
    if config.mode == "given":
        return ToldBelief(config.given)
    if config.mode == "dropout":
        return DropoutBelief(width, config.draws, config.dropout)
    if config.mode in LEARNED:
        return LEARNED[config.mode](width)
    return PLAIN[config.mode]() if config.mode in PLAIN else None


class AttentionPooling(nn.Module):
    """Factor of token l: L softmax over l of <F_l, q>/sqrt(d), with a learned query q. The instruction plays no part.

    Source: the attention of a single learned query, as in Set Transformer's pooling (Lee et al. 2019,
    arXiv 1810.00825), with one head and no projections.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), mean 1 over the tokens."""
        scores = affinity(tokens, self.query.expand(len(tokens), -1)) / math.sqrt(tokens.shape[-1])
        return tokens.shape[1] * scores.softmax(dim=-1)


class LearnedGate(nn.Module):
    """Factor of token l: sigmoid(<W F_l, V f>/sqrt(d) + b), with W, V and b of its own.

    Source: the gate of Attention U-Net (Oktay et al. 2018, arXiv 1804.03999), with a product in place of the sum.
    """

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Linear(width, width, bias=False)
        self.instruction = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), each between 0 and 1."""
        scores = affinity(self.token(tokens), self.instruction(instruction)) / math.sqrt(tokens.shape[-1])
        return torch.sigmoid(scores + self.bias)


class EntropyBelief(nn.Module):
    """Soft belief, tempered by its entropy H: c soft + (1 - c) mean(soft), with c = 1 - H(M)/log L.

    An instruction that is sure of one token gives soft belief. If it believes in all tokens alike, all factors are the
    same.
    """

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), the mean of soft belief's factors."""
        soft = soft_weights(tokens, instruction)
        log_belief = affinity(tokens, instruction).log_softmax(dim=-1)
        entropy = -(log_belief.exp() * log_belief).sum(dim=-1, keepdim=True)
        sure = 1 - entropy / math.log(max(2, tokens.shape[1]))
        return sure * soft + (1 - sure) * soft.mean(dim=-1, keepdim=True)


class DropoutBelief(nn.Module):
    """Factor of token l: mean over deviation of its belief M_l, when channels of the instruction are dropped T times.

        r_l = mean_t(M_tl) / sqrt(var_t(M_tl) + (0.01/L)^2)        factor: L r_l / sum of r

    A token whose belief hangs on few channels counts little. The small term keeps a token without any belief at a
    factor near 0. Training draws anew in each step. Evaluation always drops the same channels, so that an image has one
    embedding.

    Source: Monte Carlo dropout (Gal and Ghahramani 2016, arXiv 1506.02142).
    """

    def __init__(self, width: int, draws: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        kept = torch.rand(draws, 1, width, generator=torch.Generator().manual_seed(0)) >= dropout
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), mean 1 over the tokens."""
        beliefs = torch.stack([affinity(tokens, draw).softmax(dim=-1) for draw in self.draw(instruction)])
        tiny = 0.01 / tokens.shape[1]
        ratio = beliefs.mean(0) * (beliefs.var(0) + tiny**2).rsqrt()
        return tokens.shape[1] * ratio / ratio.sum(dim=-1, keepdim=True)

    def draw(self, instruction: Tensor) -> Tensor:
        """Returns the instruction (B, d) with channels dropped, (T, B, d)."""
        kept: Tensor = self.kept  # type: ignore[assignment]
        repeated = instruction.expand(len(kept), -1, -1)
        if self.training:
            return F.dropout(repeated, self.dropout)
        return repeated * kept.to(instruction.dtype) / (1 - self.dropout)


class EvidentialBelief(nn.Module):
    """Factor of token l: L e_l/S + L/S, with evidence e_l = softplus(<F_l, f>) and S = L + the sum of e.

    The e_l + 1 are the parameters of a Dirichlet distribution over tokens, e_l/S is the belief mass of a token, and L/S
    is the uncertainty, which all tokens share. Without evidence each factor is 1.

    Source: evidential deep learning (Sensoy et al. 2018, arXiv 1806.01768), with tokens in place of classes.
    """

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), mean 1 over the tokens."""
        evidence = F.softplus(affinity(tokens, instruction))
        length = tokens.shape[1]
        return length * (evidence + 1) / (evidence.sum(dim=-1, keepdim=True) + length)


class RandomBelief(nn.Module):
    """A control: soft belief's factors, but of other tokens.

    Training shuffles them anew for each image in each step. Evaluation uses one order for all images, so that an image
    has one embedding.
    """

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), soft belief's factors in another order."""
        soft = soft_weights(tokens, instruction)
        if self.training:
            return soft.gather(1, torch.rand_like(soft).argsort(dim=-1))
        return soft[:, scattered(soft.shape[1])]


class UniformBelief(nn.Module):
    """A control: each token has the mean of soft belief's factors, (1 + sum over r of 1/sqrt(r))/L."""

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d), instruction (B, d) -> (B, L), all equal."""
        length = tokens.shape[1]
        mean = (1 + sum(rank**-0.5 for rank in range(1, length + 1))) / length
        return torch.full(tokens.shape[:2], mean, dtype=float32_at_least(tokens), device=tokens.device)


class GivenBelief(nn.Module):
    """Soft belief of a map that is known from elsewhere, for a model that was trained with a belief of its own.

    ``shares`` (B, L) is set before each batch; `factors_of` weights the tokens by it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shares = torch.zeros(0)

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d) -> (B, L). Raises ValueError if ``shares`` is not (B, L)."""
        if self.shares.shape != tokens.shape[:2]:
            raise ValueError(f"a belief of shape {(*self.shares.shape,)} is given to tokens {(*tokens.shape[:2],)}")
        return factors_of(self.shares.to(tokens.device, float32_at_least(tokens)))


class ToldBelief(nn.Module):
    """Soft belief of a map that comes with each image, in training too: an experiment (`belief.mode given`).

    ``masks`` (B, H, W), uint8 or float in [0, 1], is set before each batch and taken away after it. Noise needs none:
    training draws it anew in each step, and evaluation gives all images the same, so that an image has one embedding.

    Args:
        given: mask, complement or noise
    """

    def __init__(self, given: str) -> None:
        super().__init__()
        self.given = given
        self.masks: Tensor | None = None

    def forward(self, tokens: Tensor, instruction: Tensor) -> Tensor:
        """tokens (B, L, d) -> (B, L). Raises ValueError if images come without the masks that are needed."""
        dtype, (batch, length) = float32_at_least(tokens), tokens.shape[:2]
        if self.given == "noise":
            if self.training:
                return factors_of(torch.rand(batch, length, dtype=dtype, device=tokens.device))
            places = torch.tensor(scattered(length), dtype=dtype, device=tokens.device)
            return factors_of((places / length).expand(batch, -1))
        if tokens.device.type == "meta":  # FLOPs and parameters are counted without images
            return tokens.new_ones(batch, length, dtype=dtype)
        if self.masks is None or len(self.masks) != batch:
            raise ValueError(
                f"the belief of this model is given (belief.mode given, {self.given}): it takes images with their "
                "masks only, as a training on shards with masks does. The report.json of its training has its recall"
            )
        shares = share_of_tokens(self.masks, grid_of(length)).to(dtype)
        return factors_of(shares if self.given == "mask" else 1 - shares)


def share_of_tokens(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns the mean of masks (B, H, W), uint8 or float in [0, 1], in each place of a grid (h, w), (B, h*w)."""
    values = masks.double() / 255 if masks.dtype == torch.uint8 else masks.double()
    return cell_shares(values, grid).flatten(1)


def factors_of(shares: Tensor) -> Tensor:
    """Returns the factors of soft belief, (B, L), whose belief is a map of shares (B, L).

        M_l = s_l / sum of s        factor: M_l + mean of 1/sqrt(R) over the ranks that the tokens of equal s share

    Tokens of equal s have nearly the same factor: the difference of 1e-6 lets hard belief, which must choose, take them
    from all over the image. Without any share all tokens are believed in alike.
    """
    length = shares.shape[1]
    total = shares.sum(dim=-1, keepdim=True)
    belief = torch.where(total > 0, shares / total.clamp(min=1e-12), 1 / length)
    places = torch.tensor(scattered(length), device=shares.device).argsort() / length
    return belief + shared_ranks(shares) + 1e-6 * places


def shared_ranks(scores: Tensor) -> Tensor:
    """Returns 1/sqrt(R), R the rank in each row of scores (B, L); equal scores share the mean over their ranks."""
    higher = (scores[:, None, :] > scores[:, :, None]).sum(-1)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    sums = torch.cat([ranks.new_zeros(1), ranks.rsqrt().cumsum(0)])
    return (sums[higher + equal] - sums[higher]) / equal


def scattered(length: int) -> list[int]:
    """Returns the numbers below ``length`` in an order that looks random and is always the same (Knuth's hash)."""
    return sorted(range(length), key=lambda place: (place + 1) * 2654435761 % 2**32)


LEARNED: dict[str, type[nn.Module]] = {"attention": AttentionPooling, "gate": LearnedGate}
PLAIN: dict[str, type[nn.Module]] = {
    "entropy": EntropyBelief,
    "evidential": EvidentialBelief,
    "random": RandomBelief,
    "uniform": UniformBelief,
}
