"""Steps that would spoil a run: a loss or gradient that is not a number, a loss far above those before it.

    bad = BadSteps(config.bad_steps, folder, engine, rank)
    parts = optimize(engine, batch, step, device, split, bad.judge)     # a bad step leaves the weights as they are
    if bad.reason: ...                                                  # raise, skip, or roll back

The loss of a step, the mean over its micro batches and ranks, is known before its last backward pass. Where it is bad,
it is multiplied by NaN: DeepSpeed drops a step whose gradient is not finite, as it drops an fp16 overflow, under every
ZeRO stage, and empties its buckets. Batch-norm statistics, which the forward pass has moved, are set back.

``bad_steps.jsonl`` in the run directory names each with its place in the data.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch

from priorclip.training.checkpoints.files import buffers_of, set_buffers
from priorclip.training.config import BadStepConfig
from priorclip.training.ranks.distributed import Rank, mean_over_ranks

logger = logging.getLogger(__name__)

# Fewer good steps than this make no median.
LEAST = 8


class BadSteps:
    """Judges each step's loss; ``reason`` says what is wrong with the last one, or is empty. Alike on all ranks."""

    def __init__(
        self, config: BadStepConfig, folder: Path, engine: deepspeed.DeepSpeedEngine, rank: Rank, precision: str
    ) -> None:
        self.config, self.folder, self.engine, self.rank = config, folder, engine, rank
        self.good: deque[float] = deque(maxlen=config.window)
        self.count = 0
        self.loss = math.nan
        self.reason = ""
        self.scaled = precision == "fp16"
        self.active = config.action != "raise" or config.spike > 0
        if self.active and hasattr(engine.optimizer, "check_grad_overflow"):
            engine.optimizer.check_grad_overflow = True  # under bf16, ZeRO 1 and 2 do not look by themselves

    def begin(self) -> None:
        """Before a step."""
        self.reason = ""
        if self.active:
            self.buffers = {name: value.clone() for name, value in buffers_of(self.engine.module).items()}

    def judge(self, loss: torch.Tensor) -> torch.Tensor:
        """A factor for the gradient: 1, or NaN where the step is to be dropped. A collective."""
        self.loss = mean_over_ranks({"loss": float(loss)}, self.rank.device)["loss"]
        if not math.isfinite(self.loss):
            self.reason = f"the loss is {self.loss}"
        elif self.config.spike and len(self.good) >= min(LEAST, self.config.window):
            usual = statistics.median(self.good)
            if self.loss > self.config.spike * usual:
                self.reason = f"the loss is {self.loss:.4g}, {self.loss / usual:.1f} times the median of those before"
        return torch.tensor(math.nan if self.reason else 1.0, device=loss.device)

    def end(self, norm: float | None) -> None:
        """After a step, with its gradient norm where the engine has none: finish what DeepSpeed began."""
        if not self.active:
            return
        overflow = bool(getattr(self.engine.optimizer, "overflow", False))
        burst = overflow or (norm is not None and not math.isfinite(norm))
        if not self.reason and burst and not self.scaled:
            self.reason = f"the loss is {self.loss:.4g} and its gradient is not finite"
        if not self.reason:
            self.good.append(self.loss)
            return
        set_buffers(self.engine.module, self.buffers)
        if overflow and self.engine.lr_scheduler is not None:
            self.engine.lr_scheduler.step()  # the schedule is one of steps, and this was one

    def state_dict(self) -> dict[str, Any]:
        return {"good": list(self.good), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.good = deque(state["good"], self.config.window)
        self.count = max(self.count, state["count"])  # going back does not give bad steps back

    def record(self, epoch: int, position: dict[str, int], back_to: int | None) -> None:
        """Count and write down the bad step; ``position`` is that of the data after it.

        Raises:
            FloatingPointError: the limit is reached, or any bad step is to end the run.
        """
        self.count += 1
        step = self.engine.global_steps
        done = self.config.action if back_to is not None or self.config.action == "raise" else "skip"
        entry = {"step": step, "epoch": epoch, "reason": self.reason, "action": done, "data": position}
        if back_to is not None:
            entry["back_to_step"] = back_to
        if self.rank.is_first:
            try:
                with (self.folder / "bad_steps.jsonl").open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                logger.error("%s is not written down: %s", entry, error)
            where = f"back to step {back_to}" if back_to is not None else "no optimizer step is taken"
            logger.warning("step %d: %s; %s (%d of %d)", step, self.reason, where, self.count, self.config.limit)
        if self.config.action == "raise" or self.count > self.config.limit:
            raise FloatingPointError(
                f"step {step}: {self.reason}"
                + (
                    f"; that is more than run.bad_steps.limit {self.config.limit}"
                    if self.count > self.config.limit
                    else ""
                )
                + f"; lower run.optimizer.lr or lengthen its warmup; checkpoints are in {self.folder / 'checkpoints'}"
            )


@contextmanager
def no_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Without ZeRO and in float32, DeepSpeed would take a step along a gradient of any kind."""
    step = optimizer.step
    optimizer.step = lambda *_: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]
