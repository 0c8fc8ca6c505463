"""Metrics of a step, from all ranks: for metrics.jsonl, TensorBoard and the Prometheus endpoint.

    collector = MetricCollector(engine, rank, config, facts, stream)
    with collector.timing(is_recorded):             # around the step: what can only be measured while it runs
        parts = optimize(..., on_gradients=collector.on_gradients)
    if is_recorded:
        metrics = collector.collect(parts, clock, batch["epoch"])

A record costs one collective, in which every rank sends its `RankMetrics`. A step without a record costs two clock
readings. docs/monitoring.md explains the charts.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from priorclip.common.output import get_logger
from priorclip.training.config import RunConfig
from priorclip.training.engine.gradient_norms import PartOf, squared_norms
from priorclip.training.monitoring.clock import Clock
from priorclip.training.monitoring.rank_time import RankTimer
from priorclip.training.ranks.distributed import Rank
from priorclip.training.stream_protocol import Stream

logger = get_logger(__name__)

GB = 1e9
SLOW_SHARE, SLOW_RECORDS = 0.2, 3  # share of a step, and records in a row, at which a slow rank is worth a warning


def first_word(name: str) -> str:
    """Part of the model by a parameter's name: ``text.layer.0.weight`` -> ``text``. The default of `ModelFacts`."""
    return name.partition(".")[0]


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model that its metrics need.

    Args:
        part_of: name of a parameter -> part of the model, for the gradient norms
        flops: floating point operations of one sample, forward and backward; called once, and only if needed
        peak_tflops: (name of the accelerator, precision fp32, bf16 or fp16) -> its dense TFLOP/s, None if not known
    """

    part_of: PartOf = first_word
    flops: Callable[[], float] | None = None
    peak_tflops: Callable[[str, str], float | None] | None = None


@dataclass
class RankMetrics:
    """What each rank sends to all others for a record.

    Args:
        host: its name
        parts: the loss and its parts
        squares: this rank's share of the squared gradient norm, by part of the model
        own_seconds: of the step, without waiting for other ranks; includes the wait for data
        wait_seconds: wait for data, mean of the steps since the last record
        memory: GB by kind
        skipped: bad samples by reason since the process began
    """

    host: str
    parts: dict[str, float]
    squares: dict[str, float]
    own_seconds: float
    wait_seconds: float
    memory: dict[str, float]
    skipped: dict[str, int] = field(default_factory=dict)


class MetricCollector:
    """Collects the metrics of recorded steps. Every rank has one and takes part in every record."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, rank: Rank, config: RunConfig, facts: ModelFacts, stream: Stream
    ) -> None:
        self.engine, self.rank, self.facts, self.stream = engine, rank, facts, stream
        self.global_batch = config.engine.global_batch
        self.timer = RankTimer(engine, rank.device)
        self.squares: dict[str, float] = {}
        self.peak = peak_tflops(config, rank.device, facts)
        needs_flops = rank.is_first and (self.peak is not None or rank.device.type != "cpu")
        self.flops = facts.flops() if facts.flops and needs_flops else None
        self.slowest, self.slow_records = -1, 0  # the slowest rank, and records in a row in which it was too slow
        self.warned: set[int] = set()
        self.ranks: list[RankMetrics] = []  # of the last record

    def timing(self, is_recorded: bool) -> AbstractContextManager[object]:
        """Put it around a step. It measures the rank's own time in a recorded step."""
        return self.timer if is_recorded else nullcontext()

    def on_gradients(self) -> None:
        """Call it in a recorded step, between the last backward pass and the optimizer's step."""
        self.squares = squared_norms(self.engine, self.facts.part_of)

    def collect(self, parts: Mapping[str, torch.Tensor], clock: Clock, epoch: int) -> dict[str, Any]:
        """Returns the metrics of a recorded step. A collective. FLOPs and MFU are in rank 0's metrics only.

        Losses are means over the ranks. For losses over the global batch, that is the loss itself.
        """
        steps, waits = clock.read()
        wait = sum(waits) / len(waits)
        values = torch.stack([value.double() for value in parts.values()]).tolist()
        own = RankMetrics(
            socket.gethostname(), dict(zip(parts, values, strict=True)), self.squares, wait + self.timer.seconds(),
            wait, memory(self.rank.device), dict(getattr(self.stream, "skipped", {})),
        )  # fmt: skip
        self.ranks = [own] * self.rank.world_size
        if self.rank.world_size > 1:
            dist.all_gather_object(self.ranks, own)
        return {
            **self.losses(epoch),
            **gradient_norms(self.ranks),
            **self.speed(steps),
            **self.straggler(statistics.fmean(steps)),
            **memory_metrics(self.ranks),
            **skipped_metrics(self.ranks),
        }

    def losses(self, epoch: int) -> dict[str, Any]:
        means = {name: statistics.fmean(rank.parts[name] for rank in self.ranks) for name in self.ranks[0].parts}
        norm = means.pop("grad_norm", None)
        if norm is None:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
            norm = math.nan if norm < 0 else norm  # DeepSpeed's -1 says that it is not finite
        metrics: dict[str, Any] = {f"train/{name}": value for name, value in means.items()}
        return {**metrics, "train/grad_norm": norm, "train/lr": self.engine.get_lr()[0], "train/epoch": epoch}

    def speed(self, steps: list[float]) -> dict[str, Any]:
        """Images/s and TFLOP/s since the last record, from the seconds of this rank's steps, and their spread."""
        seconds = sum(steps)
        per_rank = self.global_batch / self.rank.world_size * len(steps) / seconds
        wait = statistics.fmean(rank.wait_seconds for rank in self.ranks)
        metrics: dict[str, Any] = {
            "train/images_per_second": per_rank * self.rank.world_size,
            "train/data_wait_share": wait * len(steps) / seconds,
            "speed/images_per_second_a_rank": per_rank,
            "speed/step_seconds_fastest": min(steps),
            "speed/step_seconds_median": statistics.median(steps),
            "speed/step_seconds_slowest": max(steps),
            "speed/step_seconds": [round(each, 6) for each in steps],
        }
        if self.flops is not None:
            metrics["speed/model_tflops_a_rank"] = per_rank * self.flops / 1e12
            if self.peak is not None:
                metrics["speed/mfu"] = metrics["speed/model_tflops_a_rank"] / self.peak
        return metrics

    def straggler(self, step_seconds: float) -> dict[str, Any]:
        """The rank with the longest own time, and its lag behind the median of the others."""
        own = [rank.own_seconds for rank in self.ranks]
        slowest = max(range(len(own)), key=own.__getitem__)
        others = own[:slowest] + own[slowest + 1 :]
        lag = own[slowest] - statistics.median(others) if others else 0.0
        self._warn(slowest, lag, lag / step_seconds)
        return {
            "straggler/rank": slowest,
            "straggler/host": self.ranks[slowest].host,
            "straggler/lag_seconds": lag,
            "straggler/lag_share": lag / step_seconds,
            "straggler/wait_seconds": self.ranks[slowest].wait_seconds,
        }

    def _warn(self, slowest: int, lag: float, share: float) -> None:
        """Warns once about a rank that is too slow in several records in a row."""
        is_same = slowest == self.slowest
        self.slow_records = 0 if share < SLOW_SHARE else self.slow_records + 1 if is_same else 1
        self.slowest = slowest
        if self.slow_records == SLOW_RECORDS and slowest not in self.warned and self.rank.is_first:
            self.warned.add(slowest)
            logger.warning(
                "rank %d on %s delays the other ranks by %.3g s a step (%.0f %%); its wait for data is %.3g s: see"
                " docs/monitoring.md, 'Straggler'",
                slowest, self.ranks[slowest].host, lag, 100 * share, self.ranks[slowest].wait_seconds,
            )  # fmt: skip


