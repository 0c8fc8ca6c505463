"""Starts the command line of a run, passes signals on to its ranks, and returns its exit code.

    launch(LaunchConfig(nproc=2), ["pretrain", "--config", "c.yaml"])   ->  0, or 75 if the run stopped at a checkpoint

SIGTERM, SIGUSR1 or Ctrl-C reaches the ranks, so that they write a checkpoint and the command ends with their exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from priorclip.cluster.commands import LaunchConfig
from priorclip.cluster.launch.command_line import deepspeed_command
from priorclip.common.masking import copy_masked
from priorclip.common.output import get_logger
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

logger = get_logger(__name__)

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.2
START_SECONDS = 2.0  # a process that handles SIGUSR1 has installed its handler by then


def launch(config: LaunchConfig, run: Sequence[str]) -> int:
    """Starts ``run`` (a module and its options) and returns its exit code.

    Raises:
        ValueError: the hostfile, the module or the options are invalid. Nothing was started.
    """
    sys.path.insert(0, os.getcwd())
    command = deepspeed_command(config, run, os.environ)
    if config.dry_run:
        print(shlex.join(command))
        return 0
    logger.info("%s", shlex.join(command))
    return wait_for(command, config.launcher or ("pdsh" if config.hostfile else "local"))


def wait_for(command: Sequence[str], launcher: str) -> int:
    """Runs the command, passes signals on to the ranks, and returns the exit code (128 + N for signal N).

    The first SIGTERM, SIGUSR1 or Ctrl-C asks for a checkpoint and an end. The second one ends the run at once. A
    process that still starts and cannot handle the signal yet gets it as soon as it can.
    """
    if launcher in ("pdsh", "slurm") and not shutil.which({"pdsh": "pdsh", "slurm": "srun"}[launcher]):
        raise ValueError(f"--launcher {launcher}: {'srun' if launcher == 'slurm' else launcher} is not installed here")
    one_host = launcher in ("local", "node")
    # DeepSpeed prints the command lines that it starts on other hosts: they can hold secrets.
    pipe = None if one_host else subprocess.PIPE
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=prepare_launcher if one_host else None, stdout=pipe, stderr=pipe
    )
    copies = [
        copy_masked(source, sink)
        for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        if source
    ]
    watch = RankWatch(process.pid) if one_host else None
    step_daemon = os.getppid() if launcher == "node" and "SLURM_STEP_ID" in os.environ else None
    received: list[int] = []
    notified: set[psutil.Process] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        first = len(received) == 1
        action = "the ranks write a checkpoint and end" if first else "the run ends now"
        logger.warning("%s: %s", signal.Signals(number).name, action)
        if launcher == "pdsh":
            end_launcher(process, launcher)
        elif first:
            ask_to_end(process.pid, notified, must_end=number != signal.SIGUSR1)
        else:
            end_launcher(process, launcher)

    previous = {name: signal.signal(name, pass_on) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
            if watch:
                watch.update()
            if len(received) == 1 and launcher != "pdsh":
                ask_to_end(process.pid, notified, must_end=received[0] != signal.SIGUSR1)
            if step_daemon not in (None, os.getppid()):
                logger.error("SLURM's step daemon, process %s, has ended: the ranks of this node end too", step_daemon)
                step_daemon = None
                end_launcher(process, launcher)
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
    for copy in copies:
        copy.join(timeout=5)  # a process that still runs may keep the output open
    if one_host and code > 256 - signal.NSIG:
        code -= 256  # DeepSpeed's launcher exits with Python's return code of a rank that signal N ended: -N
    if code < 0:
        code = 128 - code
    if watch and watch.first_ended and code not in (0, REQUEUE_EXIT_CODE):
        logger.error("exit code %d: %s on %s was the first to end", code, watch.first_ended, socket.gethostname())
    return code


def prepare_launcher() -> None:
    """Runs in the process of DeepSpeed's launcher of this host before the launcher starts.

    SLURM signals every process of a step, and SIGUSR1 would end DeepSpeed's launcher: it ignores the signal, the ranks
    handle it. If our process is killed, the kernel sends SIGTERM to the launcher, which ends its ranks.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class RankWatch:
    """Finds the rank that ended first. DeepSpeed's launcher of a node ends the other ranks, but it names none."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ranks: dict[psutil.Process, str] = {}
        self.first_ended: str | None = None

    def update(self) -> None:
        for rank in children_of(self.pid):
            with contextlib.suppress(psutil.Error, KeyError):
                if rank not in self.ranks:
                    self.ranks[rank] = f"rank {rank.environ()['RANK']} (process {rank.pid})"
        ended = [name for rank, name in self.ranks.items() if not is_alive(rank)]
        if ended and self.first_ended is None:
            self.first_ended = " and ".join(ended)


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def children_of(pid: int) -> list[psutil.Process]:
    """Children of DeepSpeed's process: the ranks of a node, or the mpirun or srun of many hosts."""
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def ask_to_end(pid: int, notified: set[psutil.Process], must_end: bool) -> None:
    """Sends SIGUSR1 once to each child of DeepSpeed's process ``pid`` that handles it.

    Ranks write a checkpoint; mpirun and srun pass the signal on to their ranks. A signal to DeepSpeed's launcher itself
    would kill the ranks. If the run ``must_end``, a child that has run for some seconds without a handler for SIGUSR1
    gets SIGTERM.
    """
    for child in children_of(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            handles = has_handler(child.pid, signal.SIGUSR1)
            started = time.time() - child.create_time() > START_SECONDS
            if child not in notified and (handles or (must_end and started)):
                child.send_signal(signal.SIGUSR1 if handles else signal.SIGTERM)
                notified.add(child)


def has_handler(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def end_launcher(process: subprocess.Popen[bytes], launcher: str) -> None:
    """Kills DeepSpeed's process and all its children here. pdsh gets SIGTERM and ends the ranks on other hosts."""
    with contextlib.suppress(ProcessLookupError):
        if launcher == "pdsh":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGKILL)
