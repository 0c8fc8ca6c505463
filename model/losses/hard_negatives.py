"""Contrastive loss in which negatives that are hard to tell from the positive weigh more.

    w_ij  = n_i exp(beta S_ij) / sum over negatives k of exp(beta S_ik)       n_i negatives of row i; the mean of w is 1
    row_i = log(sum over positives of exp S_ij + sum over negatives of w_ij exp S_ij) - mean over positives of S_ij

With H = logsumexp over negatives of (1 + beta) S, Z = logsumexp over negatives of beta S, the weighted sum is
n exp(H - Z). So three sums and a count for each row and column replace the one of `SymmetricCrossEntropy`, in the same
blocks, and the gradient passes through the weights too. beta = 0 gives the plain loss.

Source: arXiv 2010.04592 (Robinson et al., equation 4 with tau+ = 0), as HN-NCE in DiHT, arXiv 2301.02280.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from priorclip.model.losses.gather import gather_integers, log_sum_over_ranks, own_share, sum_over_ranks
from priorclip.model.losses.pairs import Pairs, positive_means, subtract_positives
from priorclip.model.losses.similarity_blocks import log_sum, similarity_blocks


class LogSums:
    """Running sums of some rows or columns: of the positives, of the negatives (H and Z), and the negatives' number.

    Args:
        like: gives dtype and device
        size: number of rows or columns
        beta: strength of the weights
    """

    def __init__(self, like: Tensor, size: int, beta: float) -> None:
        self.beta = beta
        self.positive, self.hard, self.weights = (like.new_full((size,), -torch.inf) for _ in range(3))
        self.count = like.new_zeros(size)

    def add(self, place: slice, dim: int, logits: Tensor, positive: Tensor, negative: Tensor, spare: Tensor) -> None:
        """Adds a block of logits (b, n) along ``dim``; positive and negative (b, n) say what its entries are."""
        low = torch.finfo(logits.dtype).min
        for total, factor, among in (
            (self.positive, 1.0, positive),
            (self.hard, 1 + self.beta, negative),
            (self.weights, self.beta, negative),
        ):
            chosen = (factor * logits).masked_fill_(~among, low)
            total[place] = torch.logaddexp(total[place], log_sum(chosen, dim, spare))
        self.count[place] += negative.sum(dim)

    def over_ranks(self) -> None:
        """Adds the sums of all ranks. A NaN of one rank reaches all."""
        self.positive, self.hard, self.weights = map(log_sum_over_ranks, (self.positive, self.hard, self.weights))
        self.count = sum_over_ranks(self.count)

    @cached_property
    def negatives(self) -> Tensor:
        """log(n exp(H - Z)), once all blocks are added; very low without negatives."""
        none = self.count == 0
        return (self.count.log() + self.hard - self.weights).masked_fill(none, torch.finfo(self.hard.dtype).min)

    @cached_property
    def total(self) -> Tensor:
        """The log of the sum over positives and weighted negatives, once all blocks are added."""
        return torch.logaddexp(self.positive, self.negatives)

    def slope(self, place: slice, dim: int, logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Returns the derivative of ``total`` in the logits of a block, (b, n)."""

        def spread(x: Tensor) -> Tensor:
            return x[place].unsqueeze(dim)

        share = (spread(self.negatives) - spread(self.total)).exp_()
        slope = (logits - spread(self.total)).exp_().masked_fill_(~positive, 0)
        hard = ((1 + self.beta) * logits - spread(self.hard)).exp_().mul_(1 + self.beta)
        hard -= (self.beta * logits - spread(self.weights)).exp_().mul_(self.beta)
        return slope.add_(hard.mul_(share).masked_fill_(~negative, 0))


class HardNegativeCrossEntropy(torch.autograd.Function):
    """As `SymmetricCrossEntropy`, with weighted negatives.

    rows (B, d) of this rank, columns (N, d) of all ranks, scale (), pairs, side of the square blocks, beta -> the
    losses of this rank's rows (B,) and of its columns (B,)
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, side: int, beta: float
    ) -> tuple[Tensor, Tensor]:
        scaled = scale * rows
        of_rows, of_columns = LogSums(rows, len(rows), beta), LogSums(rows, len(columns), beta)
        for i, j, logits, spare in similarity_blocks(scaled, columns, side):
            positive, negative = kinds(pairs, i, j)
            of_rows.add(i, 1, logits, positive, negative, spare)
            of_columns.add(j, 0, logits, positive, negative, spare)
        of_columns.over_ranks()
        row_positive, column_positive = positive_means(scaled, columns, pairs)
        ctx.save_for_backward(rows, columns, scale)
        ctx.of_rows, ctx.of_columns, ctx.pairs, ctx.side = of_rows, of_columns, pairs, side
        return of_rows.total - row_positive, own_share(of_columns.total - column_positive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, scale = ctx.saved_tensors
        by_row, by_column = gradients[0].contiguous(), gather_integers(gradients[1].contiguous())
        scaled = scale * rows
        into_rows, into_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for i, j, logits, _ in similarity_blocks(scaled, columns, ctx.side):
            positive, negative = kinds(ctx.pairs, i, j)
            slope = ctx.of_rows.slope(i, 1, logits, positive, negative).mul_(by_row[i, None])
            slope += ctx.of_columns.slope(j, 0, logits, positive, negative).mul_(by_column[None, j])
            into_rows[i].addmm_(slope, columns[j])
            into_columns[j].addmm_(slope.T, scaled[i])
        subtract_positives(into_rows, into_columns, scaled, columns, ctx.pairs, by_row, by_column)
        into_scale = torch.linalg.vecdot(into_rows, rows).sum()
        return into_rows.mul_(scale), into_columns, into_scale, None, None, None


def kinds(pairs: Pairs, i: slice, j: slice) -> tuple[Tensor, Tensor]:
    """Returns which entries of a block are positives and which are negatives, each (b, n); ignored ones are neither."""
    positive, ignored = pairs.positive(i, j), pairs.ignored(i, j)
    return positive, ~positive if ignored is None else ~(positive | ignored)
