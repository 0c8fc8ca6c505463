"""What a checkpoint counts in, and what a resumed run does if its options count otherwise.

The engine, the schedule and the log count steps. A step is run.engine.global_batch samples, and an epoch is
samples // global_batch steps. So a checkpoint keeps these numbers:

    {"global_batch": 128, "steps_an_epoch": 50}

A run with another global batch, or one that would have ended before the checkpoint, is refused by the name of its
option. Other shards, or another order of them, are refused by the stream. With other run.epochs, run.max_steps or
run.optimizer the run goes on, and the learning rate follows the new options from the first step on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed

from priorclip.common.output import get_logger
from priorclip.training.config import RunConfig

logger = get_logger(__name__)

Settings = list[dict[str, Any]]


@dataclass(frozen=True)
class Units:
    """The numbers that give steps a meaning.

    Args:
        global_batch: samples of a step
        steps_an_epoch: of the stream
        last_step: of the run
    """

    global_batch: int
    steps_an_epoch: int
    last_step: int

    def state_dict(self) -> dict[str, int]:
        return {"global_batch": self.global_batch, "steps_an_epoch": self.steps_an_epoch}


def written_units(engine: deepspeed.DeepSpeedEngine, state: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of the checkpoint that the engine has loaded.

    A checkpoint of version 0.1 has only DeepSpeed's own counts of samples and steps.
    """
    if "units" in state:
        return state["units"]
    return {"global_batch": engine.global_samples / engine.global_steps} if engine.global_steps else {}


def refuse_other_batch(found: Path, written: Mapping[str, float], now: Units) -> None:
    """Ends the run if its steps are not those of the checkpoint. Raises ValueError, which names the option."""
    batch = written.get("global_batch", now.global_batch)
    if batch != now.global_batch:
        raise ValueError(
            f"{found} counts steps of {batch:g} samples, and run.engine.global_batch is {now.global_batch}: the steps,"
            f" the epochs and the learning rate would mean other samples. Set run.engine.global_batch {batch:g} (any"
            " number of ranks that divides it will do), or train anew in another run.dir"
        )


def refuse_other_length(found: Path, step: int, written: Mapping[str, float], now: Units) -> None:
    """Ends the run if its epochs are not those of the checkpoint, or if the checkpoint is of a longer run.

    Raises:
        ValueError: names the options
    """
    epoch = written.get("steps_an_epoch", now.steps_an_epoch)
    if epoch != now.steps_an_epoch:
        raise ValueError(
            f"{found} counts epochs of {epoch:g} steps, and the training data now gives {now.steps_an_epoch}: restore"
            " the data options (data.shards, data.captions and the like), or train anew in another run.dir"
        )
    if step > now.last_step:
        raise ValueError(
            f"{found} is of step {step}, and run.epochs and run.max_steps end this run at step {now.last_step}: raise"
            f" them, or set this checkpoint and later ones aside to continue from an earlier one"
        )


def optimizer_settings(engine: deepspeed.DeepSpeedEngine) -> Settings:
    """Returns what the configuration says of each parameter group, before a checkpoint is loaded."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in engine.optimizer.param_groups
    ]


def follow_configuration(engine: deepspeed.DeepSpeedEngine, settings: Settings) -> None:
    """Sets learning rates and other settings of the optimizer to those of the configuration at the engine's step.

    A checkpoint brings its own, and without this the options of a resumed run would have no effect. They are equal to
    the last bit if no option has changed.
    """
    scheduler: Any = engine.lr_scheduler
    before = [group["lr"] for group in engine.optimizer.param_groups]
    scheduler.base_lrs = [group["initial_lr"] for group in settings]
    rates = [
        base * shape(scheduler.last_epoch) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, own, rate in zip(engine.optimizer.param_groups, settings, rates, strict=True):
        group.update({**own, "lr": rate})
    scheduler._last_lr = rates
    if not all(math.isclose(old, new, rel_tol=1e-9) for old, new in zip(before, rates, strict=True)):
        logger.warning(
            "the learning rate of the next step is %.6g. By the options of the checkpoint it would be %.6g: run.epochs,"
            " run.max_steps or run.optimizer differ, and the run follows them",
            rates[0], before[0],
        )  # fmt: skip


def done(engine: deepspeed.DeepSpeedEngine, units: Units) -> dict[str, float]:
    """Returns what the run has done so far, for its report."""
    steps = engine.global_steps
    return {"steps": steps, "epochs": steps / units.steps_an_epoch, "samples_seen": steps * units.global_batch}


def total_steps(config: RunConfig, steps_an_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.epochs * steps_an_epoch
    return min(steps, config.max_steps) if config.max_steps else steps
