"""Worker processes on this machine. Each gets the environment that its parent has when the pool is made.

    with pool(8) as workers: results = workers.map(work, jobs)

A fork server starts them, because this is safe beside threads, MPI and CUDA. The server keeps the environment of its
own start. So we pass the present one to each process, which then has credentials, an endpoint or a proxy set later.

A worker ends when the process that asked for it ends. Python does not see to that if a signal kills this process: the
fork server lives as long as a worker has its pipe open, and a worker only looks whether the fork server lives. So the
worker looks too, and the fork server ends workers that cannot, because they are stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from priorclip.common.files import naming

GUARD = "priorclip.common.forkserver_guard"
SHARED_MEMORY = "/dev/shm"  # holds the semaphores of worker processes, and the batches of data workers


def pool(workers: int, prepare: Callable[..., object] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Returns an executor of ``workers`` processes. Each process first calls ``prepare(*arguments)``."""
    start_forkserver()
    context = multiprocessing.get_context("forkserver")
    with naming(SHARED_MEMORY):
        return ProcessPoolExecutor(
            workers, context, initializer=begin, initargs=(dict(os.environ), prepare, *arguments)
        )


def start_forkserver(modules: Sequence[str] = ("__main__", GUARD)) -> None:
    """Starts the fork server with these modules imported, also if only sys.path finds the package.

    Python 3.11 gives the fork server the environment but not sys.path, and ignores modules that it cannot import.

    Args:
        modules: what the server imports, so that workers start fast; one must import the guard
    """
    multiprocessing.set_forkserver_preload(list(modules))
    root, before = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root if not before else f"{root}{os.pathsep}{before}"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def begin(environment: Mapping[str, str], prepare: Callable[..., object] | None = None, *arguments: Any) -> None:
    """Runs first in a new process: takes the environment and calls ``prepare``."""
    end_with_asker()
    replace_environment(environment)
    if prepare is not None:
        prepare(*arguments)


def end_with_asker() -> None:
    """Makes this worker end at once when the process that asked for it has ended, whatever has ended it.

    A thread waits for the end of a pipe, which the kernel closes. Without workers, the fork server and the resource
    tracker end too, and with them their shared memory and semaphores.
    """
    asker = multiprocessing.parent_process()
    if asker is not None:
        threading.Thread(target=end_after, args=(asker,), name="end with asker", daemon=True).start()


def end_after(asker: BaseProcess) -> None:
    asker.join()
    os._exit(1)  # without the main thread, which may be busy for long


def replace_environment(environment: Mapping[str, str]) -> None:
    """Makes ``environment`` the environment of this process and removes all other variables."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
