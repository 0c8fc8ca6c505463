"""``python -m cluster faults``: does a run survive being shot? The proof, on the machine that it is to run on.

    python -m cluster faults --kills 20 -- pretrain --config c.yaml
    python -m cluster faults --launcher slurm --kills 20 --nodes 2 -- pretrain --config c.yaml

It runs the command once without a disturbance, then again in another run directory, where it kills (SIGKILL) at random
points of the run: one rank, all of them, a node's SLURM step daemon, or a rank in the middle of writing a checkpoint;
or it stops a rank (SIGSTOP), for the run itself to find out (run.engine.hang_minutes), or gives the job the notice that
comes before a time limit. SLURM puts the job back into its queue; on one machine the same command is given again. In
the end the loss of every step and every tensor of the last checkpoint, optimizer included, have to be the same to the
last bit. ``report.json`` and ``report.md`` say how often, of which kind, and what a kill cost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from priorclip.cluster.commands import FaultsConfig, SbatchConfig
from priorclip.cluster.faults.compare_runs import compare
from priorclip.cluster.faults.run_processes import Ranks
from priorclip.cluster.launch.command_line import MODULE
from priorclip.cluster.launch.sbatch import render_script
from priorclip.cluster.launch.start_run import is_alive
from priorclip.training.monitoring.read_metrics import last_record

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.003  # a small checkpoint is written in no more than some ten milliseconds
SPREAD_SECONDS = 0.5  # a step is seen when it is over: kills are to fall into all parts of one
SIGNALS = {"stop": signal.SIGSTOP, "notice": signal.SIGUSR1}
# How often SLURM is asked for what /proc does not say.
ASK_SECONDS = 1.0
# slurmd tells a job's runs apart by the second in which they began.
REST_SECONDS = 2.0


@dataclass
class Kill:
    """One of them, and what became of the run."""

    kind: str
    step: int
    victims: list[str]
    at: float
    torn: bool  # whether a half-written checkpoint was left
    back_after: float | None = None  # seconds until the run was at this step again

    def text(self) -> str:
        back = "the end came first" if self.back_after is None else f"{self.back_after:.1f} s until it was there again"
        torn = "; a half-written checkpoint was left" if self.torn else ""
        return f"step {self.step}, {self.kind}: {', '.join(self.victims)}{torn}; {back}"


@dataclass
class Trial:
    """A run with kills in it: when each is due, and those that were made."""

    folder: Path
    plan: list[tuple[int, str]]
    random: random.Random
    made: list[Kill] = field(default_factory=list)
    aimed: list[psutil.Process] = field(default_factory=list)
    there: list[psutil.Process] = field(default_factory=list)  # all of the run, when one of them was aimed at
    shot: list[psutil.Process] = field(default_factory=list)  # those of the last kill that have not ended yet
    fire_at: float = 0.0
    gone: float = 0.0  # when the last of them had

    def look(self, ranks: Ranks) -> None:
        """Kill, where the next one is due, and note where the run has come back to."""
        if self.shot:
            self.shot, self.gone = [process for process in self.shot if is_alive(process)], time.time()
            return
        record = last_record(self.folder) or {"step": 0, "time": 0.0}
        step = record["step"]
        for kill in self.made:
            if kill.back_after is None and step >= kill.step and record["time"] > self.gone:
                kill.back_after = time.time() - kill.at
        if len(self.made) == len(self.plan):
            return
        due, kind = self.plan[len(self.made)]
        if step < due or any(kill.back_after is None for kill in self.made):
            return
        if not self.aimed:
            self.aimed, self.there = ranks.victims(kind, self.random), ranks.all()
            self.fire_at = time.time() + self.random.uniform(0, SPREAD_SECONDS)
        if self.aimed and (is_writing(self.folder) if kind == "write" else time.time() >= self.fire_at):
            self.kill(kind, step, ranks)

    def kill(self, kind: str, step: int, ranks: Ranks) -> None:
        aimed = [process for process in self.aimed if process.is_running()]
        names = [ranks.name(process) for process in aimed]
        job = ranks.job() if kind == "notice" else None
        for process in aimed if job is None else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(SIGNALS.get(kind, signal.SIGKILL))
        if job:
            subprocess.run(["scancel", "--signal=USR1", job], check=True)
        self.aimed = []
        if aimed:
            self.shot = self.there
            self.made.append(Kill(kind, step, names, time.time(), is_writing(self.folder)))
            logger.info("kill %d of %d: %s at step %d", len(self.made), len(self.plan), kind, step)


def faults(config: FaultsConfig, run: Sequence[str]) -> int:
    """Make the trial; returns 0 where the run survived all and came out the same.

    Raises:
        ValueError: the request makes no sense; nothing was started.
    """
    if not MODULE.fullmatch(run[0]):
        raise ValueError(f"'{run[0]}' is not the name of a module: pretrain, or finetune with its sub-command first")
    if "daemon" in config.kinds and config.launcher != "slurm":
        raise ValueError("--kinds: a step daemon is SLURM's, for --launcher slurm")
    if config.kills < 1:
        raise ValueError(f"--kills {config.kills}: at least one is needed")
    folder = Path(config.folder).absolute()
    if (folder / "whole").exists() or (folder / "shot").exists():
        raise ValueError(f"{folder} has a trial in it already: name another --folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("the run without a disturbance, in %s", folder / "whole")
    whole_seconds = execute(config, run, Trial(folder / "whole", [], random.Random()))
    last = (last_record(folder / "whole") or {"step": 0})["step"]
    trial = Trial(folder / "shot", plan_kills(config, last), random.Random(config.seed))
    logger.info("the run with %d kills in %d steps, in %s", config.kills, last, trial.folder)
    shot_seconds = execute(config, run, trial)
    differences = compare(folder / "whole", trial.folder)
    report = {
        "command": list(run),
        "launcher": config.launcher,
        "steps": last,
        "wanted": config.kills,
        "kills": len(trial.made),
        "by_kind": {kind: sum(kill.kind == kind for kill in trial.made) for kind in config.kinds},
        "seconds_whole": round(whole_seconds, 1),
        "seconds_shot": round(shot_seconds, 1),
        "seconds_lost_a_kill": round((shot_seconds - whole_seconds) / max(1, len(trial.made)), 1),
        "same": not differences,
        "differences": differences,
        "each": [vars(kill) for kill in trial.made],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(text_of(report, trial.made))
    print(text_of(report, trial.made))
    return 0 if not differences and len(trial.made) == config.kills else 1


def plan_kills(config: FaultsConfig, last: int) -> list[tuple[int, str]]:
    """(step, kind) of each kill, over the whole run; every kind as often as the others, in a random order.

    Raises:
        ValueError: the run has too few steps.
    """
    if last <= config.kills:
        raise ValueError(f"a run of {last} steps has no room for {config.kills} kills: more steps or fewer kills")
    chance = random.Random(config.seed)
    kinds = [config.kinds[number % len(config.kinds)] for number in range(config.kills)]
    chance.shuffle(kinds)
    return list(zip(sorted(chance.sample(range(1, last), config.kills)), kinds, strict=True))


def execute(config: FaultsConfig, run: Sequence[str], trial: Trial) -> float:
    """Until the run has finished, started again as often as it has to be; returns the seconds that it took."""
    words = [*run, "--run.dir", str(trial.folder), "--run.log_every", "1", "--run.progress", "false"]
    ranks = Ranks(str(trial.folder))
    begun = time.time()
    through = on_slurm if config.launcher == "slurm" else on_this_machine
    for _ in through(config, words, trial.folder):
        trial.look(ranks)
        time.sleep(POLL_SECONDS)
    return time.time() - begun


def on_this_machine(config: FaultsConfig, words: Sequence[str], folder: Path) -> Iterator[None]:
    """Yields while the run goes on; a run that ended before its time is started again, as a scheduler would."""
    command = [sys.executable, "-m", "priorclip.cluster", "launch", "--nproc", str(config.nproc), "--", *words]
    for attempt in range(config.kills * 2 + 1):
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                yield
        if process.returncode == 0:
            return
        logger.info("attempt %d ended with exit code %d", attempt + 1, process.returncode)
    raise RuntimeError(f"the run does not finish: see {log.name}")


def on_slurm(config: FaultsConfig, words: Sequence[str], folder: Path) -> Iterator[None]:
    """Yields while the job is queued or runs; SLURM itself puts it back after a kill."""
    logs = folder.parent / "logs"
    logs.mkdir(exist_ok=True)
    settings = SbatchConfig(
        nodes=config.nodes, gpus_per_node=config.gpus_per_node, ranks_per_node=config.nproc, cpus_per_task=1,
        time=config.time, partition=config.partition, account=config.account, job_name=f"faults-{folder.name}",
        logs=str(logs), retries=2 * config.kills + 1, template=config.template,
    )  # fmt: skip
    done = subprocess.run(["sbatch"], input=render_script(settings, words), text=True, check=False, capture_output=True)
    if done.returncode:
        raise ValueError(f"sbatch refuses the job: {done.stderr.strip()}")
    job = done.stdout.split()[-1]
    asked, fields = 0.0, {"JobState": "PENDING"}
    rested_from: float | None = None
    while fields["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
        yield
        if time.time() - asked >= ASK_SECONDS:
            asked = time.time()
            shown = subprocess.run(["scontrol", "-o", "show", "job", job], text=True, capture_output=True, check=False)
            fields = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word) or fields
            # A job that was put back rests for two minutes, for its last run to be cleared away.
            if fields.get("Reason") != "BeginTime" or left_of(job):
                rested_from = None
            elif rested_from is None:
                rested_from = asked
            elif config.hasten and asked - rested_from >= REST_SECONDS:
                start = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
                subprocess.run(start, capture_output=True, check=False)
    if fields["JobState"] != "COMPLETED":
        raise RuntimeError(f"job {job} ended as {fields['JobState']}: see {logs}")


def left_of(job: str) -> bool:
    """Whether a step daemon of the job is still there."""
    titles = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return any(title.startswith(f"slurmstepd: [{job}.") for title in titles)


def is_writing(folder: Path) -> bool:
    """Whether the files of a checkpoint are being written."""
    return any(path.suffix.startswith(".partial") for path in (folder / "checkpoints").glob("step_*.partial*"))


def text_of(report: dict[str, Any], kills: list[Kill]) -> str:
    """For people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["by_kind"].items())
    verdict = (
        "The loss of every step and every tensor of the last checkpoint are the same to the last bit."
        if report["same"]
        else "NOT THE SAME: " + "; ".join(report["differences"][:5])
    )
    left = report["wanted"] - report["kills"]
    short = [f"THE RUN ENDED BEFORE {left} MORE KILLS: take more steps, or fewer kills."] if left else []
    lines = [
        f"# {report['kills']} kills survived ({kinds})",
        "",
        f"`{' '.join(report['command'])}`, {report['steps']} steps, launcher {report['launcher']}.",
        f"{report['seconds_whole']} s without a kill, {report['seconds_shot']} s with them:"
        f" {report['seconds_lost_a_kill']} s lost a kill.",
        verdict,
        *short,
        "",
        *(f"* {kill.text()}" for kill in kills),
    ]
    return "\n".join(lines) + "\n"
