"""Starts a run again until it has finished: the same command on this machine, or a job that SLURM requeues."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from priorclip.cluster.commands import FaultsConfig, SbatchConfig
from priorclip.cluster.launch.sbatch import render_script
from priorclip.common.output import get_logger

logger = get_logger(__name__)

ASK_SECONDS = 1.0  # between two questions to SLURM
REST_SECONDS = 2.0  # slurmd distinguishes two runs of a job by the second in which they start


def on_this_machine(config: FaultsConfig, words: Sequence[str], folder: Path) -> Iterator[None]:
    """Yields while the run is alive. Starts a run that ended too early again, as a scheduler does.

    Raises:
        RuntimeError: the run does not finish.
    """
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
    """Yields while the job is queued or runs. SLURM itself requeues it after a kill.

    Raises:
        ValueError: sbatch refuses the job.
        RuntimeError: the job does not complete.
    """
    logs = folder.parent / "logs"
    logs.mkdir(exist_ok=True)
    settings = SbatchConfig(
        nodes=config.nodes, gpus_per_node=config.gpus_per_node, ranks_per_node=config.nproc, cpus_per_task=1,
        time=config.time, partition=config.partition, account=config.account, job_name=f"faults-{folder.name}",
        logs=str(logs), retries=2 * config.kills + 1, template=config.template,
    )  # fmt: skip
    script = render_script(settings, words)
    done = subprocess.run(["sbatch"], input=script, text=True, check=False, capture_output=True)
    if done.returncode:
        raise ValueError(f"sbatch refuses the job: {done.stderr.strip()}")
    job = done.stdout.split()[-1]
    asked, fields = 0.0, {"JobState": "PENDING"}
    steps_ended: float | None = None  # when the steps of a requeued job had ended
    while fields["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
        yield
        if time.time() - asked >= ASK_SECONDS:
            asked = time.time()
            shown = subprocess.run(["scontrol", "-o", "show", "job", job], text=True, capture_output=True, check=False)
            fields = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word) or fields
            # SLURM delays a requeued job by two minutes, so that it can clean up the last run.
            if fields.get("Reason") != "BeginTime" or has_step_daemon(job):
                steps_ended = None
            elif steps_ended is None:
                steps_ended = asked
            elif config.hasten and asked - steps_ended >= REST_SECONDS:
                start = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
                subprocess.run(start, capture_output=True, check=False)
    if fields["JobState"] != "COMPLETED":
        raise RuntimeError(f"job {job} ended as {fields['JobState']}: see {logs}")


def has_step_daemon(job: str) -> bool:
    """Whether a step daemon of the job still runs on this machine."""
    titles = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return any(title.startswith(f"slurmstepd: [{job}.") for title in titles)
