"""Packing with several processes, MPI ranks and array tasks: the same bytes, also if some are killed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from small_data import image_folder
from test_data_pack import contents

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.pack.selection import Selection
from priorclip.data_shards.pack.unfinished_folder import finish_folder
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool, find_task_share, mpi_world

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300
SHARDS = 18
DUPLICATES = ("--duplicates", "merge", "--near-duplicates", "6")


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of this process without the variables of a launcher."""
    foreign = ("SLURM_", "OMPI_", "PMI")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def array_task(task: int, count: int = 3) -> dict[str, str]:
    """Returns the variables of SLURM for a task of --array=4-8:2 (three tasks)."""
    names = {"ID": 4 + 2 * task, "COUNT": count, "MIN": 4, "MAX": 4 + 2 * (count - 1), "STEP": 2}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def mpirun(ranks: int) -> list[str]:
    program = shutil.which("mpirun")
    if program is None and os.environ.get("CI") == "true":
        pytest.fail("mpirun is missing: apt-get install openmpi-bin")
    if program is None:
        pytest.skip("mpirun is not installed: apt-get install openmpi-bin")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [program, *root, "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes 54 pictures, copies of three of them, and one unreadable file."""
    folder = image_folder(tmp_path_factory.mktemp("parallel") / "images", 54)
    for number in range(3):
        source = sorted((folder / "beach").glob("*.jpg"))[number]
        shutil.copy(source, folder / "airport" / f"copy_{number}.jpg")
    (folder / "beach" / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def arguments(images: Path) -> list[str]:
    words = f"pack --source imagefolder --images {images} --shard-size 3 --max-side 60 --workers 1".split()
    return [*words, *DUPLICATES, "--output"]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Packs with one process."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    assert main([*arguments, str(folder)]) == 0
    written = contents(folder)
    assert len([name for name in written if name.endswith(".tar")]) >= SHARDS
    assert {"duplicates.jsonl", "quarantine.jsonl", "manifest.json"} <= written.keys()
    assert json.loads((folder / "manifest.json").read_text())["duplicates"]["exact"] == 3
    return written


def started(
    arguments: list[str], folder: Path, launcher: list[str] | None = None, **variables: str
) -> subprocess.Popen[str]:
    command = [*(launcher or []), sys.executable, "-m", "data_shards", *arguments, str(folder)]
    return subprocess.Popen(
        command, env=environment(**variables), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"it hangs: {process.communicate()[0]}") from None
    return process.returncode, output


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(list(folder.glob(".pack/shard-*.json"))) < count and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_several_processes_write_the_same(arguments: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    assert main([*arguments, str(tmp_path / "o"), "--workers", "3"]) == 0
    assert contents(tmp_path / "o") == whole


@pytest.mark.parametrize("ranks", [1, 3])
def test_mpi_ranks_write_the_same(arguments: list[str], whole: dict[str, str], tmp_path: Path, ranks: int) -> None:
    code, output = ended(started(arguments, tmp_path / "o", mpirun(ranks)))
    assert code == 0, output
    assert ("3 MPI ranks" in output) == (ranks == 3)
    assert output.count(" samples, ") == 1, "only rank 0 prints the result"
    assert contents(tmp_path / "o") == whole


def test_killed_rank_ends_the_job_and_it_goes_on(arguments: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "o"
    job = started(arguments, folder, mpirun(3))
    wait_for_shards(folder, 2, job)
    ranks = [pid for pid in children(job.pid) if "data_shards" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(max(ranks), signal.SIGKILL)
    code, output = ended(job)
    assert code != 0, output
    assert not (folder / "manifest.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert done
    code, output = ended(started(arguments, folder, mpirun(2)))
    assert code == 0, output
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done, "a finished shard was packed again"
    assert contents(folder) == whole


def test_wrong_options_end_an_mpi_job(tmp_path: Path) -> None:
    command = ["pack", "--source", "imagefolder", "--images", "nowhere", "--output"]
    code, output = ended(started(command, tmp_path / "o", mpirun(2)))
    assert code != 0
    assert "image folder nowhere does not exist" in output


def test_array_tasks_write_the_same(arguments: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    """The tasks run at the same time, and one after the other."""
    together = [started(arguments, tmp_path / "together", **array_task(task)) for task in range(3)]
    results = [ended(process) for process in together]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert contents(tmp_path / "together") == whole
    for task in (2, 0, 1):
        code, output = ended(started(arguments, tmp_path / "turns", **array_task(task)))
        assert code == 0, output
        assert ("54 samples" if task == 1 else f"task {task + 1} of 3 has packed its shards") in output
        assert (tmp_path / "turns" / "manifest.json").exists() == (task == 1)
    assert contents(tmp_path / "turns") == whole


def test_killed_task_is_queued_again(arguments: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "o"
    killed = started(arguments, folder, **array_task(0))
    wait_for_shards(folder, 1, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    for task in (1, 2):
        assert ended(started(arguments, folder, **array_task(task)))[0] == 0
    assert not (folder / "manifest.json").exists(), "the killed task had finished"
    stale = folder / f"shard-000000.tar.{platform.node()}~{killed.pid}.tmp"
    stale.write_bytes(b"half a shard")
    code, output = ended(started(arguments, folder, **array_task(0)))
    assert code == 0, output
    assert contents(folder) == whole
    code, output = ended(started(arguments, folder, **array_task(2)))
    assert code == 0, "a requeued task did not find the finished folder"
    assert contents(folder) == whole


def test_everything_killed_goes_on_elsewhere(arguments: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    """An array starts the pack, MPI ranks finish it."""
    folder = tmp_path / "o"
    tasks = [started([*arguments[:-1], "--workers", "2", "--output"], folder, **array_task(task)) for task in range(2)]
    wait_for_shards(folder, 2, tasks[0])
    for process in tasks:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (folder / "manifest.json").exists()
    code, output = ended(started(arguments, folder, mpirun(3)))
    assert code == 0, output
    assert contents(folder) == whole


def test_array_tasks_refuse_to_overwrite_each_other(arguments: list[str], tmp_path: Path) -> None:
    code, output = ended(
        started([*arguments, str(tmp_path / "o"), "--overwrite", "--output"], tmp_path / "o", **array_task(0))
    )
    assert code == 2
    assert "each task remove the shards of the others" in output


def test_array_can_be_switched_off(arguments: list[str], whole: dict[str, str], tmp_path: Path) -> None:
    words = [*arguments[:-1], "--array", "false", "--output"]
    assert ended(started(words, tmp_path / "o", **array_task(1)))[0] == 0
    assert contents(tmp_path / "o") == whole


def test_task_that_finishes_second_finds_it_done(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks finish at the same time: the other one finishes between two steps of this one."""
    from priorclip.data_shards.pack import unfinished_folder

    folder = tmp_path / "o"
    assert ended(started(arguments, folder, **array_task(0, 2)))[0] == 0
    real: Callable = unfinished_folder.combine_contents

    def late(*words: object) -> object:
        monkeypatch.setattr(unfinished_folder, "combine_contents", real)
        code, output = ended(started(arguments, folder, **array_task(0, 2)))
        assert code == 0, output
        for path in unfinished_folder.temporary_paths(folder):
            path.unlink()
        return real(*words)

    monkeypatch.setattr(unfinished_folder, "combine_contents", late)
    for name, value in array_task(1, 2).items():
        monkeypatch.setenv(name, value)
    assert main([*arguments, str(folder)]) == 0
    assert not (folder / ".pack").exists()
    before = contents(folder)
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert finish_folder(folder, ["shard-000000"], fingerprint, {}, Selection([])).fingerprint == fingerprint
    with pytest.raises(FileNotFoundError):
        finish_folder(folder, ["shard-000000"], "another", {}, Selection([]))
    assert contents(folder) == before


def test_plain_pack_leaves_mpi_alone(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from priorclip.data_shards.__main__ import main; done = main(sys.argv[1:]); "
        "sys.exit(done or 9 * ('mpi4py' in sys.modules) or 8 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments, str(tmp_path / "o")], env=environment())
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("variables", "world", "share"),
    [
        ({}, 1, TaskShare()),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 4, TaskShare()),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 1, TaskShare()),
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1"}, 3, TaskShare()),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, 2, TaskShare()),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1, TaskShare()),  # a batch script is not a step
        ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}, 1, TaskShare(2, 3)),
        (array_task(2), 1, TaskShare(2, 3)),
        ({**array_task(2), "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 1, TaskShare(5, 6)),
        ({**array_task(1), "OMPI_COMM_WORLD_SIZE": "4"}, 4, TaskShare(1, 3)),
    ],
)
def test_launchers_are_told_apart(variables: Mapping[str, str], world: int, share: TaskShare) -> None:
    assert (mpi_world(variables), find_task_share(variables)) == (world, share)


def test_uneven_arrays_are_refused() -> None:
    """The array is --array=0,3,7."""
    names = {"ID": 3, "COUNT": 3, "MIN": 0, "MAX": 7, "STEP": 1}
    with pytest.raises(ValueError, match="for example --array=0-7"):
        find_task_share({f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()})
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_COUNT must be a number"):
        find_task_share({"SLURM_ARRAY_TASK_ID": "3"})


def test_jobs_are_handed_out_a_few_ahead() -> None:
    """Only a few jobs are pickled ahead, because there may be five million records."""
    taken = 0

    def jobs() -> object:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield (number,)

    ahead = []
    for done, _ in enumerate(WorkerPool(2).run(abs, jobs(), 40), 1):
        ahead.append(taken - done)
    assert done == 40
    assert max(ahead) <= 4


def test_error_of_a_job_ends_the_run() -> None:
    jobs = ((word,) for word in ["1"] * 5 + ["x"] + ["1"] * 500)
    with pytest.raises(ValueError, match="invalid literal"):
        list(WorkerPool(2).run(int, jobs, 506))
    assert next(jobs, None) is not None, "too many jobs were handed out"
