"""The figures of a step, from all ranks: what goes into metrics.jsonl, TensorBoard and the Prometheus endpoint.

    watch = Watch(engine, rank, config, subject, stream)
    with watch.step(recorded):                      # the step, with what can only be seen while it runs
        parts = optimize(..., watch.gradients)
    if recorded:
        figures = watch.figures(parts, clock, batch["epoch"])

A record costs one collective, in which every rank says what it has seen since the last one; in steps without a record
nothing is measured but two clock readings. What the charts tell is in docs/monitoring.md.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from priorclip.training.config import RunConfig
from priorclip.training.engine.gradient_norms import PartOf, squared_norms
from priorclip.training.monitoring.rank_time import OwnTime
from priorclip.training.ranks.distributed import Rank

if TYPE_CHECKING:
    from priorclip.training.loop import Clock, Stream

logger = logging.getLogger(__name__)

GB = 1e9
LATE_SHARE, LATE_RECORDS = 0.2, 3  # of a step, and records in a row, from which a slow rank is worth a warning


def outermost(name: str) -> str:
    """The part of a model that a parameter belongs to, where nobody says better: the first word of its name."""
    return name.partition(".")[0]


@dataclass(frozen=True)
class Subject:
    """What the figures need to know of the model, which this package knows nothing of.

    Args:
        part_of: part of the model that a parameter belongs to by its name, for the gradient norms
        flops: floating point operations of one sample, forward and backward; asked once, where a peak is known
        peak_tflops: dense TFLOP/s of an accelerator by its name and the precision (fp32, bf16, fp16); None: not known
    """

    part_of: PartOf = outermost
    flops: Callable[[], float] | None = None
    peak_tflops: Callable[[str, str], float | None] | None = None


@dataclass
class Seen:
    """What one rank tells the others at a record.

    Args:
        host: its name
        parts: loss and its parts
        squares: share of the squared gradient norm of each part of the model
        own_seconds: of a step, before it waits for other ranks, the wait for data included
        wait_seconds: for data, mean of a step
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


class Watch:
    """Collects the figures of recorded steps. Every rank has one, and takes part in every record."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, rank: Rank, config: RunConfig, subject: Subject, stream: Stream
    ) -> None:
        self.engine, self.rank, self.subject, self.stream = engine, rank, subject, stream
        self.global_batch = config.engine.global_batch
        self.own = OwnTime(engine, rank.device)
        self.squares: dict[str, float] = {}
        self.peak = peak_tflops(config, rank.device, subject)
        counts = subject.flops is not None and rank.is_first and (self.peak is not None or rank.device.type != "cpu")
        self.flops = subject.flops() if subject.flops and counts else None
        self.slowest, self.late = -1, 0  # who was last, and how many records in a row
        self.told: set[int] = set()
        self.ranks: list[Seen] = []  # of the last record

    def step(self, recorded: bool) -> AbstractContextManager[object]:
        """Around a step: time what is this rank's own, in a step of which a record is made."""
        return self.own if recorded else nullcontext()

    def gradients(self) -> None:
        """Between the last backward pass and the optimizer's step, in a step of which a record is made."""
        self.squares = squared_norms(self.engine, self.subject.part_of)

    def figures(self, parts: Mapping[str, torch.Tensor], clock: Clock, epoch: int) -> dict[str, Any]:
        """The record of a step; a collective. What is counted once, as FLOPs are, is in that of rank 0 only.

        Losses are means over the ranks, which for losses over the global batch is the loss itself.
        """
        steps, waits = clock.read()
        wait = sum(waits) / len(waits)
        values = torch.stack([value.double() for value in parts.values()]).tolist()
        mine = Seen(
            socket.gethostname(), dict(zip(parts, values, strict=True)), self.squares, wait + self.own.seconds(), wait,
            memory(self.rank.device), dict(getattr(self.stream, "skipped", {})),
        )  # fmt: skip
        self.ranks = [mine] * self.rank.world_size
        if self.rank.world_size > 1:
            dist.all_gather_object(self.ranks, mine)
        return {
            **self.losses(epoch),
            **gradient_norms(self.ranks),
            **self.speed(steps),
            **self.straggler(statistics.fmean(steps)),
            **memory_figures(self.ranks),
            **skipped_figures(self.ranks),
        }

    def losses(self, epoch: int) -> dict[str, Any]:
        means = {name: statistics.fmean(seen.parts[name] for seen in self.ranks) for name in self.ranks[0].parts}
        norm = means.pop("grad_norm", None)
        if norm is None:
            norm = float(self.engine.get_global_grad_norm() or math.nan)
        figures: dict[str, Any] = {f"train/{name}": value for name, value in means.items()}
        return {**figures, "train/grad_norm": norm, "train/lr": self.engine.get_lr()[0], "train/epoch": epoch}

    def speed(self, steps: list[float]) -> dict[str, Any]:
        """Images and work a second since the last record, by the time of this rank's steps, and how that spreads."""
        seconds = sum(steps)
        a_rank = self.global_batch / self.rank.world_size * len(steps) / seconds
        waited = statistics.fmean(seen.wait_seconds for seen in self.ranks)
        figures: dict[str, Any] = {
            "train/images_per_second": a_rank * self.rank.world_size,
            "train/data_wait_share": waited * len(steps) / seconds,
            "speed/images_per_second_a_rank": a_rank,
            "speed/step_seconds_fastest": min(steps),
            "speed/step_seconds_median": statistics.median(steps),
            "speed/step_seconds_slowest": max(steps),
            "speed/step_seconds": [round(each, 6) for each in steps],
        }
        if self.flops is not None:
            figures["speed/model_tflops_a_rank"] = a_rank * self.flops / 1e12
            if self.peak is not None:
                figures["speed/mfu"] = figures["speed/model_tflops_a_rank"] / self.peak
        return figures

    def straggler(self, step_seconds: float) -> dict[str, Any]:
        """The rank that took longest by itself, and its lag behind the median of the others."""
        own = [seen.own_seconds for seen in self.ranks]
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
        """Once for a rank that is late again and again."""
        again = slowest == self.slowest
        self.late = 0 if share < LATE_SHARE else self.late + 1 if again else 1
        self.slowest = slowest
        if self.late == LATE_RECORDS and slowest not in self.told and self.rank.is_first:
            self.told.add(slowest)
            seen = self.ranks[slowest]
            logger.warning(
                "rank %d on %s holds the others up by %.3g s a step (%.0f %%); it waits %.3g s for its data: see"
                " docs/monitoring.md, 'Straggler'",
                slowest, seen.host, lag, 100 * share, seen.wait_seconds,
            )  # fmt: skip


