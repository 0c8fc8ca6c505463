"""What the figures of a run cost: a record every 10 steps against records in the first and last step only.

    python -m cluster launch --nproc 2 -- benchmarks.monitoring data/scenes data/tokenizer

Runs of pretrain's tiny preset take turns, all in the same processes on the same shards, without evaluation; each drops
its first steps. Printed are the ratios of neighbours' times, their median, how long a record takes by itself, and what
share of ten steps that is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from cluster import loop
from cluster.metrics import MetricLog
from options import parse, without_local_rank
from pretrain.config import PretrainConfig, model_defaults
from pretrain.train import pretrain

NEVER = 10**9
RECORD_SECONDS: list[float] = []


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*words: Any, **names: Any) -> Any:
        begun = time.perf_counter()
        result = function(*words, **names)
        RECORD_SECONDS.append(time.perf_counter() - begun)
        return result

    return call


def run(args: argparse.Namespace, folder: str, log_every: int) -> float:
    """Images/s of a run."""
    words = ["--preset", "priorclip-tiny", "--tokenizer", args.tokenizer, "--data.shards", args.shards,
             "--data.image_size", "96", "--data.workers", "0", "--run.dir", folder, "--run.epochs", "1000",
             "--run.max_steps", str(args.steps), "--run.log_every", str(log_every), "--run.progress", "false",
             "--run.engine.zero", args.zero, "--run.engine.global_batch", str(args.batch), "--run.checkpoint.every",
             str(NEVER), "--run.optimizer.lr", "1e-4"]  # fmt: skip
    report = pretrain(parse(PretrainConfig, words, prog="monitoring", defaults=model_defaults))
    return report["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("tokenizer")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--zero", default="2")
    parser.add_argument("--output", default="runs/monitoring-benchmark", help="made, and removed at the end")
    args = parser.parse_args(without_local_rank(sys.argv[1:]))
    loop.Watch.figures = timed(loop.Watch.figures)  # type: ignore[method-assign]
    loop.Watch.gradients = timed(loop.Watch.gradients)  # type: ignore[method-assign]
    MetricLog.numbers = timed(MetricLog.numbers)  # type: ignore[method-assign]
    ratios, speeds = [], []
    for pair in range(args.pairs):
        order = (10, NEVER) if pair % 2 else (NEVER, 10)
        found = {every: run(args, f"{args.output}/{pair}-{every}", every) for every in order}
        ratios.append(found[NEVER] / found[10])
        speeds.append(found[10])
    if dist.get_rank() == 0:
        shutil.rmtree(args.output)
        seconds = sum(RECORD_SECONDS) / (args.pairs * (args.steps // 10 + 1 + 2))
        ten_steps = 10 * args.batch / statistics.median(speeds)
        print(
            json.dumps({
                "ranks": dist.get_world_size(), "zero": args.zero, "batch": args.batch, "steps": args.steps,
                "images_per_second": round(statistics.median(speeds), 1),
                "time_ratio": round(statistics.median(ratios), 4),
                "time_ratios": [round(each, 4) for each in ratios],
                "milliseconds_a_record": round(1000 * seconds, 1), "share_of_ten_steps": round(seconds / ten_steps, 5),
            })
        )  # fmt: skip


if __name__ == "__main__":
    main()
