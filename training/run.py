"""A training run: the one owner of everything that lives from its first step to its last.

    run = Run(config, rank, engine, task)       # resumes from the newest good checkpoint
    run.step(batch); run.record(...); run.evaluate(); run.save(); run.stop()

training/loop.py calls these methods in their order. All ranks call them at the same steps, because most of them are
collectives. The engine counts the steps: ``engine.global_steps``.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from PIL import Image

from priorclip.common.checkpoint_files import step_of
from priorclip.common.masking import masked_command
from priorclip.common.output import get_logger
from priorclip.training.bad_steps import BadSteps, is_finite_norm
from priorclip.training.checkpoints.load import NoGoodCheckpoint, find_newest_good, load_checkpoint, set_all_aside
from priorclip.training.checkpoints.writer import Writer
from priorclip.training.config import RunConfig
from priorclip.training.engine.buffers import average_batch_norms
from priorclip.training.engine.compiling import compile_engine
from priorclip.training.model_selection import ModelSelection
from priorclip.training.monitoring.clock import Clock
from priorclip.training.monitoring.measure import MetricCollector
from priorclip.training.monitoring.metric_log import MetricLog
from priorclip.training.progress import (
    Units,
    done,
    follow_configuration,
    optimizer_settings,
    refuse_other_batch,
    refuse_other_length,
    total_steps,
    written_units,
)
from priorclip.training.ranks.distributed import Rank, any_rank, leave_at_exit, mean_over_ranks, seed_step
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE, EvaluationInterrupted, StopSignal
from priorclip.training.ranks.stop_vote import StopVote
from priorclip.training.ranks.watchdog import Watchdog
from priorclip.training.run_folder import accept_config, recorded_speed
from priorclip.training.step import optimize
from priorclip.training.stream_protocol import Batch
from priorclip.training.task import Evaluate, Task

logger = get_logger(__name__)


class Run:
    """Resumes from the newest good checkpoint of the run directory, if there is one.

    Args:
        config: options of the run; ``prepare_folder`` has written the run directory
        rank: this process
        engine: the model in DeepSpeed
        task: data, losses, evaluation

    Raises:
        ValueError: the checkpoint does not fit the engine, no checkpoint can be read, or an option needs a library that
            is not installed
    """

    def __init__(self, config: RunConfig, rank: Rank, engine: deepspeed.DeepSpeedEngine, task: Task) -> None:
        self.config, self.rank, self.engine, self.task = config, rank, engine, task
        self.folder, self.stream = Path(config.dir), task.stream
        self.last_step = total_steps(config, len(task.stream))
        self.units = Units(config.engine.global_batch, len(task.stream), self.last_step)
        self.feature_losses = task.feature_losses if config.engine.grad_cache else None
        if self.feature_losses and engine.gradient_accumulation_steps() > 1:
            logger.info(
                "gradient caching: %d micro batches of %d on each rank, losses over all %d samples of a step",
                engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu(),
                config.engine.global_batch,
            )  # fmt: skip
        self.model_selection = ModelSelection(config, engine)
        self.stop_signal, self.stop_vote = StopSignal(), StopVote(rank.world_size, rank.device)
        self.bad_steps = BadSteps(config.bad_steps, self.folder, engine, rank, config.engine.precision)
        self.writer = Writer(engine, self.folder / "checkpoints", config.checkpoint, self.model_selection.averages)
        self.watchdog = Watchdog(rank, config.engine.hang_minutes)
        self.evaluation: dict[str, float] = {}  # metrics of the last one
        self.evaluation_is_overdue = False
        self.resume()
        accept_config(self.folder, rank.is_first)
        self.log = self.open_log()
        self.log.describe((self.folder / "config.yaml").read_text(), masked_command(sys.argv))
        self.compilations = compile_engine(engine, config.engine.compile)
        self.clock = Clock(config.engine.global_batch)
        self.metrics = MetricCollector(engine, rank, config, task.model_facts, task.stream)
        self.is_recorded_step = self.is_stopping = False

    def resume(self) -> None:
        """Continues from the newest good checkpoint, or starts over if ``run.checkpoint.resume`` says so."""
        if not self.config.checkpoint.resume:
            set_all_aside(self.writer.folder)
            return
        found = find_newest_good(self.writer.folder)
        if found is None:
            return
        settings = optimizer_settings(self.engine)
        state = load_checkpoint(self.engine, found)
        written, step = written_units(self.engine, state), self.engine.global_steps
        refuse_other_batch(found, written, self.units)
        self.stream.load_state_dict(state["stream"])
        refuse_other_length(found, step, written, self.units)
        if "units" in state:  # a run of version 0.1 goes on as it would have then
            follow_configuration(self.engine, settings)
        self.bad_steps.load_state_dict(state.get("bad_steps", self.bad_steps.state_dict()))
        self.model_selection.load(found, state.get("outcome", {}))
        self.evaluation, self.evaluation_is_overdue = state["evaluation"], state["overdue"]
        logger.info("resumed %s: step %d", found, step)

    def open_log(self) -> MetricLog:
        """The log of the steps after this one."""
        self.start_step = self.engine.global_steps
        return MetricLog(
            self.folder, self.last_step, self.start_step, self.rank.is_first, self.config.progress, self.config.monitor
        )

    @property
    def is_finished(self) -> bool:
        return self.engine.global_steps >= self.last_step or self.model_selection.is_out_of_patience

    @property
    def is_last_step(self) -> bool:
        return self.engine.global_steps == self.last_step

    @property
    def is_evaluation_step(self) -> bool:
        return self.is_last_step or is_multiple(self.engine.global_steps, self.config.evaluate_every * len(self.stream))

    @property
    def is_checkpoint_step(self) -> bool:
        step, config = self.engine.global_steps, self.config.checkpoint
        return (
            self.is_last_step
            or is_multiple(step, config.every or len(self.stream))
            or is_multiple(step, config.keep_every)
        )

    def batches(self) -> Iterator[Batch]:
        """Batches of this rank until the run is finished; measures the wait for each."""
        if self.is_finished:
            return
        stream = iter(self.stream)
        while not self.is_finished:
            self.clock.begin_wait()
            batch = next(stream)
            self.clock.end_wait()
            yield batch

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Takes one optimizer step. Returns the loss and its parts, detached."""
        number = self.engine.global_steps + 1
        is_edge = number in (self.start_step + 1, self.last_step)
        self.is_recorded_step = is_edge or is_multiple(number, self.config.log_every)
        seed_step(self.config.seed, self.engine.global_steps, self.rank.rank)
        self.bad_steps.begin_step()
        with self.metrics.timing(self.is_recorded_step):
            parts = optimize(
                self.engine, batch, self.task.step, self.rank.device, self.feature_losses,
                on_gradients=self.metrics.on_gradients if self.is_recorded_step else None,
                screen_loss=self.bad_steps.screen_loss if self.bad_steps.is_active else None,
            )  # fmt: skip
        self.bad_steps.end_step(float(parts["grad_norm"]) if "grad_norm" in parts else None)
        self.model_selection.update_average()
        self.clock.end_step()
        self.watchdog.count_step()
        return parts

    def handle_bad_step(self, batch: Batch) -> bool:
        """Raises, skips, or rolls back, as ``run.bad_steps.action`` says. Returns True after a rollback.

        The data continues after the bad batch. A new checkpoint keeps that position, so that a resumed run does not
        read the batch again.

        Raises:
            FloatingPointError: the action is raise, or ``run.bad_steps.limit`` is reached
        """
        found = None
        if self.config.bad_steps.action == "rollback":
            self.writer.finish()
            with contextlib.suppress(NoGoodCheckpoint):  # the step is skipped
                found = find_newest_good(self.writer.folder)
        try:
            back_to = step_of(found) if found else None
            self.bad_steps.record(batch["epoch"], self.stream.state_dict(), back_to)
        except FloatingPointError:
            self.close_files()
            raise
        if found is None:
            return False
        state = load_checkpoint(self.engine, found)
        self.bad_steps.load_state_dict(state["bad_steps"])
        self.model_selection.load(found, state.get("outcome", {}))
        self.writer.save({**state, "stream": self.stream.state_dict(), "bad_steps": self.bad_steps.state_dict()}, {})
        self.log.close()
        self.log = self.open_log()
        self.clock.pause()
        return True

    def agree_on_stop(self) -> None:
        """``is_stopping`` becomes True on all ranks if any was told to stop, at most one step late. A collective."""
        waits_anyway = self.is_recorded_step or self.is_checkpoint_step or self.is_evaluation_step
        self.is_stopping = self.stop_vote.ask(self.stop_signal.received, at_once=waits_anyway)

    def record(self, parts: dict[str, torch.Tensor], epoch: int) -> None:
        """Writes the metrics of a recorded step, and moves the progress bar. A collective."""
        step = self.engine.global_steps
        shown: dict[str, float] = {}
        if self.is_recorded_step:
            metrics = self.metrics.collect(parts, self.clock, epoch)
            self.log.write_metrics(step, metrics, self.metrics.ranks)
            shown = {"loss": metrics["train/loss"], "images/s": metrics["train/images_per_second"]}
        self.log.advance(step, shown)

    def refuse_non_finite(self, parts: dict[str, torch.Tensor]) -> None:
        """Ends the run before it saves a model whose loss or gradient is not finite. A collective.

        Raises:
            FloatingPointError: on every rank; the message names the step
        """
        loss = mean_over_ranks({"loss": float(parts["loss"])}, self.rank.device)["loss"]
        norm = parts.get("grad_norm", self.engine.get_global_grad_norm())
        # Under fp16, DeepSpeed skips a step whose gradients overflow and lowers the loss scale.
        is_bad = norm is not None and not is_finite_norm(float(norm)) and self.config.engine.precision != "fp16"
        if math.isfinite(loss) and not any_rank(is_bad, self.rank.device):
            return
        self.close_files()
        raise FloatingPointError(
            f"step {self.engine.global_steps}: the loss is {loss} and its gradient norm"
            f" {'not finite' if is_bad else norm}; lower run.optimizer.lr or lengthen its warmup; checkpoints are in"
            f" {self.folder / 'checkpoints'}"
        )

    def evaluate(self) -> bool:
        """Evaluates the weights used for model selection, and writes metrics and pictures.

        Returns False, and sets ``is_stopping``, if any rank was told to stop.
        """
        if not self.evaluate_selected():
            self.is_stopping = True
        else:
            self.log.write_images(self.engine.global_steps, self.pictures())
        self.clock.pause()
        return not self.is_stopping

    def evaluate_selected(self) -> bool:
        """Evaluates the weights used for model selection and writes their metrics. False if interrupted."""
        with self.model_selection.selected_weights():
            metrics = self.metrics_of(self.task.evaluate)
        if metrics is None:
            return False
        self.model_selection.add_evaluation(metrics)
        self.evaluation = metrics
        self.log.write_metrics(self.engine.global_steps, {f"eval/{name}": value for name, value in metrics.items()})
        return True

    def metrics_of(self, evaluate: Evaluate) -> dict[str, float] | None:
        """Metrics of the engine in eval mode, after averaging batch-norm statistics over the ranks. A collective.

        Returns None if any rank was told to stop. Ranks check together before each forward pass.
        """

        def check_stop(*_: Any) -> None:
            if any_rank(self.stop_signal.received, self.rank.device):
                raise EvaluationInterrupted

        average_batch_norms(self.engine.module, self.rank.world_size)
        self.engine.eval()
        hook = self.engine.register_forward_pre_hook(check_stop)
        try:
            with torch.no_grad():
                metrics = evaluate(self.engine)
        except EvaluationInterrupted:
            return None
        finally:
            hook.remove()
            self.engine.train()
        if self.rank.is_first and metrics:
            logger.info("evaluation: %s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics

    def pictures(self) -> dict[str, Image.Image]:
        """The task's pictures of the current model, by their name in TensorBoard."""
        if self.task.pictures is None:
            return {}
        self.engine.eval()
        with torch.no_grad():
            pictures = self.task.pictures(self.engine)
        self.engine.train()
        return {f"eval/{name}": picture for name, picture in pictures.items()}

    def is_worth_saving(self) -> bool:
        """Whether the evaluation of this step is the best, or the last of the run. A collective."""
        return self.writer.is_best(self.evaluation) or self.model_selection.is_out_of_patience

    def save(self) -> None:
        """Starts to write a checkpoint of this step. A collective.

        Raises:
            CheckpointError: too many checkpoints in a row could not be written
        """
        is_overdue = self.is_evaluation_step and self.is_stopping
        is_evaluated = self.is_evaluation_step and not self.is_stopping
        state = {"stream": self.stream.state_dict(), "evaluation": self.evaluation, "overdue": is_overdue}
        state |= {"bad_steps": self.bad_steps.state_dict(), "outcome": self.model_selection.state_dict()}
        state["units"] = self.units.state_dict()
        self.writer.save(state, self.evaluation if is_evaluated else {})
        self.clock.pause()

    def stop(self) -> NoReturn:
        """Closes the run and ends the process, so that the same command continues it."""
        self.finish(is_complete=False)
        stop_process(self.engine.global_steps, self.last_step)

    def finish(self, is_complete: bool = True) -> None:
        """Waits for the last checkpoint and closes the log. A collective.

        Raises:
            CheckpointError: too many checkpoints in a row could not be written
        """
        self.writer.finish()
        self.watchdog.stop()
        self.log.close(is_complete)

    def close_files(self) -> None:
        """Before an error ends the run."""
        self.writer.finish()
        self.log.close()

    def report(self) -> dict[str, Any]:
        """Results of a finished run."""
        if self.model_selection.is_out_of_patience:
            waited, best = self.model_selection.evaluations_without_better, self.model_selection.best
            logger.info("stopped early: the last %d evaluations were not better than %.4g", waited, best)
        return {
            **done(self.engine, self.units),
            "images_per_second": self.clock.images_per_second() or recorded_speed(self.folder),
            "world_size": self.rank.world_size,
            "zero_stage": self.engine.zero_optimization_stage(),
            "precision": self.config.engine.precision,
            "global_batch": self.config.engine.global_batch,
            "device": self.rank.device.type,
            "evaluation": self.evaluation,
            **(self.compilations.report() if self.compilations else {}),
        }


def stop_process(step: int, last_step: int) -> NoReturn:
    """Ends the process with the exit code at which the batch script requeues the job."""
    logger.warning("stopped at step %d of %d: run the same command again to continue", step, last_step)
    leave_at_exit()
    sys.exit(REQUEUE_EXIT_CODE)


def is_multiple(step: int, every: int) -> bool:
    """Whether ``step`` is a multiple of ``every``; never for 0."""
    return every > 0 and step % every == 0
