"""Worker processes on this machine. Each gets the environment that its parent has when the pool is made.

    with pool(8) as workers: results = workers.map(work, jobs)

A fork server starts them, because this is safe beside threads, MPI and CUDA. The server keeps the environment of its
own start. So we pass the present one to each process, which then has credentials, an endpoint or a proxy set later.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def pool(workers: int, prepare: Callable[..., object] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """Returns an executor of ``workers`` processes. Each process first calls ``prepare(*arguments)``."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, context, initializer=begin, initargs=(dict(os.environ), prepare, *arguments))


def begin(environment: Mapping[str, str], prepare: Callable[..., object] | None = None, *arguments: Any) -> None:
    """Runs first in a new process: takes the environment and calls ``prepare``."""
    replace_environment(environment)
    if prepare is not None:
        prepare(*arguments)


def replace_environment(environment: Mapping[str, str]) -> None:
    """Makes ``environment`` the environment of this process and removes all other variables."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
