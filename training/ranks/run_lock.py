"""One run at a time in a run directory: rank 0 locks the file ``.lock`` in it until its process ends.

    lock_folder(folder)     # "", or "runs/b32 is in use by process 4711 on node-3: give another run.dir ..."

Two runs would remove each other's checkpoints and mix their metrics. A killed run may need some seconds to end, because
it writes a checkpoint or must first find a stopped rank. If the next run has already started, it waits. The lock is a
POSIX lock (fcntl): it also works across hosts on NFS, no child process inherits it, and it ends with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from priorclip.common.files import naming
from priorclip.common.output import get_logger

logger = get_logger(__name__)

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.5
# Closing any handle of the file releases the lock, so we keep a single handle here.
LOCKED: list[int] = []


def lock_folder(folder: Path, wait_seconds: float = WAIT_SECONDS) -> str:
    """Locks the folder until this process ends or starts its next run. Returns why it failed, or an empty string."""
    while LOCKED:
        os.close(LOCKED.pop())
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    LOCKED.append(handle)
    deadline, is_logged = time.monotonic() + wait_seconds, False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("cannot lock %s (%s): a second run could use it too", folder, error.strerror)
                return ""
        owner = os.pread(handle, 500, 0).decode(errors="replace").strip() or "another process"
        if time.monotonic() >= deadline:
            return f"{folder} is in use by {owner}: give another run.dir, or end that run first"
        if not is_logged:
            logger.warning("%s is in use by %s: waiting up to %.0f s until it ends", folder, owner, wait_seconds)
            is_logged = True
        time.sleep(POLL_SECONDS)
    job = os.environ.get("SLURM_JOB_ID")
    owner = f"process {os.getpid()} on {socket.gethostname()}{f', SLURM job {job}' if job else ''}\n"
    with naming(folder / ".lock"):
        os.ftruncate(handle, 0)
        os.pwrite(handle, owner.encode(), 0)
    return ""
