"""One run at a time in a run directory: rank 0 holds a lock on its ``.lock`` for as long as its process lives.

    hold(folder)     # "", or "runs/b32 is in use by process 4711 on node-3, SLURM job 812: give another run.dir ..."

Two runs would remove each other's checkpoints and mix their metrics. A run that was shot may take some seconds to end
(a checkpoint is being written, a stopped rank is yet to be found), while the one that takes its place begins: that one
waits. The lock is the kernel's (POSIX, fcntl): NFS carries it to other hosts, no child inherits it, and it goes with
the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

logger = logging.getLogger(__name__)

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.5
# Whoever closes any handle of the file lets go of the lock: there is one, kept here.
HELD: list[int] = []


def hold(folder: Path, wait_seconds: float = WAIT_SECONDS) -> str:
    """Take the lock, which this process then keeps until its end, or its next run; returns why it cannot be had."""
    while HELD:
        os.close(HELD.pop())
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    HELD.append(handle)
    until, told = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("%s cannot be locked (%s): nothing keeps a second run out of it", folder, error.strerror)
                return ""
        owner = os.pread(handle, 500, 0).decode(errors="replace").strip() or "another process"
        if time.monotonic() >= until:
            return f"{folder} is in use by {owner}: give another run.dir, or end that run first"
        if not told:
            logger.warning("%s is in use by %s: waiting up to %.0f s for its end", folder, owner, wait_seconds)
            told = True
        time.sleep(POLL_SECONDS)
    job = os.environ.get("SLURM_JOB_ID")
    os.ftruncate(handle, 0)
    os.pwrite(
        handle, f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}\n".encode(), 0
    )
    return ""
