"""How long a step takes this rank by itself, before it waits for others: what tells a slow rank from its victims.

    own = OwnTime(engine, device)
    with own:                       # one step
        optimize(...)
    own.seconds()                   # 0.21: from the batch in hand to the first forward pass, and all forward passes

Every rank ends a step at the same time, for each waits for the slowest in the exchange of features and gradients. The
model's forward pass comes before those, so that it is the same work on each rank and shows who is late. Under ZeRO 3
the forward pass itself waits for shards, module by module: there the modules that have no parts are timed one by one,
after ZeRO's own hook has brought their parameters. The backward pass, which takes part in exchanges all along, is left
out: an accelerator that is slow in it is so in the forward pass too.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

Mark = Any  # seconds, or an event on the accelerator's stream


class OwnTime:
    """Hooks are there only while a step is timed; the step's time is read once it has ended."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        whole = engine.zero_optimization_stage() < 3
        self.modules = (
            [engine.module] if whole else [each for each in engine.module.modules() if not list(each.children())]
        )
        self.device = device
        self.spans: list[tuple[Mark, Mark]] = []
        self.open: list[Mark] = []
        self.before = 0.0
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> OwnTime:
        self.spans, self.open, self.before = [], [], 0.0
        self.began = time.perf_counter()
        for module in self.modules:
            # Between ZeRO's own hooks, which were there first: after the one that gathers, before the one that frees.
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
        """Of the step that was timed last."""
        return self.before + sum(between(*span) for span in self.spans)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if not self.before:
            self.before = time.perf_counter() - self.began
        self.open.append(mark(self.device))

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.spans.append((self.open.pop(), mark(self.device)))


def mark(device: torch.device) -> Mark:
    """This moment, on an accelerator that of the work queued so far."""
    if device.type == "cpu":
        return time.perf_counter()
    event = get_accelerator().Event(enable_timing=True)
    event.record()
    return event


def between(first: Mark, last: Mark) -> float:
    """Seconds between two marks."""
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000
