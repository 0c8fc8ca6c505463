"""Seconds of each step of a run, and how many of them this rank waits for data.

clock.begin_wait(); batch = next(batches); clock.end_wait()
optimize(...); clock.end_step()
clock.pause()                                   # evaluations and checkpoints do not count
step_seconds, wait_seconds = clock.read()       # of the steps since the last record
"""

from __future__ import annotations

import time


class Clock:
    """A step lasts from the end of the step before it, or from the first wait after a pause, to its own end."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.step_seconds: list[float] = []
        self.wait_seconds: list[float] = []
        self.steps_read = 0
        self.step_began: float | None = None
        self.wait_began = self.wait_ended = 0.0

    def begin_wait(self) -> None:
        self.wait_began = time.perf_counter()
        if self.step_began is None:
            self.step_began = self.wait_began

    def end_wait(self) -> None:
        self.wait_ended = time.perf_counter()

    def end_step(self) -> None:
        assert self.step_began is not None
        now = time.perf_counter()
        self.step_seconds.append(now - self.step_began)
        self.wait_seconds.append(self.wait_ended - self.wait_began)
        self.step_began = now

    def pause(self) -> None:
        self.step_began = None

    def read(self) -> tuple[list[float], list[float]]:
        """Seconds of each step since the last reading, and how many of them were spent waiting for data."""
        steps, waits = self.step_seconds[self.steps_read :], self.wait_seconds[self.steps_read :]
        self.steps_read = len(self.step_seconds)
        return steps, waits

    def images_per_second(self) -> float | None:
        """Mean over the run, without the first two steps, in which kernels and workers warm up."""
        steady = self.step_seconds[2:] or self.step_seconds
        return self.global_batch * len(steady) / sum(steady) if steady else None
