"""Packing as a real SLURM array and as a step of several tasks writes the same bytes as one process."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from pathlib import Path

import pytest
from loopback_slurm import Slurm, text_of
from toy_launches import PYTHON, ROOT, environment, execute

ARRAY = ("--array=0-2", "--ntasks=1", "--cpus-per-task=1", "--time=5", "--wait", "--parsable")


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file, also of hidden ones."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def command() -> list[str]:
    """Packs drawn scenes into seven shards. The tests add --output."""
    words = "pack --source synthetic --count 28 --size 48 --shard-size 4 --workers 1 --duplicates drop --output"
    return [PYTHON, "-m", "data_shards", *words.split()]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    done = execute([*command, str(folder)])
    assert done.returncode == 0, done.stdout
    assert json.loads((folder / "manifest.json").read_text())["samples"] == 28
    return contents(folder)


def array(slurm: Slurm, folder: Path, script: str) -> tuple[int, str]:
    """Exit code of an array job of three tasks, and their output."""
    folder.mkdir(exist_ok=True)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\ncd {shlex.quote(str(ROOT))}\n{script}\n")
    done = execute(["sbatch", *ARRAY, f"--output={logs}/%A-%a.log", str(path)], slurm.environment)
    return done.returncode, f"{done.stdout}{text_of(logs)}"


def test_array_that_fails_and_is_submitted_again(
    slurm: Slurm, command: list[str], whole: dict[str, str], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    line = shlex.join([*command, str(shards)])
    broken = f'[ "$SLURM_ARRAY_TASK_ID" = 1 ] && ulimit -f 8\n{line}'  # too small for a shard: SIGXFSZ, or an OSError
    code, output = array(slurm, tmp_path / "first", broken)
    assert code != 0, output
    assert not (shards / "manifest.json").exists()
    assert {path.stem for path in (shards / ".pack").glob("shard-*.json")} == {
        f"shard-{number:06d}" for number in range(7) if number % 3 != 1
    }, output
    code, output = array(slurm, tmp_path / "second", line)
    assert code == 0, output
    assert "28 samples" in output
    assert contents(shards) == whole


@pytest.mark.parametrize("mpi", ["none"])
def test_step_of_several_tasks(
    slurm: Slurm, command: list[str], whole: dict[str, str], tmp_path: Path, mpi: str
) -> None:
    """Each task packs its share. If SLURM offers MPI, rank 0 distributes the shards."""
    shards = tmp_path / "shards"
    step = ["srun", f"--mpi={mpi}", "--nodes=2", "--ntasks=2", "--time=5", "--chdir", str(ROOT), *command, str(shards)]
    done = subprocess.run(
        step, env={**environment(), **slurm.environment}, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert ("2 MPI ranks" in done.stderr) == (mpi == "pmix")
    assert "28 samples" in done.stdout
    assert contents(shards) == whole
