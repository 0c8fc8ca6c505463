"""``python guardian.py RANK HOST SECONDS``: a process beside each rank that kills it when it is stopped or frozen.

Its standard input gets a line of JSON a heartbeat from a thread of the rank (watchdog.py): where its Python
code is. A stopped process (SIGSTOP, a debugger, a kernel that does not let go of it) sends none. Only the time in which
this process itself runs counts, so that a job that SLURM suspends as a whole is left alone. Nothing but the standard
library is imported, so that it costs a few MB and no second.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

TICK_SECONDS = 0.5


def guard(rank: str, host: str, seconds: float) -> None:
    """Until the rank ends: read its heartbeats, and end it when there have been none for so long."""
    pid = os.getppid()
    silent, last, rest = 0.0, "", b""
    while os.getppid() == pid:
        ready, _, _ = select.select([0], [], [], TICK_SECONDS)
        if not ready:
            silent += TICK_SECONDS
            if silent >= seconds and os.getppid() == pid:
                print(farewell(rank, host, pid, silent, last), file=sys.stderr, flush=True)
                os.kill(pid, signal.SIGKILL)
                return
            continue
        content = os.read(0, 1 << 16)
        if not content:
            return
        silent = 0.0
        *lines, rest = (rest + content).split(b"\n")
        if lines:
            last = json.loads(lines[-1])["stack"]


def farewell(rank: str, host: str, pid: int, silent: float, stack: str) -> str:
    clock = time.strftime("%H:%M:%S")
    return (
        f"{clock} rank {rank} on {host} (process {pid}) hangs: not a sign of life for {silent:.0f} s. It is killed, and"
        f" the run ends with it. The kernel says: {kernel_says(pid)}. Its Python code was last at:\n{stack}"
    )


def kernel_says(pid: int) -> str:
    """State of the process, and what it sleeps in as far as this user may know."""
    said = []
    for name in ("status", "wchan", "stack"):
        try:
            with open(f"/proc/{pid}/{name}") as file:
                text = file.read()
        except OSError:
            continue
        if name == "status":
            said += [line for line in text.splitlines() if line.startswith("State:")]
        elif text.strip(" 0\n"):
            said.append(f"{name} {' '.join(text.split())}")
    return ", ".join(said) or "nothing"


if __name__ == "__main__":
    # What ends the rank is for the rank to take: a checkpoint may still be written, and this must not leave before it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    guard(sys.argv[1], sys.argv[2], float(sys.argv[3]))
