"""Text queries over a large index: ours, exact and approximate, beside faiss and usearch used directly.

    python -m benchmarks.search [--images 100000 1000000] [--width 512] [--k 10] [--threads 2] [--hnsw 100000]

Exact: ours (nearest_rows.py), faiss's flat index of float16, usearch's exact search on the same float16 values.
Approximate: ours (indexing/cells.py), faiss's inverted file with the same centres and ``nprobe`` and a float16 copy of
the embeddings in its lists, usearch's HNSW for at most ``--hnsw`` images, because building it takes long.

The ways take turns. One client asks one query after the other; sixteen are threads of one process that ask at the same
time. A figure is the median over the runs of milliseconds a query: wall, and processor time of all threads in brackets.
Embeddings are drawn around 3,000 points in 64 dimensions, with noise in all and a shared direction; queries lie around
the same points, with another shared direction, as texts do. Recall@10 is compared with a product in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from usearch.index import Index, search

from priorclip.retrieval.indexing.cell_training import QUERIES, best_rows, make_cells
from priorclip.retrieval.indexing.cells import Cells
from priorclip.retrieval.nearest_rows import nearest_of, nearest_rows

Way = Callable[[Tensor], Sequence[int]]  # a query (d,) -> rows of its hits
CLIENTS = (1, 16)
DRAWN = 50_000  # rows that are drawn, or copied to float32, at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--queries", type=int, default=32, help="queries of a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hnsw", type=int, default=100_000, help="most images for usearch's HNSW")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    print(f"{options.threads} threads, width {options.width}, k {options.k}, median of {options.runs} runs of "
          f"{options.queries} queries; ms a query: wall (processor)", flush=True)  # fmt: skip
    for count in options.images:
        embeddings, queries = draw(count, options.width, options.queries + QUERIES)
        measure(f"{count:,} exact", exact_ways(embeddings, options.k), embeddings, queries[: options.queries], options)
        ways = approximate_ways(embeddings, queries[options.queries :], options)
        measure(f"{count:,} approximate", ways, embeddings, queries[: options.queries], options)


def exact_ways(embeddings: Tensor, k: int) -> dict[str, Way]:
    stored = embeddings.numpy()
    flat = faiss.IndexScalarQuantizer(stored.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for part in embeddings.split(DRAWN):
        flat.add(part.float().numpy())
    return {
        "ours": lambda query: nearest_rows(embeddings, query, k)[1],
        "faiss": lambda query: flat.search(query.numpy()[None], k)[1][0].tolist(),
        "usearch": lambda query: search(stored, query.half().numpy(), k, "ip", exact=True).keys.tolist(),
    }


def approximate_ways(embeddings: Tensor, captions: Tensor, options: argparse.Namespace) -> dict[str, Way]:
    k = options.k
    cells, cpu, wall = timed(lambda: make_cells(embeddings, captions, "captions", 0.95))
    print(
        f"{len(embeddings):,}: ours is made in {cpu:.0f} s of processor time ({wall:.0f} s), {cells.about}", flush=True
    )
    inverted, cpu, wall = timed(lambda: faiss_of(cells, embeddings))
    print(f"{len(embeddings):,}: faiss is filled in {cpu:.0f} s ({wall:.0f} s), with our centres and cells", flush=True)
    ways: dict[str, Way] = {
        "ours": lambda query: nearest_of(embeddings, query, k, cells.candidates(query, k))[1],
        "faiss": lambda query: inverted.search(query.numpy()[None], k)[1][0].tolist(),
    }
    if len(embeddings) <= options.hnsw:
        graph = Index(ndim=embeddings.shape[1], metric="ip", dtype="f16", connectivity=16)
        rows = np.arange(len(embeddings))
        _, cpu, wall = timed(lambda: graph.add(rows, embeddings.numpy(), threads=options.threads))
        print(f"{len(embeddings):,}: usearch's HNSW is made in {cpu:.0f} s ({wall:.0f} s)", flush=True)
        ways["usearch"] = lambda query: graph.search(query.half().numpy(), k).keys.tolist()
    return ways


def faiss_of(cells: Cells, embeddings: Tensor) -> Any:
    """Returns faiss's inverted file with the centres, cells and probes of ours."""
    width = embeddings.shape[1]
    centres = faiss.IndexFlatIP(width)
    centres.add(cells.centres.numpy())
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(
        centres, width, len(cells.ends), kind, faiss.METRIC_INNER_PRODUCT, False
    )  # False: whole vectors, no residuals
    index.is_trained = True
    own = cells.cell_of_rows()
    for start in range(0, len(embeddings), DRAWN):
        part = embeddings[start : start + DRAWN].float().numpy()
        cell = np.ascontiguousarray(own[start : start + DRAWN])
        index.add_core(len(part), faiss.swig_ptr(part), None, faiss.swig_ptr(cell))
    index.nprobe = cells.about["probes"]
    return index


def measure(title: str, ways: dict[str, Way], embeddings: Tensor, queries: Tensor, options: argparse.Namespace) -> None:
    """Prints a line for each number of clients."""
    _, best = best_rows(embeddings, queries)
    recall = {name: recall_of(way, queries, best) for name, way in ways.items()}  # it also warms up
    for clients in CLIENTS:
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        with ThreadPoolExecutor(clients) as pool:
            for _ in range(options.runs):
                for name, way in ways.items():
                    _, cpu, wall = timed(lambda way=way: list(pool.map(way, queries)))  # type: ignore[misc]
                    spent[name].append((cpu, wall))
        cells = []
        for name, each in spent.items():
            cpu, wall = (1000 * statistics.median(column) / len(queries) for column in zip(*each, strict=True))
            ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in zip(each, spent["ours"], strict=True))
            cells.append(f"{name} {wall:.2f} ({cpu:.2f}, {ratio:.2f} of ours) recall {recall[name]:.3f}")
        print(f"{title}, {clients} clients: {'; '.join(cells)}", flush=True)


def recall_of(way: Way, queries: Tensor, best: Tensor) -> float:
    found = sum(
        len(set(way(query)[: best.shape[1]]) & set(rows)) for query, rows in zip(queries, best.tolist(), strict=True)
    )
    return found / best.numel()


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Returns what it returns, and seconds of processor time and of the wall."""
    begun = time.process_time(), time.perf_counter()
    found = work()
    return found, time.process_time() - begun[0], time.perf_counter() - begun[1]


def draw(count: int, width: int, asked: int) -> tuple[Tensor, Tensor]:
    """Returns float16 embeddings (count, width), and queries (asked, width) float32."""
    made = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.3, 64)[:, None]
    basis = torch.linalg.qr(torch.randn(width, 64, generator=made))[0].T * scale
    points = torch.randn(3000, 64, generator=made)
    images, texts = 4 * normalize(torch.randn(2, width, generator=made), dim=1)

    def around(rows: int, spread: float, shared: Tensor) -> Tensor:
        near = points[torch.randint(len(points), (rows,), generator=made)]
        near = near + spread * torch.randn(rows, 64, generator=made)
        return normalize(near @ basis + 0.3 * torch.randn(rows, width, generator=made) + shared, dim=1)

    embeddings = torch.empty(count, width, dtype=torch.float16)
    for part in embeddings.split(DRAWN):
        part.copy_(around(len(part), 1.0, images))
    return embeddings, around(asked, 0.7, texts)


if __name__ == "__main__":
    main()
