"""Recall of large test sets: seconds and peak memory, compared with sorting the whole similarity matrix.

    python benchmarks/recall.py [--sizes 1000x5000 5000x25000 20000x100000] [--width 512]

``ours`` is model.recall.retrieval_metrics: float64, exact on ties, in blocks. ``matrix`` is the usual script: all
float32 similarities, sorted in both directions, and the rank of the first right answer. It runs up to --matrix-until
cells, and the figures are compared. Each has its own process; the result is the best of RUNS. Memory is the peak above
the memory of the features.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KS = (1, 5, 10)
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1000x5000", "5000x25000", "20000x100000"],
                        help="IMAGESxCAPTIONS")  # fmt: skip
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--runs", type=int, default=3, help="measurements of sizes up to a tenth of the largest; one of other sizes"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--matrix-until", type=float, default=2e8, help="largest number of similarities of the matrix")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure.split(":"), options)))
        return
    print(f"{options.threads} threads, width {options.width}")
    print(f"{'images':>8} {'captions':>9} {'ours':>9} {'peak':>9} {'matrix':>9} {'peak':>9} {'time':>7} {'memory':>7}")
    for size in options.sizes:
        images, captions = map(int, size.split("x"))
        ours = in_a_process("ours", size)
        cells = [f"{images:>8,} {captions:>9,} {ours['seconds']:>7.2f} s {ours['peak_mb']:>6,.0f} MB"]
        if images * captions <= options.matrix_until:
            peer = in_a_process("matrix", size)
            worst = max(abs(ours["figures"][name] - value) for name, value in peer["figures"].items())
            cells.append(
                f"{peer['seconds']:>7.2f} s {peer['peak_mb']:>6,.0f} MB {peer['seconds'] / ours['seconds']:>6.1f}x "
                f"{peer['peak_mb'] / ours['peak_mb']:>6.0f}x   figures differ by {worst:.4f} points at most"
            )
        print(" ".join(cells), flush=True)


def in_a_process(what: str, size: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", f"{what}:{size}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from priorclip.model.recall import retrieval_metrics

    torch.set_num_threads(options.threads)
    count, captions = map(int, size.split("x"))
    torch.manual_seed(0)
    index = torch.arange(captions) % count
    images = torch.nn.functional.normalize(torch.randn(count, options.width), dim=-1)
    texts = torch.nn.functional.normalize(images[index] + 0.25 * torch.randn(captions, options.width), dim=-1)
    run = retrieval_metrics if what == "ours" else matrix_metrics
    run(images[:50], texts[:50], index[:50])  # warm up
    Path("/proc/self/clear_refs").write_text("5")
    before, best = resident("VmRSS"), float("inf")
    for _ in range(options.runs if count * captions <= 2e8 else 1):
        begun = time.perf_counter()
        figures = run(images, texts, index)
        best = min(best, time.perf_counter() - begun)
    return {"seconds": best, "peak_mb": (resident("VmHWM") - before) / MB, "figures": figures}


def matrix_metrics(images: Any, texts: Any, index: Any) -> dict[str, float]:
    """Sorts all similarities of each query and finds the rank of the first right answer."""
    similarity = images @ texts.T
    places = {
        "i2t": first_right(similarity.argsort(1, descending=True), lambda ranked: index[ranked], range(len(images))),
        "t2i": first_right(similarity.T.argsort(1, descending=True), lambda ranked: ranked, index.tolist()),
    }
    return {f"{way}_r{k}": 100 * (place < k).double().mean().item() for way, place in places.items() for k in KS}


def first_right(ranked: Any, owner_of: Any, wanted: Any) -> Any:
    import torch

    hits = [(owner_of(row) == owner).nonzero()[0, 0] for row, owner in zip(ranked, wanted)]
    return torch.stack(hits)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
