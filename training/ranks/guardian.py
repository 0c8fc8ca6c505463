"""``python guardian.py RANK HOST SECONDS``: a process beside each rank that kills it if it is stopped or frozen.

Its standard input gets heartbeats from a thread of the rank (watchdog.py), each a line of JSON with the stack of the
rank's Python code. A stopped process (SIGSTOP, a debugger, a call that does not return from the kernel) sends none.
Only time in which the guardian itself runs counts, so that a job that SLURM suspends as a whole survives. It imports
only the standard library, so that it needs a few MB and starts at once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

TICK_SECONDS = 0.5


def guard(rank: str, host: str, limit_seconds: float) -> None:
    """Reads the rank's heartbeats until the rank ends. Kills it after ``limit_seconds`` without one."""
    pid = os.getppid()
    silent_seconds, stack, incomplete = 0.0, "", b""
    while os.getppid() == pid:
        ready, _, _ = select.select([0], [], [], TICK_SECONDS)
        if not ready:
            silent_seconds += TICK_SECONDS
            if silent_seconds >= limit_seconds and os.getppid() == pid:
                print(kill_message(rank, host, pid, silent_seconds, stack), file=sys.stderr, flush=True)
                os.kill(pid, signal.SIGKILL)
                return
            continue
        content = os.read(0, 1 << 16)
        if not content:
            return
        silent_seconds = 0.0
        *lines, incomplete = (incomplete + content).split(b"\n")
        if lines:
            stack = json.loads(lines[-1])["stack"]


def kill_message(rank: str, host: str, pid: int, silent_seconds: float, stack: str) -> str:
    clock = time.strftime("%H:%M:%S")
    return (
        f"{clock} rank {rank} on {host} (process {pid}) hangs: no sign of life for {silent_seconds:.0f} s. It is"
        f" killed and the run ends. Kernel state: {kernel_state(pid)}. Its Python code was last at:\n{stack}"
    )


def kernel_state(pid: int) -> str:
    """State of the process and the kernel function it waits in, as far as this user may read them."""
    found = []
    for name in ("status", "wchan", "stack"):
        try:
            with open(f"/proc/{pid}/{name}") as file:
                text = file.read()
        except OSError:
            continue
        if name == "status":
            found += [line for line in text.splitlines() if line.startswith("State:")]
        elif text.strip(" 0\n"):
            found.append(f"{name} {' '.join(text.split())}")
    return ", ".join(found) or "unknown"


if __name__ == "__main__":
    # These signals are for the rank, which may still write a checkpoint. The guardian must not end before the rank.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    guard(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    os._exit(0)  # at once, so that nothing of a run is left when its rank has ended
