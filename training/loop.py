"""The story of a training: join the ranks, prepare data and model, step to the end, export, report.

    report = run_task(config, config.run, prepare)      # {"steps": 300, "images_per_second": 210.4, ...}

A resumed run needs the engine's state and the stream's ``(epoch, samples_seen)``: dropout is seeded by the step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from priorclip.training.config import RunConfig
from priorclip.training.engine.build import build_engine
from priorclip.training.monitoring.report import set_up_logging, write_report
from priorclip.training.progress import total_steps
from priorclip.training.ranks.distributed import Rank, leave_at_exit, seed_everything, start
from priorclip.training.ranks.same_data import refuse_different_data
from priorclip.training.run import Run, stop_process
from priorclip.training.run_folder import prepare_folder
from priorclip.training.task import Task


def run_task(config: Any, run_config: RunConfig, prepare: Callable[[Rank], Task]) -> dict[str, Any]:
    """Runs a training from start to report.

    Args:
        config: the whole dataclass of the command
        run_config: its part for the run
        prepare: opens the data and builds the model

    Returns:
        The report, which rank 0 also writes to ``report.json`` beside ``export/``.
    """
    rank = start(run_config.engine)
    set_up_logging(rank)
    folder = prepare_folder(config, run_config, rank)
    seed_everything(run_config.seed, run_config.deterministic)
    task = prepare(rank)
    refuse_different_data(task.stream)
    steps = total_steps(run_config, len(task.stream))
    engine = build_engine(task.model, task.groups, run_config, total_steps=steps, world_size=rank.world_size)
    run = Run(run_config, rank, engine, task)
    report = train(run)
    export(run, report, folder)
    leave_at_exit()
    return report


def train(run: Run) -> dict[str, Any]:
    """Trains to the last step and returns the results.

    If any rank gets SIGTERM or SIGUSR1, the process writes a checkpoint of the current step, or of the next, and ends
    with REQUEUE_EXIT_CODE. If the signal arrives during an evaluation, the evaluation stops at its next batch; the
    resumed run makes it up.

    Raises:
        FloatingPointError: the loss is not finite, or was too often; the message names the step
        CheckpointError: too many checkpoints in a row could not be written
    """
    if run.evaluation_is_overdue and not run.evaluate_selected():
        run.stop()
    for batch in run.batches():
        parts = run.step(batch)
        if run.bad_steps.reason and run.handle_bad_step(batch):  # back at a checkpoint
            continue
        run.agree_on_stop()
        saves = run.is_stopping or run.is_checkpoint_step
        run.record(parts, batch["epoch"])
        if (run.is_recorded_step or saves) and not run.bad_steps.reason:
            run.refuse_non_finite(parts)
        if run.is_evaluation_step and not run.is_stopping:
            evaluated = run.evaluate()
            saves = saves or not evaluated or run.is_worth_saving()
        if saves:
            run.save()
        if run.is_stopping:
            run.stop()
    run.finish()
    return run.report()


def export(run: Run, report: dict[str, Any], folder: Path) -> None:
    """Adds to the report what is exported and how it does on the test data; rank 0 writes both. A collective."""
    weights, facts = run.model_selection.export_weights()
    report |= facts
    if run.task.test is not None:
        report["test"] = run.metrics_of(run.task.test)
        if report["test"] is None:
            stop_process(report["steps"], report["steps"])
    if run.rank.is_first:
        run.task.export(weights, report, folder)
        write_report(folder, report)
