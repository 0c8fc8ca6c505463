"""Which image and text of a global batch belong together, for the losses that compare all pairs.

    image ids    4 4 7       the first two pairs show the same image: each is a positive of the other
    caption ids  1 2 2       pairs 1 and 2 have equal words, pair 2 another image: neither right nor wrong

            text 0   text 1   text 2
    image 0    +        +        -
    image 1    +        +      ignored
    image 2    -     ignored     +

RSICD is full of equal captions of different images ("many buildings are in a residential area"). Whether such a pair
is a negative or ignored is the option ``loss.equal_captions``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from priorclip.model.losses.gather import gather_integers, own_share, sum_over_ranks
from priorclip.model.losses.similarity_blocks import sum_by_group


@dataclass
class Pairs:
    """Groups and captions of this rank's B pairs and of the N pairs of all ranks.

    Args:
        rows: (B,) the image of each pair of this rank, integers in [0, N)
        columns: (N,) the image of each pair of all ranks
        counts: (N,) pairs of each image in the global batch, and 0 behind the last image: the number of images is a
            value on the device, and asking for it would make the processor wait for the device
        row_captions: (B,) equal integers for equal captions; None: pairs with equal captions are negatives
        column_captions: (N,)
    """

    rows: Tensor
    columns: Tensor
    counts: Tensor
    row_captions: Tensor | None = None
    column_captions: Tensor | None = None

    def positive(self, i: slice, j: slice) -> Tensor:
        """Returns which entries of a block show the same image, (b, n)."""
        return self.rows[i, None] == self.columns[None, j]

    def ignored(self, i: slice, j: slice) -> Tensor | None:
        """Returns which entries of a block are no positives and have equal captions, (b, n). None: none is ignored."""
        if self.row_captions is None or self.column_captions is None:
            return None
        return (self.row_captions[i, None] == self.column_captions[None, j]) & ~self.positive(i, j)


def pairs_of(image_ids: Tensor, caption_ids: Tensor | None = None) -> Pairs:
    """Returns the pairs of all ranks from the ids of this rank, each (B,). B is the same on all ranks."""
    columns, counts = number_groups(gather_integers(image_ids))
    pairs = Pairs(own_share(columns), columns, counts)
    if caption_ids is not None:
        pairs.row_captions, pairs.column_captions = caption_ids, gather_integers(caption_ids)
    return pairs


def number_groups(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the distinct ids (N,) by size, as ``unique`` does, in tensors whose shapes do not depend on values.

    Returns:
        the number of each id (N,), and how often each number occurs (N,), 0 behind the last one
    """
    values, order = ids.sort()
    is_first = torch.zeros_like(values)
    is_first[1:] = values[1:] != values[:-1]
    numbers = torch.empty_like(values).scatter_(0, order, is_first.cumsum(0))
    return numbers, torch.zeros_like(values).scatter_add_(0, numbers, torch.ones_like(values))


def leave_out(logits: Tensor, ignored: Tensor | None) -> None:
    """Makes ignored entries (b, n) of a block so low that their exponential is 0, in place."""
    if ignored is not None:
        logits.masked_fill_(ignored, torch.finfo(logits.dtype).min)


def positive_means(scaled: Tensor, columns: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Returns the mean logit over the positives of each row (B,) and, over all ranks, of each column (N,).

    The mean is linear in the features. So it needs sums by image (N, d) and not the matrix.
    """
    counts = pairs.counts.clamp(min=1).to(scaled.dtype)[:, None]
    means = sum_by_group(pairs.columns, columns, len(counts)) / counts
    of_rows = (means[pairs.rows].mul_(scaled)).sum(1)
    del means
    means = sum_by_group(pairs.rows, scaled, len(counts)) / counts  # of this rank
    return of_rows, sum_over_ranks((means[pairs.columns].mul_(columns)).sum(1))


def subtract_positives(
    into_rows: Tensor,
    into_columns: Tensor,
    scaled: Tensor,
    columns: Tensor,
    pairs: Pairs,
    by_row: Tensor,
    by_column: Tensor,
) -> None:
    """Subtracts the gradient of `positive_means`, times by_row (B,) and by_column (N,), in place."""
    count, share = len(pairs.counts), (1 / pairs.counts.clamp(min=1).to(scaled.dtype))[:, None]
    into_rows -= (sum_by_group(pairs.columns, columns, count) * share)[pairs.rows].mul_(by_row[:, None])
    into_rows -= (sum_by_group(pairs.columns, columns * by_column[:, None], count) * share)[pairs.rows]
    into_columns -= (sum_by_group(pairs.rows, scaled, count) * share)[pairs.columns].mul_(by_column[:, None])
    into_columns -= (sum_by_group(pairs.rows, scaled * by_row[:, None], count) * share)[pairs.columns]


def hash_tokens(input_ids: Tensor) -> Tensor:
    """Returns an integer for each text (B,) from its padded token ids (B, T): equal texts have equal ones.

    The sum of the tokens, each times a random odd number of its place, modulo 2^64. Two different texts get the same
    integer with a probability of about 2^-63.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (input_ids.shape[1],), generator=generator) * 2 + 1
    return (input_ids.long() * factors.to(input_ids.device)).sum(1)
