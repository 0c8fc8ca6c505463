"""Stops, damaged checkpoints and resumes on real ranks: the result equals that of an uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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

from priorclip.common.checkpoint_files import find_checkpoints
from priorclip.training.checkpoints.files import recover_replaced
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE
from priorclip.training.ranks.run_lock import lock_folder

LAUNCH = (PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--")


def flip_a_bit(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("*model_states.pt")).unlink()


def stop_before_renaming(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.partial-0123abcd"))


def lose_the_checksums(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").write_text('{"world_size": 2, "sha')


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip_a_bit, "optim_states.pt does not match its checksum"),
    "lost": (lose_a_file, "model_states.pt is missing"),
    "partial": (stop_before_renaming, ""),
    "unsealed": (lose_the_checksums, "checksums.json cannot be read"),
}
STOPS = ("at_epoch", "at_end", "amid", "amid_last")
KEEP_ONE = (*STOPPABLE, "--run.checkpoint.keep", "1")


@pytest.fixture(scope="module")
def resumed(toys: dict[str, ToyRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """The same commands again, in run directories that were stopped or whose newest checkpoint was damaged."""
    parent = tmp_path_factory.mktemp("resumed")
    for name in (*STOPS, "unseen"):
        shutil.copytree(toys[name].folder, parent / name)
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(toys["whole"].folder, parent / name)
        damage(parent / name / "checkpoints" / "step_00000012")
    # Only one checkpoint is kept. It is damaged, and the run stops again before it reaches that step.
    shutil.copytree(toys["whole"].folder, parent / "again")
    flip_a_bit(parent / "again" / "checkpoints" / "step_00000012")
    options = dict.fromkeys((*STOPS, "unseen", *DAMAGES), STOPPABLE)
    return run_toys(parent, {**options, "again": (*KEEP_ONE, "--kill_at", "9")})


@pytest.mark.parametrize("name", STOPS)
def test_stop_where_an_evaluation_was_due(toys: dict[str, ToyRun], resumed: dict[str, ToyRun], name: str) -> None:
    assert toys[name].ended == REQUEUE_EXIT_CODE
    steps = toys[name].records("train/loss")
    assert max(steps) in (6, 12)
    assert max(steps) not in toys[name].records("eval/mse"), "the resumed run makes this evaluation"
    assert resumed[name].ended == 0
    assert_same(resumed[name], toys["whole"])


def test_a_stop_in_a_step_without_records_comes_one_step_later(
    toys: dict[str, ToyRun], resumed: dict[str, ToyRun]
) -> None:
    """The ranks read their vote after the next step, because the device carries it out beside that step."""
    assert toys["unseen"].ended == REQUEUE_EXIT_CODE
    assert f"resumed {resumed['unseen'].folder / 'checkpoints' / 'step_00000010'}: step 10" in resumed["unseen"].output
    weights, expected = resumed["unseen"].weights(), toys["whole"].weights()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_falls_back_to_the_one_before(
    toys: dict[str, ToyRun], resumed: dict[str, ToyRun], name: str
) -> None:
    run, folder = resumed[name], resumed[name].folder / "checkpoints"
    assert f"resumed {folder / 'step_00000008'}: step 8" in run.output
    assert_same(run, toys["whole"])
    assert not list(folder.glob("*.partial*"))
    message = DAMAGES[name][1]
    lines = [line for line in run.output.splitlines() if f"{folder / 'step_00000012'} is not used" in line]
    assert len(lines) == (1 if message else 0)
    assert all(message in line for line in lines)


@pytest.mark.parametrize("name", ["at_epoch", "flipped"])
def test_tensorboard_shows_each_step_once(resumed: dict[str, ToyRun], name: str) -> None:
    """For a run that resumed at its last step, and for one that resumed at an earlier step."""
    board = EventAccumulator(str(resumed[name].folder / "tensorboard"), {"scalars": 0}).Reload()
    for tag in ("train/loss", "eval/mse"):
        shown = {event.step: event.value for event in board.Scalars(tag)}
        assert shown == pytest.approx(resumed[name].records(tag), rel=1e-6)
        assert len(board.Scalars(tag)) == len(shown)


def test_damaged_checkpoint_does_not_replace_a_good_one(resumed: dict[str, ToyRun]) -> None:
    run = resumed["again"]
    assert run.ended == REQUEUE_EXIT_CODE
    assert [path.name for path in sorted((run.folder / "checkpoints").glob("step_*"))] == ["step_00000010"]


def test_only_the_newest_are_kept(toys: dict[str, ToyRun]) -> None:
    folder = toys["whole"].folder / "checkpoints"
    assert [path.name for path in sorted(folder.glob("step_*"))] == ["step_00000004", "step_00000008", "step_00000012"]
    assert (folder / "latest").read_text() == "step_00000012"
    kept = [path.name for path in sorted((toys["nan"].folder / "checkpoints").glob("step_*"))]
    assert kept == ["step_00000004", "step_00000006"], "the default of keep is 2"


def test_signal_to_the_launch_command_reaches_the_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = toy_arguments(folder, "--run.epochs", "100000", "--run.checkpoint.every", "1000000")
    run = subprocess.Popen([*LAUNCH, "tests.toy_run", *options], cwd=ROOT, env=environment())
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
from priorclip.training.ranks.preemption import StopSignal
class Late:  # deleted after Python has removed its handlers
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)
        print("was told", flush=True)
late, notice = Late(), StopSignal()
"""
    done = execute([PYTHON, "-c", program])
    assert (done.returncode, done.stdout) == (0, "was told\n")


