"""The kills of a trial: when each is due, which processes it kills, and when the run has recovered.

trial = Trial(Path("runs/faults/shot"), plan_kills(config, last_step=400), random.Random(0))
while running: trial.update(RunProcesses("runs/faults/shot"))
trial.kills[0].text()     # "step 7, rank: rank 1 (process 4711); back at this step after 12.3 s"
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from priorclip.cluster.commands import FaultsConfig
from priorclip.cluster.faults.run_processes import RunProcesses
from priorclip.cluster.launch.start_run import is_alive
from priorclip.common.output import get_logger
from priorclip.training.monitoring.read_metrics import last_record

logger = get_logger(__name__)

SPREAD_SECONDS = 0.5  # a finished step is the trigger: a random delay moves the kill into all parts of the next step
SIGNALS = {"stop": signal.SIGSTOP, "notice": signal.SIGUSR1}


@dataclass
class Kill:
    """One kill and the recovery of the run."""

    kind: str
    step: int
    processes: list[str]
    time: float
    partial_checkpoint: bool  # a partly written checkpoint was left
    recovery_seconds: float | None = None  # until the run was at this step again

    def text(self) -> str:
        recovery = (
            "the run ended before this step"
            if self.recovery_seconds is None
            else f"back at this step after {self.recovery_seconds:.1f} s"
        )
        partial = "; a partly written checkpoint was left" if self.partial_checkpoint else ""
        return f"step {self.step}, {self.kind}: {', '.join(self.processes)}{partial}; {recovery}"

    def record(self) -> dict[str, Any]:
        """The entry in report.json."""
        return {"kind": self.kind, "step": self.step, "victims": self.processes, "at": self.time,
                "torn": self.partial_checkpoint, "back_after": self.recovery_seconds}  # fmt: skip


@dataclass
class Trial:
    """A run with planned kills, (step, kind) each, and the kills so far."""

    folder: Path
    plan: list[tuple[int, str]]
    random: random.Random
    kills: list[Kill] = field(default_factory=list)
    targets: list[psutil.Process] = field(default_factory=list)  # of the next kill
    ranks: list[psutil.Process] = field(default_factory=list)  # all ranks when the targets were chosen
    ending: list[psutil.Process] = field(default_factory=list)  # ranks of the killed run that are still alive
    kill_at: float = 0.0
    ended_at: float = 0.0  # when the last of them had ended

    def update(self, processes: RunProcesses) -> None:
        """Makes the next kill if it is due, and notes the recovery after the last one."""
        if self.ending:
            self.ending, self.ended_at = [process for process in self.ending if is_alive(process)], time.time()
            return
        record = last_record(self.folder) or {"step": 0, "time": 0.0}
        step = record["step"]
        for kill in self.kills:
            if kill.recovery_seconds is None and step >= kill.step and record["time"] > self.ended_at:
                kill.recovery_seconds = time.time() - kill.time
        if len(self.kills) == len(self.plan):
            return
        due, kind = self.plan[len(self.kills)]
        if step < due or any(kill.recovery_seconds is None for kill in self.kills):
            return
        if not self.targets:
            self.targets, self.ranks = processes.choose(kind, self.random), processes.ranks()
            self.kill_at = time.time() + self.random.uniform(0, SPREAD_SECONDS)
        if self.targets and (is_writing(self.folder) if kind == "write" else time.time() >= self.kill_at):
            self.kill(kind, step, processes)

    def kill(self, kind: str, step: int, processes: RunProcesses) -> None:
        """Sends the signal of the kind to the targets, or the notice to their SLURM job."""
        targets = [process for process in self.targets if process.is_running()]
        names = [processes.name(process) for process in targets]
        job = processes.job() if kind == "notice" else None
        for process in targets if job is None else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGNALS.get(kind, signal.SIGKILL))
        if job:
            subprocess.run(["scancel", "--signal=USR1", job], check=True)
        self.targets = []
        if targets:
            self.ending = self.ranks
            self.kills.append(Kill(kind, step, names, time.time(), is_writing(self.folder)))
            logger.info("kill %d of %d: %s at step %d", len(self.kills), len(self.plan), kind, step)


def plan_kills(config: FaultsConfig, last_step: int) -> list[tuple[int, str]]:
    """Returns (step, kind) of each kill, spread over the run. All kinds are equally frequent, in a random order.

    Raises:
        ValueError: the run has too few steps.
    """
    if last_step <= config.kills:
        raise ValueError(
            f"a run of {last_step} steps is too short for {config.kills} kills: use more steps or fewer kills"
        )
    chance = random.Random(config.seed)
    kinds = [config.kinds[number % len(config.kinds)] for number in range(config.kills)]
    chance.shuffle(kinds)
    return list(zip(sorted(chance.sample(range(1, last_step), config.kills)), kinds, strict=True))


def is_writing(folder: Path) -> bool:
    """Whether the run writes the files of a checkpoint now."""
    return any(path.suffix.startswith(".partial") for path in (folder / "checkpoints").glob("step_*.partial*"))
