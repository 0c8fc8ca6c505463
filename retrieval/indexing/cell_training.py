"""Makes the cells of an index (cells.py) and measures what a search in them finds.

    cells = make_cells(embeddings, queries, "captions", target=0.95)
    cells.about["probes"], cells.about["recall_at_10"]         (24, 0.962)

faiss finds the centres by spherical k-means over a sample, with a fixed seed. Of the queries, every second one chooses
``probes``: the fewest cells with which the target is met, with a margin of one standard error. The others are held out,
and the recall over them is stored. Captions are the honest queries, because texts lie elsewhere than images. Without
captions, stored rows are turned by noise to a cosine of 0.8 with themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from priorclip.common.output import get_logger
from priorclip.common.progress import counted
from priorclip.retrieval.indexing.cells import LOOKED_AT, Cells, nearest_centres
from priorclip.retrieval.nearest_rows import CHUNK, nearest_of, products

log = get_logger(__name__)

CELLS_PER_ROOT, MOST_CELLS = 8, 4096  # cells for each square root of the rows
FEWEST_IN_CELL = 8  # rows, on average, in a small index
TRAINED_PER_CELL, ROUNDS = 25, 5  # rows of the sample, and rounds of k-means
QUERIES = 512  # half of them are held out
FEWEST_QUERIES = 64  # with fewer captions, noisy rows are used
NOISE = 0.75  # length of the noise beside a row of length 1: their cosine is 0.8
BEST = 10  # the 10 of recall@10
GROWN = 1.5  # after that growth the centres are found again
CAPTIONS, NOISY_ROWS = "captions", "noisy rows"
ROUNDING = 1e-5  # of products of float32 vectors of length 1


def require_faiss(why: str) -> None:
    """Raises ValueError, which says what to install, if faiss is missing."""
    if find_spec("faiss") is None:
        raise ValueError(f"{why} needs faiss: pip install 'priorclip-pretraining[millions]'")


def make_cells(embeddings: Tensor, queries: Tensor | None, kind: str, target: float) -> Cells:
    """Returns the cells of embeddings (N, d), with the recall that they give.

    Args:
        queries: (Q, d); None takes noisy rows
        kind: what the queries are
        target: recall@10 that ``probes`` is chosen for

    Raises ValueError if faiss is missing.
    """
    if queries is None or len(queries) < FEWEST_QUERIES:
        queries, kind = noisy_rows(embeddings), NOISY_ROWS
    count = len(embeddings)
    cells = max(1, min(MOST_CELLS, int(CELLS_PER_ROOT * count**0.5), count // FEWEST_IN_CELL))
    log.info("approximate search: finding %d cells for %d images", cells, count)
    centres = find_centres(embeddings, cells)
    about = {"cells": cells, "probes": 1, "target": target, "queries": kind, "trained_on": count}
    assigned = Cells.of(centres, nearest_centres(centres, embeddings), queries.half().contiguous(), about)
    return measured(assigned, embeddings)


def find_centres(embeddings: Tensor, cells: int) -> Tensor:
    """Returns the centres (cells, d) float32 of length 1 that k-means of faiss finds in a sample, with a fixed seed."""
    require_faiss("an approximate index")
    import faiss

    count = len(embeddings)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[: TRAINED_PER_CELL * cells])
    sample = embeddings[torch.from_numpy(chosen)].float().nan_to_num_().numpy()
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": TRAINED_PER_CELL}
    means = faiss.Kmeans(sample.shape[1], cells, niter=ROUNDS, seed=0, spherical=True, **limits)
    means.train(sample)
    return torch.from_numpy(np.array(means.centroids, np.float32).reshape(cells, -1))


def measured(cells: Cells, embeddings: Tensor) -> Cells:
    """Returns the cells with ``probes`` for the target, and the recall over the queries that are held out."""
    choosing, held_out = cells.queries[::2].float(), cells.queries[1::2].float()
    held_out = held_out if len(held_out) else choosing  # an index of one image
    _, best = best_rows(embeddings, choosing)
    probes = fewest_probes(cells, choosing, best)
    found = replace(cells, about=cells.about | {"probes": probes, "held_out": len(held_out)})
    recall = round(recall_of(found, embeddings, held_out), 4)
    log.info("approximate search: %d of %d cells, recall@10 %.3f over %d %s", probes, len(cells.ends), recall,
             len(held_out), cells.about["queries"])  # fmt: skip
    return replace(found, about=found.about | {"recall_at_10": recall})


def changed(cells: Cells, embeddings: Tensor) -> Cells:
    """Returns cells of an index that has changed: measured again, or made again if it has grown much since.

    Args:
        cells: that have the rows of the changed index
        embeddings: (N, d) of the changed index
    """
    grown = len(embeddings) >= GROWN * cells.about["trained_on"]
    if grown and find_spec("faiss") is not None:
        return make_cells(embeddings, cells.queries.float(), cells.about["queries"], cells.about["target"])
    if grown:
        log.warning("the index has grown much, and without faiss its cells stay those of fewer images")
    return measured(cells, embeddings)


def noisy_rows(embeddings: Tensor) -> Tensor:
    """Returns stored rows with noise (Q, d) float32, drawn with a fixed seed. Their cosine with the row is 0.8."""
    drawn = np.random.default_rng(1)
    chosen = np.sort(drawn.permutation(len(embeddings))[:QUERIES])
    rows = embeddings[torch.from_numpy(chosen)].float().nan_to_num_()
    noise = torch.from_numpy(drawn.standard_normal(rows.shape, np.float32))
    return normalize(rows + NOISE * normalize(noise, dim=1), dim=1)


def evenly(texts: Sequence[str]) -> list[str]:
    """Returns up to ``QUERIES`` different texts, at even distances."""
    different = list(dict.fromkeys(text for text in texts if text.strip()))
    return different[:: max(1, -(-len(different) // QUERIES))]


def best_rows(embeddings: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the highest products (Q, 10) of each query (Q, d) and their rows, by comparing all embeddings."""
    scores = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in counted(range(0, len(embeddings), CHUNK), "exact answers of the queries", "part"):
        found = queries @ embeddings[start : start + CHUNK].float().nan_to_num_().T
        values, places = found.topk(min(BEST, found.shape[1]))
        scores, rows = torch.cat([scores, values], 1), torch.cat([rows, places + start], 1)
        scores, kept = scores.topk(min(BEST, scores.shape[1]))
        rows = rows.gather(1, kept)
    return scores, rows


