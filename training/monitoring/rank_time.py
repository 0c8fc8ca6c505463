"""A rank's own time in a step, before it waits for others. It tells a slow rank from the ranks that wait for it.

    timer = RankTimer(engine, device)
    with timer:                       # one step
        optimize(...)
    timer.seconds()                   # 0.21: from the batch to the first forward pass, and all forward passes

All ranks end a step at the same time, because each waits for the slowest in the exchange of features and gradients. The
model's forward pass comes before the exchange, so that it is the same work on each rank and shows which one is slow.
Under ZeRO 3 the forward pass itself waits for shards, module by module. There we time each module without children,
after ZeRO's own hook has gathered its parameters. We leave out the backward pass, because it communicates all the time.
An accelerator that is slow in the backward pass is slow in the forward pass too.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

TimeMark = Any  # seconds, or an event on the accelerator's stream


class RankTimer:
    """Times one step. It has hooks on the model only during that step."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        whole = engine.zero_optimization_stage() < 3
        self.modules = (
            [engine.module] if whole else [each for each in engine.module.modules() if not list(each.children())]
        )
        self.device = device
        self.spans: list[tuple[TimeMark, TimeMark]] = []
        self.open_marks: list[TimeMark] = []
        self.seconds_before = 0.0  # the first forward pass
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RankTimer:
        self.spans, self.open_marks, self.seconds_before = [], [], 0.0
        self.began = time.perf_counter()
        for module in self.modules:
            # Between ZeRO's own hooks, which are older: after the one that gathers, before the one that frees.
            self.handles.append(module.register_forward_pre_hook(self._begin))
            self.handles.append(module.register_forward_hook(self._end, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def seconds(self) -> float:
        """Own seconds of the last timed step."""
        return self.seconds_before + sum(seconds_between(*span) for span in self.spans)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if not self.seconds_before:
            self.seconds_before = time.perf_counter() - self.began
        self.open_marks.append(time_mark(self.device))

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.spans.append((self.open_marks.pop(), time_mark(self.device)))


def time_mark(device: torch.device) -> TimeMark:
    """This moment; on an accelerator, the moment at which the work queued so far is done."""
    if device.type == "cpu":
        return time.perf_counter()
    event = get_accelerator().Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: TimeMark, last: TimeMark) -> float:
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000
