"""One text query over a large index: processor and wall time of ours, of a float32 copy, and of one read of the memory.

    python -m benchmarks.search [--images 100000 1000000] [--width 512] [--k 24] [--threads 2]

``copy`` is how we searched before: a float32 copy of 262,144 embeddings at a time. ``float16`` is torch's product of
the stored values alone, without the best rows and not exact. ``read`` adds up the same bytes. The four take turns. The
embeddings are random, with a query near one of them; our hits are compared with those of the copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from priorclip.retrieval.nearest_rows import nearest_rows

COPIED = 1 << 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, width {options.width}, k {options.k}, median of {options.runs} runs")
    print("ms of processor time (wall)")
    for count in options.images:
        measure(count, options)


def measure(count: int, options: argparse.Namespace) -> None:
    embeddings, query = draw(count, options.width)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: nearest_rows(embeddings, query, options.k),
        "copy": lambda: with_copies(embeddings, query, options.k),
        "float16": lambda: torch.mv(embeddings, query.half()),
        "read": lambda: embeddings.view(torch.int64).sum(),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(options.runs + 1):
        for name, way in ways.items():
            begun = time.process_time(), time.perf_counter()
            way()
            if turn:  # the first warms up
                spent[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    found = {name: [1000 * statistics.median(column) for column in zip(*each)] for name, each in spent.items()}
    cells = ", ".join(f"{name} {cpu:.0f} ({wall:.0f})" for name, (cpu, wall) in found.items())
    same = nearest_rows(embeddings, query, options.k)[1] == with_copies(embeddings, query, options.k)[1]
    ours = found["ours"][0]
    print(f"{count:>9,}: {cells}; copy / ours {found['copy'][0] / ours:.1f}, ours / float16 "
          f"{ours / found['float16'][0]:.2f}, same hits: {same}", flush=True)  # fmt: skip


def draw(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float16 embeddings (count, width), which share a direction as those of a model do, and a query."""
    made = torch.Generator().manual_seed(0)
    shared = torch.randn(width, generator=made)
    embeddings = torch.empty(count, width, dtype=torch.float16)
    for start in range(0, count, 50_000):
        rows = torch.randn(min(50_000, count - start), width, generator=made) + 0.5 * shared
        embeddings[start : start + len(rows)] = torch.nn.functional.normalize(rows, dim=1)
    query = embeddings[count // 2].float() + 0.1 * torch.randn(width, generator=made)
    return embeddings, torch.nn.functional.normalize(query, dim=0)


def with_copies(embeddings: torch.Tensor, query: torch.Tensor, k: int) -> tuple[list[float], list[int]]:
    best: list[tuple[float, int]] = []
    for start in range(0, len(embeddings), COPIED):
        values, rows = (embeddings[start : start + COPIED].float() @ query).topk(min(k, len(embeddings) - start))
        best = sorted([*best, *zip((-values).tolist(), (rows + start).tolist(), strict=True)])[:k]
    return [-score for score, _ in best], [row for _, row in best]


if __name__ == "__main__":
    main()
