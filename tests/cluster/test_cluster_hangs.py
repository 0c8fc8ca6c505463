"""A rank that is stopped or that sleeps for ever: named, with its host and stack, and the job ends in the set time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_launches import PYTHON, ToyRun, execute, toy_arguments

from cluster.guardian import kernel_says
from cluster.preemption import REQUEUE_EXIT_CODE
from cluster.watchdog import verdict

LAUNCH = (PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--", "tests.cluster.toy_run")
GUARDIAN = Path(__file__).resolve().parents[2] / "cluster" / "guardian.py"


def hang(folder: Path, *words: str) -> str:
    """Output of a run that hangs after some steps, which has to end by itself well before its collectives do."""
    options = ("--run.engine.hang_minutes", "0.2", "--run.engine.timeout_minutes", "10", *words)
    begun = time.time()
    done = execute([*LAUNCH, *toy_arguments(folder, *options)])
    seconds = time.time() - max(begun, *ToyRun(folder).records("time").values())
    assert done.returncode not in (0, REQUEUE_EXIT_CODE), done.stdout
    assert seconds < 60
    assert not (folder / "report.json").exists()
    return done.stdout


def test_rank_that_is_stopped(tmp_path: Path) -> None:
    output = hang(tmp_path / "run", "--stop_at", "5")
    assert f"rank 1 on {socket.gethostname()} (process " in output
    assert "hangs: not a sign of life for 12 s. It is killed" in output
    assert "State:\tT (stopped)" in output
    assert "toy_run.py" in output.split("last at:")[1], "its Python stack"


def test_rank_that_sleeps(tmp_path: Path) -> None:
    output = hang(tmp_path / "run", "--freeze_at", "5")
    host = socket.gethostname()
    hung, waiting = output.split("the run hangs: nothing has moved for ")[1].split("waits for other ranks at:")
    assert f"rank 1 on {host} (process " in hung
    assert "time.sleep" in hung.split("hangs at:")[1]
    assert f"rank 0 on {host} (process " in hung
    assert "all_reduce" in waiting or "barrier" in waiting or "broadcast" in waiting or "wait" in waiting


def test_many_ranks_are_told_apart_by_where_they_stand() -> None:
    standing = {rank: {"host": f"n{rank // 4}", "pid": 10 + rank, "waits": rank != 5, "stack": f"{rank == 5}"}
                for rank in range(16) if rank != 9}  # fmt: skip
    lines = verdict(standing, [9], 61.0).splitlines()
    assert lines[0] == "the run hangs: nothing has moved for 61 s, and it ends"
    assert lines[1] == "nothing is heard of rank 9"
    assert lines[2] == "rank 5 on n1 (process 15) hangs at:"
    assert lines[4].endswith("rank 8 on n2 (process 18) and 6 more waits for other ranks at:")


@pytest.fixture
def guarded() -> subprocess.Popen[bytes]:
    """A process with a guardian beside it, to which it sends a heartbeat each tenth of a second."""
    program = f"""
import subprocess, sys, time, json
guardian = subprocess.Popen([sys.executable, {str(GUARDIAN)!r}, "3", "node-b", "1.5"], stdin=subprocess.PIPE)
print(guardian.pid, flush=True)
while True:
    guardian.stdin.write(json.dumps({{"stack": "File x.py, line 7"}}).encode() + b"\\n")
    guardian.stdin.flush()
    time.sleep(0.1)
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_guardian_leaves_a_job_that_is_suspended_as_a_whole(guarded: subprocess.Popen[bytes]) -> None:
    """SLURM's suspension stops rank and guardian alike: the time until it goes on does not count."""
    assert guarded.stdout
    assert guarded.stderr
    guardian = int(guarded.stdout.readline())
    time.sleep(0.5)
    for pid in (guardian, guarded.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in (guardian, guarded.pid):
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    assert guarded.poll() is None
    os.kill(guarded.pid, signal.SIGSTOP)
    assert guarded.wait(timeout=30) == -signal.SIGKILL
    said = guarded.stderr.read().decode()
    assert f"rank 3 on node-b (process {guarded.pid}) hangs" in said
    assert "File x.py, line 7" in said


def test_guardian_ends_with_its_rank(guarded: subprocess.Popen[bytes]) -> None:
    assert guarded.stdout
    guardian = int(guarded.stdout.readline())
    guarded.kill()
    guarded.wait()
    deadline = time.time() + 20
    while Path(f"/proc/{guardian}").exists() and "State:\tZ" not in Path(f"/proc/{guardian}/status").read_text():
        assert time.time() < deadline
        time.sleep(0.1)


def test_what_the_kernel_says() -> None:
    assert "State:" in kernel_says(os.getpid())
    assert kernel_says(2**22 + 1) == "nothing"