LATE_RANK = """
import signal, sys, time
time.sleep(0.7)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""
LATE_LAUNCHER = """
import subprocess, sys, time
print("starting", flush=True)
time.sleep(1)
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_before_the_ranks_handle_signals_is_kept(number: signal.Signals) -> None:
    """DeepSpeed's launcher needs seconds to start the ranks, and the ranks need seconds to handle signals."""
    command = [PYTHON, "-c", LATE_LAUNCHER, LATE_RANK]
    program = (
        f"import sys; from priorclip.cluster.launch.start_run import wait_for; sys.exit(wait_for({command}, 'local'))"
    )
    launch = subprocess.Popen([PYTHON, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    assert launch.stdout
    assert launch.stdout.readline() == b"starting\n"
    time.sleep(0.3)
    launch.send_signal(number)
    try:
        assert launch.wait(timeout=30) == REQUEUE_EXIT_CODE
    finally:
        launch.kill()


def test_signal_while_a_run_starts_is_kept_for_it() -> None:
    """Until the first step. The package's __main__ handles it before torch is imported."""
    program = """
import os, signal, sys
from priorclip.pretrain.__main__ import main
sys.argv[1:] = ["--config", "missing.yaml"]
try:
    main()
except SystemExit:
    os.kill(os.getpid(), signal.SIGUSR1)
assert "torch" not in sys.modules
from priorclip.training.ranks.preemption import StopSignal
print(StopSignal().received, StopSignal().received, flush=True)
"""
    done = execute([PYTHON, "-c", program])
    assert done.stdout.splitlines()[-1] == "True False", done.stdout


def test_second_run_in_a_run_directory_is_refused(tmp_path: Path) -> None:
    """While the first run exists. The second waits for a time, in which the first may end."""
    program = """
import sys
from pathlib import Path
from priorclip.training.ranks.run_lock import lock_folder
print([lock_folder(Path(sys.argv[1]))], flush=True)
input()
"""
    words = [PYTHON, "-c", program, str(tmp_path)]
    first = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout
    assert first.stdout.readline() == b"['']\n"
    problem = lock_folder(tmp_path, wait_seconds=0.0)
    assert problem.startswith(f"{tmp_path} is in use by process {first.pid} on {socket.gethostname()}: give another")
    first.kill()
    assert lock_folder(tmp_path, wait_seconds=30.0) == ""
    assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert lock_folder(tmp_path, wait_seconds=0.0) == "", "the next run of this process"
    first.wait()


def test_checkpoint_that_was_being_replaced_is_not_lost(tmp_path: Path) -> None:
    """The run was killed between the two renames of a rollback. Version 0.1 gave the folder no token."""
    for name in ("step_00000004.replaced", "step_00000008.replaced-0123abcd", "step_00000008.partial-0123abcd"):
        (tmp_path / name).mkdir()
    recover_replaced(tmp_path)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000008", "step_00000004"]


def test_launch_that_is_killed_leaves_nothing_behind() -> None:
    command = [PYTHON, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    program = f"from priorclip.cluster.launch.start_run import wait_for; wait_for({command}, 'local')"
    launch = subprocess.Popen([PYTHON, "-c", program], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    assert launch.stdout
    started = psutil.Process(int(launch.stdout.readline()))
    launch.kill()
    launch.wait()
    assert psutil.wait_procs([started], timeout=60)[1] == []


def wait_for_step(folder: Path, step: int, run: subprocess.Popen[bytes]) -> None:
    deadline = time.time() + LIMIT_SECONDS
    while time.time() < deadline:
        assert run.poll() is None, "the run ended too early"
        path = folder / "metrics.jsonl"
        if path.is_file() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.2)
    raise AssertionError(f"step {step} was not reached")
