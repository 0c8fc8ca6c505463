"""Stops, torn checkpoints and resumes on real ranks: what comes out is what an uninterrupted run gives, bit for bit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from toy_launches import (
    LIMIT_SECONDS,
    PYTHON,
    ROOT,
    STOPPABLE,
    ToyRun,
    assert_same,
    environment,
    execute,
    run_toys,
    toy_arguments,
)

from cluster.preemption import REQUEUE_EXIT_CODE

LAUNCH = (PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--")


def flip_a_bit(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("*model_states.pt")).unlink()


def stop_before_renaming(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.partial"))


def lose_the_checksums(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").write_text('{"world_size": 2, "sha')


TEARS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip_a_bit, "optim_states.pt does not match its checksum"),
    "lost": (lose_a_file, "model_states.pt is missing"),
    "partial": (stop_before_renaming, ""),
    "unsealed": (lose_the_checksums, "checksums.json cannot be read"),
}
KEEP_ONE = (*STOPPABLE, "--run.checkpoint.keep", "1")


@pytest.fixture(scope="module")
def resumed(toys: dict[str, ToyRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """The same commands again, on run directories that were stopped, or whose newest checkpoint was torn since."""
    parent = tmp_path_factory.mktemp("resumed")
    for name in ("at_epoch", "at_end"):
        shutil.copytree(toys[name].folder, parent / name)
    for name, (tear, _) in TEARS.items():
        shutil.copytree(toys["whole"].folder, parent / name)
        tear(parent / name / "checkpoints" / "step_00000012")
    # One checkpoint is kept, it is torn, and the run stops again before it comes to that step.
    shutil.copytree(toys["whole"].folder, parent / "again")
    flip_a_bit(parent / "again" / "checkpoints" / "step_00000012")
    options = dict.fromkeys(("at_epoch", "at_end", *TEARS), STOPPABLE)
    return run_toys(parent, {**options, "again": (*KEEP_ONE, "--kill_at", "9")})


@pytest.mark.parametrize("name", ["at_epoch", "at_end"])
def test_stop_where_an_evaluation_was_due(toys: dict[str, ToyRun], resumed: dict[str, ToyRun], name: str) -> None:
    assert toys[name].ended == REQUEUE_EXIT_CODE
    assert resumed[name].ended == 0
    assert_same(resumed[name], toys["whole"])


@pytest.mark.parametrize("name", TEARS)
def test_torn_checkpoint_falls_back_to_the_one_before(
    toys: dict[str, ToyRun], resumed: dict[str, ToyRun], name: str
) -> None:
    run, folder = resumed[name], resumed[name].folder / "checkpoints"
    assert f"resumed {folder / 'step_00000008'}: step 8" in run.output
    assert_same(run, toys["whole"])
    assert not list(folder.glob("*.partial"))
    message = TEARS[name][1]
    lines = [line for line in run.output.splitlines() if f"{folder / 'step_00000012'} is not used" in line]
    assert len(lines) == (1 if message else 0)
    assert all(message in line for line in lines)


def test_torn_checkpoint_does_not_push_out_a_good_one(resumed: dict[str, ToyRun]) -> None:
    run = resumed["again"]
    assert run.ended == REQUEUE_EXIT_CODE
    assert [path.name for path in sorted((run.folder / "checkpoints").glob("step_*"))] == ["step_00000010"]


def test_only_the_newest_are_kept(toys: dict[str, ToyRun]) -> None:
    folder = toys["whole"].folder / "checkpoints"
    assert [path.name for path in sorted(folder.glob("step_*"))] == ["step_00000004", "step_00000008", "step_00000012"]
    assert (folder / "latest").read_text() == "step_00000012"
    kept = [path.name for path in sorted((toys["nan"].folder / "checkpoints").glob("step_*"))]
    assert kept == ["step_00000004", "step_00000006"], "keep is 2 unless it is said"


def test_signal_to_the_launch_command_reaches_the_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = toy_arguments(folder, "--run.epochs", "100000", "--run.checkpoint.every", "1000000")
    run = subprocess.Popen([*LAUNCH, "tests.cluster.toy_run", *options], cwd=ROOT, env=environment())
    try:
        wait_for_step(folder, 3, run)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=90) == REQUEUE_EXIT_CODE
    finally:
        run.terminate()
    checkpoints = list((folder / "checkpoints").glob("step_*"))
    assert [int(path.name.removeprefix("step_")) for path in checkpoints] == [max(ToyRun(folder).records("train/loss"))]


def test_signal_to_a_process_that_is_ending_does_not_kill_it() -> None:
    program = """
import os, signal
from cluster.preemption import Notice
class Late:  # taken apart after Python's own handlers are
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)
        print("was told", flush=True)
late, notice = Late(), Notice()
"""
    done = execute([PYTHON, "-c", program])
    assert (done.returncode, done.stdout) == (0, "was told\n")


def test_launch_that_is_killed_leaves_nothing_behind() -> None:
    command = [PYTHON, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    program = f"from cluster.launch import wait_for; wait_for({command}, 'local')"
    launch = subprocess.Popen([PYTHON, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    assert launch.stdout
    started = psutil.Process(int(launch.stdout.readline()))
    launch.kill()
    launch.wait()
    assert psutil.wait_procs([started], timeout=60)[1] == []


def wait_for_step(folder: Path, step: int, run: subprocess.Popen[bytes]) -> None:
    deadline = time.time() + LIMIT_SECONDS
    while time.time() < deadline:
        assert run.poll() is None, "the run ended before its time"
        path = folder / "metrics.jsonl"
        if path.is_file() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached")
