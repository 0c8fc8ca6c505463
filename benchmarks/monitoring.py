"""The cost of the figures of a run: ten steps with a record compared with the next ten steps without one.

    python -m cluster launch --nproc 2 -- benchmarks.monitoring data/scenes data/tokenizer

It runs pretrain's tiny preset with a record every 20 steps, without evaluation. Of each 20 steps, the ten around the
record are compared with the other ten, so that other load of the machine affects both. It prints the median ratio of
wall-clock and of processor time with quartiles, and the time of a record as a share of ten steps.
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

from priorclip.common.options import parse, without_local_rank
from priorclip.pretrain.commands import PretrainConfig, model_defaults
from priorclip.pretrain.train_retrieval import train_retrieval
from priorclip.training.monitoring.clock import Clock
from priorclip.training.monitoring.measure import MetricCollector
from priorclip.training.monitoring.metric_log import MetricLog

EVERY = 20  # steps; one record per 20
WARM = 2  # records that are ignored
SECONDS: list[tuple[float, float]] = []  # wall-clock and processor time at the end of each step
RECORD_SECONDS: list[float] = []


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*words: Any, **names: Any) -> Any:
        begun = time.perf_counter()
        result = function(*words, **names)
        RECORD_SECONDS.append(time.perf_counter() - begun)
        return result

    return call


def noted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*words: Any) -> Any:
        SECONDS.append((time.perf_counter(), time.process_time()))
        return function(*words)

    return call


def run(args: argparse.Namespace) -> float:
    """Returns the images/s of the run."""
    words = ["--preset", "priorclip-tiny", "--tokenizer", args.tokenizer, "--data.shards", args.shards,
             "--data.image_size", "96", "--data.workers", "0", "--run.dir", args.output, "--run.epochs", "1000",
             "--run.max_steps", str((args.pairs + WARM) * EVERY + EVERY), "--run.log_every", str(EVERY),
             "--run.progress", "false", "--run.engine.zero", args.zero, "--run.engine.global_batch", str(args.batch),
             "--run.checkpoint.every", "1000000000", "--run.optimizer.lr", "1e-4"]  # fmt: skip
    report = train_retrieval(parse(PretrainConfig, words, prog="monitoring", defaults=model_defaults))
    return report["images_per_second"]


def ratios(which: int) -> list[float]:
    """Returns the time of steps n - 4 to n + 5 divided by that of n + 6 to n + 15, for each n with a record."""
    ended = [both[which] for both in SECONDS]

    def between(first: int, last: int) -> float:
        return ended[last - 1] - ended[first - 2]  # step 1 ended at index 0

    records = range((WARM + 1) * EVERY, len(ended) - EVERY + 1, EVERY)
    return [between(step - 4, step + 5) / between(step + 6, step + 15) for step in records]


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}  # type: ignore[dict-item]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("tokenizer")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--zero", default="2")
    parser.add_argument("--output", default="runs/monitoring-benchmark", help="folder to create, removed at the end")
    args = parser.parse_args(without_local_rank(sys.argv[1:]))
    MetricCollector.collect = timed(MetricCollector.collect)  # type: ignore[method-assign]
    MetricCollector.on_gradients = timed(MetricCollector.on_gradients)  # type: ignore[method-assign]
    MetricLog.write_metrics = timed(MetricLog.write_metrics)  # type: ignore[method-assign]
    Clock.end_step = noted(Clock.end_step)  # type: ignore[method-assign]
    speed = run(args)
    if dist.get_rank() == 0:
        shutil.rmtree(args.output)
        seconds = 3 * statistics.median(sum(RECORD_SECONDS[place : place + 3]) / 3
                                        for place in range(0, len(RECORD_SECONDS) - 2, 3))  # fmt: skip
        print(
            json.dumps({
                "ranks": dist.get_world_size(), "zero": args.zero, "batch": args.batch,
                "images_per_second": round(speed, 1), "pairs": args.pairs, "wall_clock": spread(ratios(0)),
                "processor_time": spread(ratios(1)), "milliseconds_a_record": round(1000 * seconds, 1),
                "share_of_ten_steps": round(seconds / (10 * args.batch / speed), 5),
            })
        )  # fmt: skip


if __name__ == "__main__":
    main()
