"""The rows of a matrix most similar to a query, exactly, for one read of the matrix in its own precision.

    values, rows = nearest_rows(embeddings, query, k=10)      # embeddings (N, d) float16, mapped from a file

float16 is compared as it is stored: a product in float16 takes a fourteenth of the time of a float32 copy. Its best
4 k rows are computed again in float64. They hold the true best k if the k-th of them is above the last of the 4 k by
more than a float16 product can be wrong. Otherwise four times as many rows are looked at, and in the end all.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GATHERED = 1 << 18  # rows that a search in a part of an index copies at once: 256 MiB at 512 values each
FEW = 4096  # chosen rows of which a float32 copy is faster
FEWEST = 64  # rows that are computed again
CHUNK = 1 << 14  # rows that are copied to float32 at once: 32 MiB at 512 values each
HALF_ULP = 2.0**-11  # relative, of float16
SUM_ERROR = 1e-5  # of a sum of up to thousands of float32 products, for vectors of length 1
SHARE = 8  # a full pass is faster than to look at more than an eighth of the rows


def nearest_rows(embeddings: Tensor, query: Tensor, k: int) -> tuple[list[float], list[int]]:
    """Returns the k highest products of rows of ``embeddings`` (N, d) with ``query`` (d,), and the rows, best first.

    Products are float32, limited to -1 to 1; of a row with NaN it is -1. Equal products are in the order of the rows.
    """
    query = query.float()
    k = min(k, len(embeddings))
    if embeddings.dtype != torch.float16:
        return all_rows(embeddings, query, k)
    short = query.half()
    rough = torch.mv(embeddings, short).float()
    count = max(4 * k, FEWEST)
    while k and count * SHARE <= len(embeddings):
        values, rows = rough.topk(count)
        kept = embeddings.index_select(0, rows)  # a tenth of the time of embeddings[rows]
        exact = products(kept, query)
        if is_complete(values, exact, kept, query, short, k):
            return best(exact, rows, k)
        count *= 4
    return all_rows(embeddings, query, k)


def nearest_of(embeddings: Tensor, query: Tensor, k: int, rows: NDArray[np.int64]) -> tuple[list[float], list[int]]:
    """Returns as ``nearest_rows``, of these rows only, which are in ascending order. It copies GATHERED at a time."""
    search = all_rows if len(rows) <= FEW else nearest_rows
    scores, found = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for start in range(0, len(rows), GATHERED):
        part = torch.from_numpy(rows[start : start + GATHERED])
        values, places = search(embeddings.index_select(0, part), query.float(), min(k, len(part)))
        scores, found = torch.cat([scores, torch.tensor(values)]), torch.cat([found, part[places]])
    return best(scores, found, min(k, len(found))) if len(found) else ([], [])


def is_complete(values: Tensor, exact: Tensor, kept: Tensor, query: Tensor, short: Tensor, k: int) -> bool:
    """Tells whether no row outside of ``kept`` can be among the best k.

    Args:
        values: float16 products of the kept rows, highest first
        exact: their exact products
        kept: the rows (n, d)
        query: (d,), and ``short``, its float16 copy
        k: number of rows that are wanted
    """
    longest = float(kept.float().norm(dim=1).amax())
    error = longest * float((query - short.float()).norm()) + HALF_ULP * float(values.abs().amax()) + SUM_ERROR
    if not float((values - exact).abs().amax()) <= error:  # the processor adds in another way, or a row is not finite
        return False
    return float(exact.topk(k).values[-1]) > float(values[-1]) + error


def all_rows(embeddings: Tensor, query: Tensor, k: int) -> tuple[list[float], list[int]]:
    """Compares every row in float32, through one small copy at a time."""
    if not k:
        return [], []
    copy = torch.empty(min(CHUNK, len(embeddings)), embeddings.shape[1])
    scores = torch.empty(len(embeddings))
    for start in range(0, len(embeddings), CHUNK):
        part = embeddings[start : start + CHUNK]
        whole = part if part.dtype == torch.float32 else copy[: len(part)].copy_(part)
        torch.mv(whole, query, out=scores[start : start + CHUNK])
    return best(scores.nan_to_num_(nan=-1).clamp_(-1, 1), torch.arange(len(scores)), k)


def products(rows: Tensor, query: Tensor) -> Tensor:
    """Returns products (n,) float32 of rows (n, d). Equal rows have equal ones, because each is added up alone."""
    return (rows.double() * query.double()).sum(1).float().clamp(-1, 1)


def best(scores: Tensor, rows: Tensor, k: int) -> tuple[list[float], list[int]]:
    """Returns the k highest scores and their rows; of equal scores the first rows."""
    last = scores.topk(k).values[-1]
    kept = scores >= last
    found = sorted(zip((-scores[kept]).tolist(), rows[kept].tolist(), strict=True))[:k]
    return [-score for score, _ in found], [row for _, row in found]
