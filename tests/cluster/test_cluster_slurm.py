"""A real SLURM of two nodes on this machine: ``cluster sbatch``, a stop before the limit, the requeue, the same end."""

from __future__ import annotations

from pathlib import Path

from loopback_slurm import Slurm
from toy_launches import PYTHON, STOPPABLE, ToyRun, assert_same, execute, toy_arguments


def submit(slurm: Slurm, logs: Path, folder: Path, *words: str) -> str:
    """The job's number."""
    options = ("--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1", "--cpus-per-task", "1", "--time", "10",
               "--logs", str(logs), "--job-name", "toy")  # fmt: skip
    run = ("--", "tests.cluster.toy_run", *toy_arguments(folder, *words))
    done = execute([PYTHON, "-m", "cluster", "sbatch", *options, *run], slurm.environment)
    assert done.returncode == 0, done.stdout
    return done.stdout.split()[-1]


def test_job_that_stops_is_requeued_and_ends_the_same(slurm: Slurm, toys: dict[str, ToyRun], tmp_path: Path) -> None:
    logs, folder = tmp_path / "logs", tmp_path / "run"
    job = submit(slurm, logs, folder, *STOPPABLE, "--kill_at", "6")
    ended, output = slurm.wait(job, logs)
    assert ended["JobState"] == "COMPLETED", (ended, output)
    assert ended["Restarts"] == "1"
    assert "goes back into the queue" in output
    assert "stopped at step 7 of 12" in output
    assert sorted(path.name for path in logs.iterdir()) == [
        f"toy-{job}-0-node0.log",
        f"toy-{job}-1-node1.log",
        f"toy-{job}.log",
    ]
    assert_same(ToyRun(folder), toys["whole"])


def test_rank_that_dies_fails_the_job(slurm: Slurm, tmp_path: Path) -> None:
    logs, folder = tmp_path / "logs", tmp_path / "run"
    ended, output = slurm.wait(submit(slurm, logs, folder, "--die_at", "3"), logs)
    assert ended["JobState"] == "FAILED", (ended, output)
    assert "task 1: Exited with exit code 3" in output, "SLURM names the rank"
    assert ended["Restarts"] == "0"
    assert not (folder / "report.json").exists()
