"""Processes of this machine that share work; each sees the environment that its parent has when it is asked for.

    with pool(8) as team: results = team.map(work, jobs)

They come from a fork server, which is safe beside threads, MPI and CUDA, and which keeps the environment of the moment
when it was first needed. Credentials, an endpoint or a proxy that were set after that reach a process because it is
handed the environment as it starts.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def pool(workers: int, prepare: Callable[..., object] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """An executor of ``workers`` processes, in each of which ``prepare(*arguments)`` runs first."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(workers, context, initializer=begin, initargs=(dict(os.environ), prepare, *arguments))


def begin(environment: Mapping[str, str], prepare: Callable[..., object] | None = None, *arguments: Any) -> None:
    """What a new process does first."""
    take_environment(environment)
    if prepare is not None:
        prepare(*arguments)


def take_environment(environment: Mapping[str, str]) -> None:
    """Make it this process's own, removals included."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
