"""Finds a rank that hangs, logs its host and stack, and ends the run, even if a collective never returns.

    watchdog = Watchdog(rank, minutes=5)
    watchdog.count_step()        # after each step
    watchdog.stop()

There are two checks. First, a process beside each rank (guardian.py) kills a rank that sends no heartbeats, because it
is stopped or frozen in the kernel. Second, a thread in each rank checks where the main thread is. If the Python code of
a rank makes no progress for the time limit, the rank writes that to the process group's store. When all ranks have
written it, the run hangs: rank 0 logs where each rank is (most wait in a collective for the one that does not), and
every rank exits. Long evaluations and slow data make progress, so that they are safe. A check takes less than a
millisecond every few seconds, and no collective.

A rank whose launcher has ended (SLURM's step daemon, DeepSpeed's launcher) exits too, because nobody would tell it that
the job has ended. It could continue beside the run that replaces it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from priorclip.common.output import get_logger
from priorclip.training.ranks.distributed import Rank
from priorclip.training.ranks.preemption import HANG_EXIT_CODE

logger = get_logger(__name__)

OUTER_FRAMES, INNER_FRAMES = 12, 24  # parts of a longer stack that are shown
STARTS = itertools.count()
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")  # source folders of code that waits for other ranks


class Watchdog:
    """Watches one rank. Every rank starts one at the same place in the program. It stops an earlier one.

    Args:
        rank: this process
        minutes: time limit without progress, 0 for no watching
    """

    running: Watchdog | None = None

    def __init__(self, rank: Rank, minutes: float) -> None:
        if Watchdog.running:
            Watchdog.running.stop()
        self.rank, self.limit_seconds, self.prefix = rank, minutes * 60, f"hang/{next(STARTS)}"
        self.launcher = os.getppid() if rank.world_size > 1 else None
        self.steps = 0
        self.stopped = threading.Event()
        self.guardian: subprocess.Popen[bytes] | None = None
        if not minutes:
            return
        Watchdog.running = self
        self.check_seconds = min(5.0, self.limit_seconds / 6)
        self.main_thread = threading.main_thread().ident
        program = str(Path(__file__).with_name("guardian.py"))
        words = [sys.executable, "-S", "-E", program, str(rank.rank), socket.gethostname(), str(self.limit_seconds)]
        self.guardian = subprocess.Popen(words, stdin=subprocess.PIPE)
        atexit.register(self.stop)  # Python cannot end a thread that runs code of the store
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.thread.start()

    def name(self) -> str:
        return f"rank {self.rank.rank} on {socket.gethostname()} (process {os.getpid()})"

    def count_step(self) -> None:
        self.steps += 1

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self.stopped.set()
        Watchdog.running = None
        if self.guardian and self.guardian.stdin:
            self.thread.join(timeout=30)
            with contextlib.suppress(BrokenPipeError):  # a guardian that has ended did not read everything
                self.guardian.stdin.close()
            self.guardian.wait()

    def watch(self) -> None:
        """Checks until `stop`, or until the store is gone because the run has ended."""
        try:
            self.check_repeatedly()
        except dist.DistError as error:
            if not self.stopped.is_set():
                logger.warning("the store of the process group on rank 0 is gone: %s", str(error).split("\n")[0])

    def check_repeatedly(self) -> None:
        store = dist.distributed_c10d._get_default_store().clone()
        last_position, since, is_reported = None, time.monotonic(), False
        own_key = f"{self.prefix}/{self.rank.rank}"
        while not self.stopped.wait(self.check_seconds):
            if self.launcher not in (None, os.getppid()):
                logger.error("%s ends, because its launcher, process %s, has ended", self.name(), self.launcher)
                exit_now()
            position, stack, waits = self.main_thread_state()
            self.send_heartbeat(stack)
            if position != last_position:
                last_position, since = position, time.monotonic()
                if is_reported:
                    store.delete_key(own_key)
                    is_reported = False
            still_seconds = time.monotonic() - since
            if still_seconds < self.limit_seconds:
                continue
            if not is_reported:
                state = {"host": socket.gethostname(), "pid": os.getpid(), "steps": self.steps}
                store.set(own_key, json.dumps({**state, "waits": waits, "stack": stack}))
                is_reported = True
            if self.rank.is_first:
                self.end_hanging_run(store, still_seconds)
            if store.check([f"{self.prefix}/end"]):
                exit_now()

    def main_thread_state(self) -> tuple[Any, str, bool]:
        """Position of the main thread to compare, its stack to read, and whether the rank waits in a collective."""
        frames = sys._current_frames()
        text = stack_text(frames[self.main_thread or 0])
        waits = any(name in line.filename for frame in frames.values() for line in traceback.extract_stack(frame)
                    for name in COLLECTIVES)  # fmt: skip
        return (self.steps, positions(frames[self.main_thread or 0])), text, waits

    def send_heartbeat(self, stack: str) -> None:
        pipe = self.guardian.stdin if self.guardian else None
        # If the guardian has ended, only the second check is left.
        with contextlib.suppress(BrokenPipeError):
            if pipe:
                pipe.write(json.dumps({"stack": stack}).encode() + b"\n")
                pipe.flush()

    def end_hanging_run(self, store: Any, still_seconds: float) -> None:
        """On rank 0: ends the run if no rank makes progress, or one has not reported for twice the time limit."""
        keys = [f"{self.prefix}/{number}" for number in range(self.rank.world_size)]
        states = {number: json.loads(store.get(key)) for number, key in enumerate(keys) if store.check([key])}
        unreported = [number for number in range(self.rank.world_size) if number not in states]
        if unreported and still_seconds < 2 * self.limit_seconds:
            return
        logger.error("%s", hang_report(states, unreported, still_seconds))
        store.set(f"{self.prefix}/end", "1")
        exit_now()


def hang_report(states: dict[int, dict[str, Any]], unreported: list[int], still_seconds: float) -> str:
    """What is known about the ranks. Those that do not wait for others come first."""
    lines = [f"the run hangs: no progress for {still_seconds:.0f} s; it ends"]
    if unreported:
        lines.append(f"no report from rank {', '.join(map(str, unreported))}")
    groups: dict[tuple[bool, str], list[str]] = {}
    for number, state in states.items():
        name = f"rank {number} on {state['host']} (process {state['pid']})"
        groups.setdefault((state["waits"], state["stack"]), []).append(name)
    for (waits, stack), names in sorted(groups.items(), key=lambda item: item[0][0]):
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines.append(f"{shown} {'waits for other ranks' if waits else 'hangs'} at:\n{stack}")
    return "\n".join(lines)


def stack_text(frame: FrameType) -> str:
    """Stack of a thread, innermost call last. A long one loses its middle, so that the user's own code is seen too."""
    stack = traceback.format_list(traceback.extract_stack(frame))
    left_out = len(stack) - OUTER_FRAMES - INNER_FRAMES
    if left_out > 0:
        stack[OUTER_FRAMES:-INNER_FRAMES] = [f"  ... {left_out} more ...\n"]
    return "".join(stack)


def positions(frame: FrameType | None) -> list[tuple[int, int]]:
    """Code and instruction of each frame of a stack. They differ if the thread has made progress."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found


def exit_now() -> None:
    """Ends the process without its main thread, which may be in a call that never returns."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    os._exit(HANG_EXIT_CODE)
