"""A rank that hangs is named, with its host and stack, and ends the run, whatever its collectives do.

    watch = Watchdog(rank, minutes=5)
    watch.count_step()        # at each step
    watch.stop()

Two things watch. A process beside each rank (guardian.py) kills one that shows no sign of life: stopped, frozen
in the kernel. And a thread in each rank looks where its main thread is: a rank whose Python code has not moved for so
long says so in the store that the ranks met at; when all have said so the run hangs, rank 0 names them by where they
stand (most wait in a collective for the one that does not), and every rank ends itself. Long evaluations and slow data
move, and are left alone. Looking costs less than a millisecond every few seconds, and no collective.

A rank whose launcher is gone (SLURM's step daemon, DeepSpeed's launcher) ends itself as well: nobody would tell it of
the job's end, and it might go on beside the run that takes its place.
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

from priorclip.training.ranks.distributed import Rank
from priorclip.training.ranks.preemption import HANG_EXIT_CODE

logger = logging.getLogger(__name__)

FRAMES = 12
STARTS = itertools.count()
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Watchdog:
    """Of one rank. Every rank of a run starts one at the same place, and an earlier one in the process ends.

    Args:
        rank: this process
        minutes: how long nothing may move, 0 for no watching
    """

    running: Watchdog | None = None

    def __init__(self, rank: Rank, minutes: float) -> None:
        if Watchdog.running:
            Watchdog.running.stop()
        self.rank, self.limit, self.prefix = rank, minutes * 60, f"hang/{next(STARTS)}"
        self.launcher = os.getppid() if rank.world_size > 1 else None
        self.steps = 0
        self.stopped = threading.Event()
        self.guardian: subprocess.Popen[bytes] | None = None
        if not minutes:
            return
        Watchdog.running = self
        self.beat = min(5.0, self.limit / 6)
        self.main = threading.main_thread().ident
        program = str(Path(__file__).with_name("guardian.py"))
        words = [sys.executable, "-S", "-E", program, str(rank.rank), socket.gethostname(), str(self.limit)]
        self.guardian = subprocess.Popen(words, stdin=subprocess.PIPE)
        atexit.register(self.stop)  # Python cannot end a thread that is in a store's code
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.thread.start()

    def name(self) -> str:
        return f"rank {self.rank.rank} on {socket.gethostname()} (process {os.getpid()})"

    def count_step(self) -> None:
        """Called at each step."""
        self.steps += 1

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self.stopped.set()
        Watchdog.running = None
        if self.guardian and self.guardian.stdin:
            self.thread.join(timeout=30)
            with contextlib.suppress(BrokenPipeError):  # what a guardian that is gone has not read
                self.guardian.stdin.close()
            self.guardian.wait()

    def watch(self) -> None:
        """Until it is stopped, or the store is gone, and with it the run."""
        try:
            self.look_now_and_then()
        except dist.DistError as error:
            if not self.stopped.is_set():
                logger.warning("rank 0, which the ranks met at, is not there any more: %s", str(error).split("\n")[0])

    def look_now_and_then(self) -> None:
        store = dist.distributed_c10d._get_default_store().clone()
        mine, since, said = None, time.monotonic(), False
        while not self.stopped.wait(self.beat):
            if self.launcher not in (None, os.getppid()):
                logger.error("%s ends: its launcher, process %s, is gone", self.name(), self.launcher)
                end_at_once()
            place, stack, waits = self.look()
            self.send_heartbeat(stack)
            if place != mine:
                mine, since = place, time.monotonic()
                if said:
                    store.delete_key(f"{self.prefix}/{self.rank.rank}")
                    said = False
            still = time.monotonic() - since
            if still < self.limit:
                continue
            if not said:
                here = {"host": socket.gethostname(), "pid": os.getpid(), "steps": self.steps}
                store.set(f"{self.prefix}/{self.rank.rank}", json.dumps({**here, "waits": waits, "stack": stack}))
                said = True
            if self.rank.is_first:
                self.judge(store, still)
            if store.check([f"{self.prefix}/end"]):
                end_at_once()

    def look(self) -> tuple[Any, str, bool]:
        """Where the main thread is: to compare, to read, and whether the rank waits in a collective."""
        frames = sys._current_frames()
        stack = traceback.extract_stack(frames[self.main or 0])[-FRAMES:]
        text = "".join(traceback.format_list(stack))
        waits = any(name in line.filename for frame in frames.values() for line in traceback.extract_stack(frame)
                    for name in COLLECTIVES)  # fmt: skip
        return (self.steps, positions(frames[self.main or 0])), text, waits

    def send_heartbeat(self, stack: str) -> None:
        pipe = self.guardian.stdin if self.guardian else None
        # Where the guardian is gone, only the second way of noticing is left.
        with contextlib.suppress(BrokenPipeError):
            if pipe:
                pipe.write(json.dumps({"stack": stack}).encode() + b"\n")
                pipe.flush()

    def judge(self, store: Any, still: float) -> None:
        """On rank 0: end the run when all ranks have stood still, or one has not been heard of for twice as long."""
        keys = [f"{self.prefix}/{number}" for number in range(self.rank.world_size)]
        standing = {number: json.loads(store.get(key)) for number, key in enumerate(keys) if store.check([key])}
        unheard = [number for number in range(self.rank.world_size) if number not in standing]
        if unheard and still < 2 * self.limit:
            return
        logger.error("%s", verdict(standing, unheard, still))
        store.set(f"{self.prefix}/end", "1")
        end_at_once()


def verdict(standing: dict[int, dict[str, Any]], unheard: list[int], still: float) -> str:
    """What is known of the ranks, those first that do not wait for others."""
    lines = [f"the run hangs: nothing has moved for {still:.0f} s, and it ends"]
    if unheard:
        lines.append(f"nothing is heard of rank {', '.join(map(str, unheard))}")
    groups: dict[tuple[bool, str], list[str]] = {}
    for number, state in standing.items():
        name = f"rank {number} on {state['host']} (process {state['pid']})"
        groups.setdefault((state["waits"], state["stack"]), []).append(name)
    for (waits, stack), names in sorted(groups.items(), key=lambda item: item[0][0]):
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines.append(f"{shown} {'waits for other ranks' if waits else 'hangs'} at:\n{stack}")
    return "\n".join(lines)


def positions(frame: FrameType | None) -> list[tuple[int, int]]:
    """Code and instruction of each frame: it differs when a thread has moved."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found


def end_at_once() -> None:
    """The main thread cannot be asked: it is where it does not come back from."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    os._exit(HANG_EXIT_CODE)