def fewest_probes(cells: Cells, queries: Tensor, best: Tensor) -> int:
    """Returns the fewest cells that hold the target's share of the best rows (Q, 10) of the queries (Q, d).

    The mean over the queries, less its standard error, meets the target: it is to hold for other queries too.
    """
    cell = torch.from_numpy(cells.cell_of_rows())
    order = (queries @ cells.centres.T).argsort(stable=True, dim=1, descending=True)
    place = order.argsort(dim=1)  # of each cell, 0 for the one nearest to the query
    sizes = torch.from_numpy(cells.sizes)[order].cumsum(1)
    least = (sizes < LOOKED_AT * BEST).sum(1, keepdim=True)  # cells that are looked into anyway, less one
    needed = place.gather(1, cell[best])
    needed = torch.where(needed <= least, 0, needed)
    for probes in (needed.unique() + 1).tolist():
        found = (needed < probes).double().mean(1)
        if found.mean() - found.std(correction=0) / len(found) ** 0.5 >= cells.about["target"]:
            return int(probes)
    return len(cells.ends)


def recall_of(cells: Cells, embeddings: Tensor, queries: Tensor) -> float:
    """Returns the share of the ten best rows that a search in the cells finds. An equally good row counts too.

    Args:
        cells: of the embeddings
        embeddings: (N, d)
        queries: (Q, d)
    """
    scores, _ = best_rows(embeddings, queries)
    found = 0
    for query, best in zip(queries, scores, strict=True):
        _, rows = nearest_of(embeddings, query, len(best), cells.candidates(query, BEST))
        values = products(embeddings[torch.tensor(rows)].nan_to_num(), query)
        found += int((values >= best[-1].clamp(-1, 1) - ROUNDING).sum())
    return found / max(1, scores.numel())
