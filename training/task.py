"""A training as its package describes it, and the run around it that is the same for all of them.

join the ranks -> run directory -> seed -> the package's Task -> shard the model -> loop -> export, report

def prepare(rank, folder) -> Task: ...        # open the shards, build the model
report = run_task(config, config.run, prepare)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from PIL import Image

from priorclip.training.config import RunConfig
from priorclip.training.engine.build import build_engine
from priorclip.training.engine.grad_cache import FeatureLosses
from priorclip.training.loop import Step, Stream, evaluated, prepare_folder, stop_here, total_steps, train
from priorclip.training.model_selection import Outcome
from priorclip.training.monitoring.measure import Subject
from priorclip.training.monitoring.report import set_up_logging, write_report
from priorclip.training.ranks.distributed import Rank, leave_at_exit, seed_everything, start
from priorclip.training.ranks.preemption import Notice
from priorclip.training.ranks.same_data import refuse_different_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is particular to a training.

    Args:
        model: to be trained
        groups: its optimizer parameter groups
        stream: its batches, this rank's share
        step: loss and parts of a batch
        evaluate: figures of the engine in eval mode; a collective, in which all ranks call the engine equally often
        export: writes the trained model; gets whole float32 weights, the report and the folder, on rank 0 only
        split: the step in two halves, where its losses need no more of the model than features: for gradient caching
        test: figures of the weights that are exported, taken once, after training; a collective like ``evaluate``
        pictures: drawn after each evaluation by the engine in eval mode, for TensorBoard; a collective
        subject: what the figures of the run need to know of the model
    """

    model: torch.nn.Module
    groups: list[dict[str, Any]]
    stream: Stream
    step: Step
    evaluate: Callable[[deepspeed.DeepSpeedEngine], dict[str, float]]
    export: Callable[[dict[str, torch.Tensor], dict[str, Any], Path], object]
    split: FeatureLosses | None = None
    test: Callable[[deepspeed.DeepSpeedEngine], dict[str, float]] | None = None
    pictures: Callable[[deepspeed.DeepSpeedEngine], dict[str, Image.Image]] | None = None
    subject: Subject = field(default_factory=Subject)


def run_task(config: Any, run: RunConfig, prepare: Callable[[Rank], Task]) -> dict[str, Any]:
    """Run a training from start to report; ``config`` is the command's whole dataclass.

    Returns the report, which rank 0 also writes to ``report.json`` beside ``export/``.
    """
    rank = start(run.engine)
    set_up_logging(rank)
    folder = prepare_folder(config, run, rank)
    seed_everything(run.seed, run.deterministic)
    task = prepare(rank)
    refuse_different_data(task.stream)
    engine = build_engine(
        task.model, task.groups, run, total_steps=total_steps(run, len(task.stream)), world_size=rank.world_size
    )
    split = task.split if run.engine.grad_cache else None
    if split and engine.gradient_accumulation_steps() > 1:
        logger.info(
            "gradient caching: %d micro batches of %d a rank, losses over all %d samples of a step",
            engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu(), run.engine.global_batch,
        )  # fmt: skip
    draw = None if task.pictures is None else partial(task.pictures, engine)
    outcome, notice = Outcome(run, engine), Notice()
    report = train(
        run, rank, engine, task.stream, task.step, lambda: task.evaluate(engine), split, draw, task.subject, outcome,
        notice,
    )  # fmt: skip
    weights, facts = outcome.weights()
    report |= facts
    if task.test is not None:
        report["test"] = evaluated(engine, partial(task.test, engine), rank, notice)
        if report["test"] is None:
            stop_here(report["steps"], report["steps"])
    if rank.is_first:
        task.export(weights, report, folder)
        write_report(folder, report)
    leave_at_exit()
    return report
