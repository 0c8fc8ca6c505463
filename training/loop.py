"""The loop that every run shares: batches -> steps -> metrics, evaluations and checkpoints, until the last step.

What differs between the stages comes in as two functions: ``step(engine, batch) -> (loss, parts)`` and
``evaluate() -> figures``. The stream hands each rank its share of the global batch; what is needed to go on after a
stop is the engine's state and the stream's ``(epoch, samples_seen)``, for dropout is seeded by the step.

    report = train(config, rank, engine, stream, step, evaluate)     # {"steps": 300, "images_per_second": 210.4, ...}
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import deepspeed
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from timm.utils.distributed import distribute_bn

from priorclip.common.masking import masked_command, masked_values
from priorclip.training.bad_steps import BadSteps, no_update
from priorclip.training.checkpoints import files as checkpoint
from priorclip.training.checkpoints.writer import Writer
from priorclip.training.config import RunConfig
from priorclip.training.engine.grad_cache import FeatureLosses, backward_cached
from priorclip.training.model_selection import Outcome
from priorclip.training.monitoring.measure import Subject, Watch
from priorclip.training.monitoring.metric_log import MetricLog
from priorclip.training.monitoring.read_metrics import records
from priorclip.training.ranks.distributed import Rank, any_rank, leave_at_exit, mean_over_ranks, seed_step
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE, Notice, Noticed
from priorclip.training.ranks.run_lock import hold
from priorclip.training.ranks.watchdog import Watchdog

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Step = Callable[[deepspeed.DeepSpeedEngine, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
Evaluate = Callable[[], dict[str, float]]
Draw = Callable[[], dict[str, Image.Image]]
# Takes the loss of a step before its last backward pass: the factor of its gradient, NaN for a step to be dropped.
Judge = Callable[[torch.Tensor], torch.Tensor]


class Stream(Protocol):
    """What the loop needs of a data stream: batches for ever, their number in an epoch, and a position."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


