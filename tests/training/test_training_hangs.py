"""A rank that is stopped or sleeps for ever is named, with host and stack, and the job ends within the time limit."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from toy_launches import PYTHON, ROOT, ToyRun, execute, toy_arguments

from priorclip.common.ports import free_port
from priorclip.training.ranks.distributed import Rank
from priorclip.training.ranks.guardian import kernel_state
from priorclip.training.ranks.preemption import HANG_EXIT_CODE
from priorclip.training.ranks.watchdog import INNER_FRAMES, OUTER_FRAMES, Watchdog, hang_report, stack_text

GUARDIAN = ROOT / "training" / "ranks" / "guardian.py"


def test_rank_that_sleeps_for_ever_is_named(tmp_path: Path) -> None:
    """tests/cluster/test_cluster_faults.py tests a rank that is stopped."""
    port = free_port()
    options = ("--run.engine.hang_minutes", "0.1", "--run.engine.timeout_minutes", "15", "--freeze_at", "5")
    launch = (PYTHON, "-m", "cluster", "launch", "--nproc", "2", "--master-port", str(port), "--")
    done = execute([*launch, "tests.toy_run", *toy_arguments(tmp_path / "run", *options)])
    assert time.time() - max(ToyRun(tmp_path / "run").records("time").values()) < 120
    assert done.returncode == HANG_EXIT_CODE, done.stdout
    host = socket.gethostname()
    hung, waiting = done.stdout.split("the run hangs: no progress for ")[1].split("waits for other ranks at:")
    assert f"rank 1 on {host} (process " in hung
    assert "time.sleep(1e6)" in hung.split("hangs at:")[1]
    assert f"rank 0 on {host} (process " in hung
    assert "torch/distributed/" in waiting
    assert re.search(rf"exit code {HANG_EXIT_CODE}: rank \d .*was the first to end", done.stdout)
    assert not (tmp_path / "run" / "report.json").exists()
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "DeepSpeed's shared memory is left behind"


def test_report_of_a_hang_groups_ranks_by_their_stacks() -> None:
    states = {rank: {"host": f"n{rank // 4}", "pid": 10 + rank, "waits": rank != 5, "stack": f"{rank == 5}"}
                for rank in range(16) if rank != 9}  # fmt: skip
    lines = hang_report(states, [9], 61.0).splitlines()
    assert lines[0] == "the run hangs: no progress for 61 s; it ends"
    assert lines[1] == "no report from rank 9"
    assert lines[2] == "rank 5 on n1 (process 15) hangs at:"
    assert lines[4].endswith("rank 8 on n2 (process 18) and 6 more waits for other ranks at:")


def deep_stack(depth: int) -> str:
    """``depth`` calls that differ from line to line, because Python shortens repeated ones."""
    if depth == 0:
        return stack_text(sys._getframe())
    if depth % 2:
        return deep_stack(depth - 1)
    return deep_stack(depth - 1)


@pytest.mark.parametrize("depth", [0, 20, 200])
def test_a_deep_stack_shows_where_the_users_code_is_and_where_it_waits(depth: int) -> None:
    """DeepSpeed and compiled models call a collective from more than 12 frames below the user's code."""
    whole = traceback.format_list(traceback.extract_stack())
    text = deep_stack(depth)
    assert text.startswith("".join(whole[:OUTER_FRAMES]))
    assert text.endswith("in deep_stack\n    return stack_text(sys._getframe())\n")
    frames, left_out = text.count('  File "'), re.findall(r"  \.\.\. (\d+) more \.\.\.\n", text)
    assert frames + sum(map(int, left_out)) == len(whole) + depth + 1
    assert frames <= OUTER_FRAMES + INNER_FRAMES
    assert len(left_out) <= 1


@pytest.fixture
def guarded() -> subprocess.Popen[bytes]:
    """A process that sends its guardian a heartbeat every tenth of a second."""
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


def test_guardian_spares_a_job_that_is_suspended_as_a_whole(guarded: subprocess.Popen[bytes]) -> None:
    """SLURM suspends rank and guardian together: the time of the suspension does not count."""
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
    output = guarded.stderr.read().decode()
    assert f"rank 3 on node-b (process {guarded.pid}) hangs" in output
    assert "File x.py, line 7" in output


def test_guardian_ends_with_its_rank(guarded: subprocess.Popen[bytes]) -> None:
    assert guarded.stdout
    guardian = int(guarded.stdout.readline())
    guarded.kill()
    guarded.wait()
    deadline = time.time() + 20
    while Path(f"/proc/{guardian}").exists() and "State:\tZ" not in Path(f"/proc/{guardian}/status").read_text():
        assert time.time() < deadline
        time.sleep(0.1)


def test_run_ends_well_without_its_guardian() -> None:
    """Nobody reads its heartbeats, and the pipe is closed."""
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        watchdog = Watchdog(Rank(0, 1, 0, torch.device("cpu")), minutes=0.05)
        assert watchdog.guardian
        watchdog.guardian.kill()
        watchdog.guardian.wait()
        time.sleep(1.2)  # two heartbeats
        watchdog.stop()
        assert not watchdog.thread.is_alive()
    finally:
        torch.distributed.destroy_process_group()


def test_kernel_state() -> None:
    assert "State:" in kernel_state(os.getpid())
    assert kernel_state(2**22 + 1) == "unknown"