def peak_tflops(config: RunConfig, device: torch.device, subject: Subject) -> float | None:
    """What the accelerator could do: as configured, or by its name; None on a CPU or where it is not known."""
    if config.monitor.peak_tflops is not None or device.type == "cpu" or subject.peak_tflops is None:
        return config.monitor.peak_tflops
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else get_accelerator().device_name()
    peak = subject.peak_tflops(name, config.engine.precision)
    if peak is None:
        logger.warning("the peak of %s is not known, so there is no MFU: give it with run.monitor.peak_tflops", name)
    return peak


def memory(device: torch.device) -> dict[str, float]:
    """GB of this process on the host and the accelerator, and what is left to others on the host."""
    found = {
        "host_rss_gb": psutil.Process(os.getpid()).memory_info().rss / GB,
        "host_available_gb": psutil.virtual_memory().available / GB,
    }
    if device.type == "cpu":
        return found
    accelerator = get_accelerator()
    return found | {
        "accelerator_allocated_gb": accelerator.memory_allocated() / GB,
        "accelerator_reserved_gb": accelerator.memory_reserved() / GB,
        "accelerator_peak_gb": accelerator.max_memory_allocated() / GB,
    }


def memory_figures(ranks: list[Seen]) -> dict[str, float]:
    """Of the rank that is worst off."""
    return {
        f"memory/{name}": (min if name == "host_available_gb" else max)(seen.memory[name] for seen in ranks)
        for name in ranks[0].memory
    }


def gradient_norms(ranks: list[Seen]) -> dict[str, float]:
    """By part of the model; not finite where a gradient is not."""
    return {f"grad_norm/{part}": math.sqrt(sum(seen.squares[part] for seen in ranks)) for part in ranks[0].squares}


def skipped_figures(ranks: list[Seen]) -> dict[str, int]:
    """Bad samples of all ranks since the run was started or resumed, by reason and in all."""
    reasons: Counter[str] = Counter()
    for seen in ranks:
        reasons.update(seen.skipped)
    return {"data/skipped": reasons.total(), **{f"data/skipped/{name}": reasons[name] for name in sorted(reasons)}}