def total_steps(config: RunConfig, steps_an_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.epochs * steps_an_epoch
    return min(steps, config.max_steps) if config.max_steps else steps


def prepare_folder(config: Any, run: RunConfig, rank: Rank) -> Path:
    """The run directory with the resolved configuration in it. ``config`` is the whole dataclass of the command.

    Raises:
        ValueError: another run is in it
    """
    folder, problem = Path(run.dir), [""]
    if rank.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        problem = [hold(folder)]
        if not problem[0]:
            checkpoint.replace_text(folder / "config.yaml", to_yaml(config))
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    return folder


def to_yaml(config: Any) -> str:
    """A dataclass as YAML that ``--config`` reads back, but for secrets, which are masked."""
    values = masked_values(json.loads(json.dumps(dataclasses.asdict(config))))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def train(
    config: RunConfig,
    rank: Rank,
    engine: deepspeed.DeepSpeedEngine,
    stream: Stream,
    step: Step,
    evaluate: Evaluate,
    split: FeatureLosses | None = None,
    draw: Draw | None = None,
    subject: Subject | None = None,
    outcome: Outcome | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Run to the last step, from the newest good checkpoint where there is one; returns the run's figures.

    With ``split``, the step in two halves, gradient caching takes the place of gradient accumulation.

    A SIGTERM or SIGUSR1 on any rank ends the process with REQUEUE_EXIT_CODE after a checkpoint of the step at hand. An
    evaluation that it comes in is left at its next batch, and made when the run goes on.

    Raises:
        FloatingPointError: the loss is not finite, or was too often; the message names the step.
        CheckpointError: checkpoints cannot be written.
    """
    folder = Path(config.dir)
    notice = notice or Notice()
    last = total_steps(config, len(stream))
    bad = BadSteps(config.bad_steps, folder, engine, rank, config.engine.precision)
    outcome = outcome or Outcome(config, engine)
    writer = Writer(engine, folder / "checkpoints", config.checkpoint, outcome.averages)
    watchdog = Watchdog(rank, config.engine.hang_minutes)
    evaluation, overdue = resume(config, folder, engine, stream, bad, outcome)
    started_at = engine.global_steps
    log = MetricLog(folder, last, started_at, rank.is_first, config.progress, config.monitor)
    log.describe((folder / "config.yaml").read_text(), masked_command(sys.argv))
    clock = Clock(config.engine.global_batch)
    watch = Watch(engine, rank, config, subject or Subject(), stream)

    def wind_up(finished: bool = False) -> None:
        writer.finish()
        watchdog.stop()
        log.close(finished)

    if overdue:
        found = judged(outcome, engine, evaluate, rank, notice)
        if found is None:
            wind_up()
            stop_here(started_at, last)
        evaluation = found
        log.numbers(started_at, {f"eval/{name}": value for name, value in evaluation.items()})

    batches = iter(stream) if started_at < last and not outcome.is_over else iter(())
    while engine.global_steps < last and not outcome.is_over:
        upcoming = engine.global_steps + 1
        recorded = upcoming in (started_at + 1, last) or is_multiple(upcoming, config.log_every)
        clock.wait()
        batch = next(batches)
        clock.work()
        seed_step(config.seed, engine.global_steps, rank.rank)
        bad.begin()
        with watch.step(recorded):
            look = watch.gradients if recorded else None
            parts = optimize(engine, batch, step, rank.device, split, look, bad.judge if bad.active else None)
        bad.end(float(parts["grad_norm"]) if "grad_norm" in parts else None)
        done = engine.global_steps
        outcome.stepped()
        clock.stepped()
        watchdog.moved()
        if bad.reason and go_back(bad, writer, log, engine, stream, batch, outcome):
            started_at = engine.global_steps
            log.close()
            log = MetricLog(folder, last, started_at, rank.is_first, config.progress, config.monitor)
            clock.pause()
            continue

        stopping = any_rank(notice.given, rank.device)
        evaluating = done == last or is_multiple(done, config.evaluate_every * len(stream))
        saving = (
            stopping
            or done == last
            or is_multiple(done, config.checkpoint.every or len(stream))
            or is_multiple(done, config.checkpoint.keep_every)
        )
        if recorded:
            figures = watch.figures(parts, clock, batch["epoch"])
            log.numbers(done, figures, watch.ranks)
            log.advance(done, {"loss": figures["train/loss"], "images/s": figures["train/images_per_second"]})
            if not bad.reason:
                refuse_non_finite(engine, parts, config, rank, log, writer)
        else:
            log.advance(done, {})
            if saving and not bad.reason:
                refuse_non_finite(engine, parts, config, rank, log, writer)

        if evaluating and not stopping:
            found = judged(outcome, engine, evaluate, rank, notice)
            if found is None:
                stopping = saving = True
            else:
                evaluation = found
                log.numbers(done, {f"eval/{name}": value for name, value in evaluation.items()})
                log.pictures(done, drawn(engine, draw))
                saving = saving or writer.is_best(evaluation) or outcome.is_over
            clock.pause()
        if saving:
            state = {"stream": stream.state_dict(), "evaluation": evaluation, "overdue": evaluating and stopping}
            fresh = evaluation if evaluating and not stopping else {}
            writer.save({**state, "bad_steps": bad.state_dict(), "outcome": outcome.state_dict()}, fresh)
            clock.pause()
        if stopping:
            wind_up()
            stop_here(done, last)
    wind_up(finished=True)
    if outcome.is_over:
        logger.info("stopped early: the last %d evaluations were not better than %.4g", outcome.waited, outcome.best)
        last = engine.global_steps
    return {
        "steps": last,
        "epochs": last / len(stream),
        "samples_seen": last * config.engine.global_batch,
        "images_per_second": clock.images_per_second() or recorded_speed(folder),
        "world_size": rank.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "precision": config.engine.precision,
        "global_batch": config.engine.global_batch,
        "device": rank.device.type,
        "evaluation": evaluation,
    }


def resume(
    config: RunConfig, folder: Path, engine: deepspeed.DeepSpeedEngine, stream: Stream, bad: BadSteps, outcome: Outcome
) -> tuple[dict[str, float], bool]:
    """Continue from the newest good checkpoint of the run directory, if any.

    Returns its last evaluation, and whether one is due that the stop left no time for.
    """
    found = checkpoint.newest_good(folder / "checkpoints") if config.checkpoint.resume else None
    if found is None:
        return {}, False
    state = checkpoint.load(engine, found)
    stream.load_state_dict(state["stream"])
    bad.load_state_dict(state.get("bad_steps", bad.state_dict()))
    outcome.load(found, state.get("outcome", {}))
    logger.info("resumed %s: step %d", found, engine.global_steps)
    return state["evaluation"], state["overdue"]


def go_back(
    bad: BadSteps,
    writer: Writer,
    log: MetricLog,
    engine: deepspeed.DeepSpeedEngine,
    stream: Stream,
    batch: Batch,
    outcome: Outcome,
) -> bool:
    """What the run was told to do about a bad step; whether it has gone back to a checkpoint. A collective.

    The data goes on after the bad batch, and that is written down in a checkpoint, lest a resume meet it again.
    """
    found = None
    if bad.config.action == "rollback":
        writer.finish()
        found = checkpoint.newest_good(writer.folder)
    try:
        bad.record(batch["epoch"], stream.state_dict(), checkpoint.step_of(found) if found else None)
    except FloatingPointError:
        writer.finish()
        log.close()
        raise
    if found is None:
        return False
    state = checkpoint.load(engine, found)
    bad.load_state_dict(state["bad_steps"])
    outcome.load(found, state.get("outcome", {}))
    writer.save({**state, "stream": stream.state_dict(), "bad_steps": bad.state_dict()}, {})
    return True


def optimize(
    engine: deepspeed.DeepSpeedEngine,
    batch: Batch,
    step: Step,
    device: torch.device,
    split: FeatureLosses | None = None,
    look: Callable[[], None] | None = None,
    judge: Judge | None = None,
) -> dict[str, torch.Tensor]:
    """One optimizer step on this rank's share of the global batch; returns the loss and its parts, detached.

    A tensor in the batch has one row a sample; anything else goes to every micro step as it is. Of several micro
    batches, each has losses of its own, whose means are returned, or with ``split`` all have those of the whole batch.
    ``look`` is called when the gradient is whole, before the optimizer takes it.
    What ``judge`` finds bad leaves weights and optimizer as they are.
    """
    pieces = engine.gradient_accumulation_steps()
    totals: dict[str, torch.Tensor] = {}

    def stepped() -> None:
        if look is not None and engine.is_gradient_accumulation_boundary():
            look()
        plain = engine.zero_optimization_stage() == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled())
        if plain and engine.is_gradient_accumulation_boundary():
            # Without ZeRO and in float32, DeepSpeed clips but keeps no record of the norm.
            gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
            totals["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
            if judge is not None and not math.isfinite(float(totals["grad_norm"])):
                with no_update(engine.optimizer):
                    engine.step()
                return
        engine.step()

    micro_batches = [partial(micro_batch, batch, piece, pieces, device) for piece in range(pieces)]
    if split is not None and pieces > 1:
        loss, parts = backward_cached(engine, micro_batches, batch, split, stepped, judge)
        return totals | {name: value.float() for name, value in {"loss": loss, **parts}.items()}
    for number, get in enumerate(micro_batches, start=1):
        loss, parts = step(engine, get())
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / pieces
        engine.backward(loss if judge is None or number < pieces else loss * judge(totals["loss"]))
        stepped()
    return totals


def micro_batch(batch: Batch, piece: int, pieces: int, device: torch.device) -> Batch:
    """The rows of one of several equal pieces, on the device."""
    return {
        name: value.tensor_split(pieces)[piece].to(device, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def refuse_non_finite(
    engine: deepspeed.DeepSpeedEngine,
    parts: dict[str, torch.Tensor],
    config: RunConfig,
    rank: Rank,
    log: MetricLog,
    writer: Writer,
) -> None:
    """End the run, on every rank, where the loss or its gradient is not a number, before a checkpoint is made of it."""
    loss = mean_over_ranks({"loss": float(parts["loss"])}, rank.device)["loss"]
    norm = parts.get("grad_norm", engine.get_global_grad_norm())
    # Under fp16 DeepSpeed skips a step whose gradients overflow and lowers the loss scale.
    burst = norm is not None and not math.isfinite(float(norm)) and config.engine.precision != "fp16"
    if math.isfinite(loss) and not any_rank(burst, rank.device):
        return
    writer.finish()
    log.close()
    raise FloatingPointError(
        f"step {engine.global_steps}: the loss is {loss} and its gradient norm {'not finite' if burst else norm}; lower"
        f" run.optimizer.lr or lengthen its warmup; checkpoints are in {Path(config.dir) / 'checkpoints'}"
    )


def stop_here(step: int, last: int) -> NoReturn:
    logger.warning("stopped at step %d of %d: run the same command again to go on", step, last)
    leave_at_exit()
    sys.exit(REQUEUE_EXIT_CODE)


def evaluated(
    engine: deepspeed.DeepSpeedEngine, evaluate: Evaluate, rank: Rank, notice: Notice
) -> dict[str, float] | None:
    """Figures of the model as it stands, after averaging batch-norm statistics, which each rank gathered alone.

    None where the notice came, on any rank: each time the engine is called, which is as often on all, they agree on it.
    """

    def leave(*_: Any) -> None:
        if any_rank(notice.given, rank.device):
            raise Noticed

    if rank.world_size > 1:
        distribute_bn(engine.module, rank.world_size, reduce=True)
    engine.eval()
    hook = engine.register_forward_pre_hook(leave)
    try:
        with torch.no_grad():
            figures = evaluate()
    except Noticed:
        return None
    finally:
        hook.remove()
        engine.train()
    if rank.is_first and figures:
        logger.info("evaluation: %s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return figures


def judged(
    outcome: Outcome, engine: deepspeed.DeepSpeedEngine, evaluate: Evaluate, rank: Rank, notice: Notice
) -> dict[str, float] | None:
    """The evaluation of what the run is judged by, of which note is taken; None as of ``evaluated``."""
    with outcome.judged():
        figures = evaluated(engine, evaluate, rank, notice)
    if figures is not None:
        outcome.sees(figures)
    return figures


def drawn(engine: deepspeed.DeepSpeedEngine, draw: Draw | None) -> dict[str, Image.Image]:
    """The training's pictures of the model as it stands, by their name in TensorBoard."""
    if draw is None:
        return {}
    engine.eval()
    with torch.no_grad():
        pictures = draw()
    engine.train()
    return {f"eval/{name}": picture for name, picture in pictures.items()}


def recorded_speed(folder: Path) -> float | None:
    """Median images/s in metrics.jsonl, for a run that was finished before this process began."""
    speeds = [record.get("train/images_per_second") for record in records(folder)]
    known = [speed for speed in speeds if speed]
    return statistics.median(known) if known else None


class Clock:
    """Time a step takes and the share of it spent waiting for data; evaluations and checkpoints do not count."""

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.read_from = 0
        self.begun: float | None = None
        self.got = 0.0

    def wait(self) -> None:
        self.asked = time.perf_counter()
        if self.begun is None:
            self.begun = self.asked

    def work(self) -> None:
        self.got = time.perf_counter()

    def stepped(self) -> None:
        assert self.begun is not None
        now = time.perf_counter()
        self.steps.append(now - self.begun)
        self.waits.append(self.got - self.asked)
        self.begun = now

    def pause(self) -> None:
        self.begun = None

    def read(self) -> tuple[list[float], list[float]]:
        """Seconds of the steps since the last reading, and of them those spent waiting for data."""
        steps, waits = self.steps[self.read_from :], self.waits[self.read_from :]
        self.read_from = len(self.steps)
        return steps, waits

    def images_per_second(self) -> float | None:
        """Over the whole run, without its first steps, in which kernels and workers warm up."""
        steady = self.steps[2:] or self.steps
        return self.global_batch * len(steady) / sum(steady) if steady else None
