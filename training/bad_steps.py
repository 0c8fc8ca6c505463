"""Steps that would spoil a run: the loss or its gradient is not finite, or the loss is far above those before it.

    bad_steps = BadSteps(config.bad_steps, folder, engine, rank, precision)
    bad_steps.begin_step()
    parts = optimize(engine, batch, step, device, screen_loss=bad_steps.screen_loss)   # a bad step changes no weights
    bad_steps.end_step(norm)
    if bad_steps.reason: ...                                                           # raise, skip, or roll back

The loss of a step, a mean over micro batches and ranks, is known before the last backward pass. If it is bad, we
multiply it by NaN. DeepSpeed then drops a step whose gradient is not finite, like an fp16 overflow, in every ZeRO
stage, and empties its buckets. The forward pass has changed the batch-norm statistics: we set them back. If no action
is asked for, ZeRO 1 and 2 apply such a gradient in float32 and bf16, and the run ends at the next recorded step, before
it saves anything (`Run.refuse_non_finite`).

``bad_steps.jsonl`` in the run directory lists each bad step with its position in the data.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch

from priorclip.common.output import get_logger
from priorclip.training.config import BadStepConfig
from priorclip.training.engine.buffers import get_buffers, set_buffers
from priorclip.training.ranks.distributed import Rank, mean_over_ranks

logger = get_logger(__name__)

MIN_GOOD_STEPS = 8  # before the median of their losses counts


class BadSteps:
    """Finds bad steps. ``reason`` says what is wrong with the last step, or is empty; it is the same on all ranks."""

    def __init__(
        self, config: BadStepConfig, folder: Path, engine: deepspeed.DeepSpeedEngine, rank: Rank, precision: str
    ) -> None:
        self.config, self.folder, self.engine, self.rank = config, folder, engine, rank
        self.good_losses: deque[float] = deque(maxlen=config.window)
        self.count = 0
        self.loss = math.nan
        self.reason = ""
        self.may_overflow = precision == "fp16"
        self.is_active = config.action != "raise" or config.spike > 0
        if self.is_active and hasattr(engine.optimizer, "check_grad_overflow"):
            # Under bf16, zero1.json and zero2.json turn it off: it looks at each parameter's gradient in each step.
            engine.optimizer.check_grad_overflow = True

    def begin_step(self) -> None:
        self.reason = ""
        if self.is_active:
            self.buffers = {name: value.clone() for name, value in get_buffers(self.engine.module).items()}

    def screen_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns a factor for the gradient: 1, or NaN to drop the step. A collective."""
        self.loss = mean_over_ranks({"loss": float(loss)}, self.rank.device)["loss"]
        if not math.isfinite(self.loss):
            self.reason = f"the loss is {self.loss}"
        elif self.config.spike and len(self.good_losses) >= min(MIN_GOOD_STEPS, self.config.window):
            median = statistics.median(self.good_losses)
            if self.loss > self.config.spike * median:
                self.reason = f"the loss is {self.loss:.4g}, {self.loss / median:.1f} times the median of those before"
        return torch.tensor(math.nan if self.reason else 1.0, device=loss.device)

    def end_step(self, norm: float | None) -> None:
        """Checks the gradient and completes a step that DeepSpeed dropped. ``norm`` is None if the engine keeps it."""
        if not self.is_active:
            return
        overflow = bool(getattr(self.engine.optimizer, "overflow", False))
        is_bad_gradient = overflow or (norm is not None and not is_finite_norm(norm))
        if not self.reason and is_bad_gradient and not self.may_overflow:
            self.reason = f"the loss is {self.loss:.4g} and its gradient is not finite"
        if not self.reason:
            self.good_losses.append(self.loss)
            return
        set_buffers(self.engine.module, self.buffers)
        if overflow and self.engine.lr_scheduler is not None:
            self.engine.lr_scheduler.step()  # the schedule counts steps, and this was one

    def state_dict(self) -> dict[str, Any]:
        return {"good": list(self.good_losses), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.good_losses = deque(state["good"], self.config.window)
        self.count = max(self.count, state["count"])  # a rollback does not reset the count

    def record(self, epoch: int, position: dict[str, int], back_to: int | None) -> None:
        """Counts the bad step and writes it to ``bad_steps.jsonl``.

        Args:
            epoch: of the bad batch
            position: of the data after the bad batch
            back_to: step of the checkpoint that the run goes back to

        Raises:
            FloatingPointError: the action is raise, or ``run.bad_steps.limit`` is exceeded
        """
        self.count += 1
        step = self.engine.global_steps
        action = self.config.action if back_to is not None or self.config.action == "raise" else "skip"
        entry = {"step": step, "epoch": epoch, "reason": self.reason, "action": action, "data": position}
        if back_to is not None:
            entry["back_to_step"] = back_to
        if self.rank.is_first:
            try:
                with (self.folder / "bad_steps.jsonl").open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                logger.error("%s: cannot write %s: %s", self.folder / "bad_steps.jsonl", entry, error)
            result = f"back to step {back_to}" if back_to is not None else "no optimizer step is taken"
            logger.warning("step %d: %s; %s (%d of %d)", step, self.reason, result, self.count, self.config.limit)
        if self.config.action == "raise" or self.count > self.config.limit:
            is_over_limit = self.count > self.config.limit
            raise FloatingPointError(
                f"step {step}: {self.reason}"
                + (f"; that is more than run.bad_steps.limit {self.config.limit}" if is_over_limit else "")
                + f"; lower run.optimizer.lr or lengthen its warmup; checkpoints are in {self.folder / 'checkpoints'}"
            )


def is_finite_norm(norm: float) -> bool:
    """Tells whether all gradients are finite. DeepSpeed's ZeRO 1 and 2 give -1 for the norm of others."""
    return math.isfinite(norm) and norm >= 0


@contextmanager
def no_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Makes ``optimizer.step`` do nothing, because DeepSpeed without ZeRO in float32 applies any gradient."""
    step = optimizer.step
    optimizer.step = lambda *_: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]
