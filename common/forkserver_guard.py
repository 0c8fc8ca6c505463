"""Only a fork server imports this module. It kills the workers when the process that asked for them has ended.

A worker ends by itself then (processes.py), but not while it is stopped: only SIGKILL ends a stopped process.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

import psutil


def guard(asker: int) -> None:
    """Starts a thread that waits for the end of the process ``asker``, and then ends this one and its workers."""
    with contextlib.suppress(AttributeError, OSError):  # only Linux has it; the process may have ended
        ended = os.pidfd_open(asker)
        threading.Thread(target=end_after, args=(ended,), name="fork server's guard", daemon=True).start()


def end_after(ended: int) -> None:
    waiting = select.poll()
    waiting.register(ended)
    waiting.poll()
    for worker in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            worker.kill()
    os._exit(1)


guard(os.getppid())
