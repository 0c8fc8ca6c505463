"""The similarity matrix in square blocks, so that no rank holds all of it, and sums that the losses share.

for i, j, logits, spare in similarity_blocks(rows, columns, side):
    row_log[i] = torch.logaddexp(row_log[i], log_sum(logits, 1, spare))
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SIDE = {"cpu": 4096}  # of a block: 64 MB in float32
SIDE_ON_GPU = 8192  # 256 MB: few kernel launches, each of them long


def similarity_blocks(rows: Tensor, columns: Tensor, side: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yields the products of rows (B, d) and columns (N, d) in blocks of at most (side, side).

    Each item is the slice of rows, the slice of columns, the products, and spare memory of the same shape. The next
    block reuses both memories.
    """
    height, width = min(side, len(rows)), min(side, len(columns))
    products, spare = rows.new_empty(height * width), rows.new_empty(height * width)
    for top in range(0, len(rows), side):
        block_rows = rows[top : top + side]
        for left in range(0, len(columns), side):
            block_columns = columns[left : left + side]
            shape = (len(block_rows), len(block_columns))
            size = shape[0] * shape[1]
            block = torch.mm(block_rows, block_columns.T, out=products[:size].view(shape))
            yield slice(top, top + side), slice(left, left + side), block, spare[:size].view(shape)


def log_sum(logits: Tensor, dim: int, spare: Tensor) -> Tensor:
    """Returns logsumexp along ``dim``; ``spare`` receives the exponentials. Not finite if a logit is not finite."""
    top = logits.amax(dim, keepdim=True)
    return torch.sub(logits, top, out=spare).exp_().sum(dim).log_().add_(top.squeeze(dim))


def sum_by_group(groups: Tensor, x: Tensor, count: int) -> Tensor:
    """Sums the rows of x (n, d) that have the same group (n,), integers in [0, count) -> (count, d)."""
    return x.new_zeros((count, x.shape[1])).index_add(0, groups, x)


def block_side(chunk: int | None, device: torch.device) -> int:
    """Returns ``chunk``, or the side that suits the device if it is None."""
    return chunk or SIDE.get(device.type, SIDE_ON_GPU)


def check_chunk(chunk: int | None) -> int | None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    return chunk


def widest_precision(*tensors: Tensor) -> list[Tensor]:
    """Converts all to the widest dtype among them, which is at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