def peak_tflops(config: RunConfig, device: torch.device, facts: ModelFacts) -> float | None:
    """Dense TFLOP/s of the accelerator: as configured, or by its name. None on a CPU or if it is not known."""
    if config.monitor.peak_tflops is not None or device.type == "cpu" or facts.peak_tflops is None:
        return config.monitor.peak_tflops
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else get_accelerator().device_name()
    peak = facts.peak_tflops(name, config.engine.precision)
    if peak is None:
        logger.warning("no MFU: the peak TFLOP/s of %s are not known; set run.monitor.peak_tflops", name)
    return peak


def memory(device: torch.device) -> dict[str, float]:
    """GB that this process uses on the host and the accelerator, and GB still available on the host."""
    used = {
        "host_rss_gb": psutil.Process(os.getpid()).memory_info().rss / GB,
        "host_available_gb": psutil.virtual_memory().available / GB,
    }
    if device.type == "cpu":
        return used
    accelerator = get_accelerator()
    return used | {
        "accelerator_allocated_gb": accelerator.memory_allocated() / GB,
        "accelerator_reserved_gb": accelerator.memory_reserved() / GB,
        "accelerator_peak_gb": accelerator.max_memory_allocated() / GB,
    }


def memory_metrics(ranks: list[RankMetrics]) -> dict[str, float]:
    """Largest use, and least available memory, of any rank."""
    return {
        f"memory/{name}": (min if name == "host_available_gb" else max)(rank.memory[name] for rank in ranks)
        for name in ranks[0].memory
    }


def gradient_norms(ranks: list[RankMetrics]) -> dict[str, float]:
    """By part of the model; not finite if a gradient is not."""
    return {f"grad_norm/{part}": math.sqrt(sum(rank.squares[part] for rank in ranks)) for part in ranks[0].squares}


def skipped_metrics(ranks: list[RankMetrics]) -> dict[str, int]:
    """Bad samples of all ranks since the run was started or resumed: their sum, and by reason."""
    reasons: Counter[str] = Counter()
    for rank in ranks:
        reasons.update(rank.skipped)
    return {"data/skipped": reasons.total(), **{f"data/skipped/{name}": reasons[name] for name in sorted(reasons)}}
