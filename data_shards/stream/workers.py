"""Starts and stops the decoding workers of a stream or an evaluation, and makes them ignore preemption signals."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from priorclip.common.files import naming
from priorclip.common.processes import SHARED_MEMORY, end_with_asker, replace_environment, start_forkserver

SMALL = 1 << 18  # bytes; smaller tensors go through the pipe
# What torch says in a worker, and of a worker that the kernel ended because it wrote to memory that is not there.
SHARED_MEMORY_IS_FULL = re.compile(r"No space left on device|shared memory \(shm\)|Bus error")
NO_ROOM = "the data workers had no room for a batch: enlarge it, or lower data.workers and data.prefetch (0 needs none)"
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def load_batches(
    fetcher: Dataset,
    plan: Iterable[list],
    workers: int,
    *,
    prefetch: int = 2,
    start_method: str = "forkserver",
    pin_memory: bool | None = False,
) -> Iterator[dict[str, Any]]:
    """Yields ``fetcher.__getitems__(entry)`` for each entry of the plan, in order. ``pin_memory`` as in DataConfig.

    Closing the iterator, or the end of the process, stops the workers, also if a signal kills the process.
    """
    options: dict[str, Any] = {}
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are parallel already
        context = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            start_data_forkserver()
        options = {
            "prefetch_factor": prefetch,
            "multiprocessing_context": context,
            "worker_init_fn": partial(begin_worker, dict(os.environ)),
        }
    collate: Callable[[Any], Any] = small_tensors_to_arrays if workers else unchanged
    loader: DataLoader = DataLoader(
        fetcher,
        batch_sampler=plan,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator(),  # otherwise each iterator would advance the global generator, which dropout uses
        **options,
    )
    with naming(SHARED_MEMORY):
        iterator = iter(loader)
    received = receive(iterator)
    # multiprocessing ends workers by SIGTERM at exit, which they ignore: so they are stopped before.
    stop = getattr(iterator, "_shutdown_workers", None)
    if stop is None:
        yield from received
        return
    atexit.register(stop)
    try:
        yield from received
    finally:
        atexit.unregister(stop)
        stop()


def receive(iterator: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the batches of a loader. Raises OSError if the workers had no room in shared memory for one."""
    while True:
        try:
            batch = next(iterator, None)
        except RuntimeError as error:
            if SHARED_MEMORY_IS_FULL.search(str(error)):
                raise OSError(errno.ENOSPC, NO_ROOM, SHARED_MEMORY) from error
            raise
        if batch is None:
            return
        yield arrays_to_tensors(batch)


def start_data_forkserver() -> None:
    """Starts the fork server with our module and torch imported."""
    # The new process inherits blocked signals. It ignores them itself only after it has imported torch.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        start_forkserver(["priorclip.data_shards.stream.forkserver_preload"])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def begin_worker(environment: Mapping[str, str], worker: int) -> None:
    """Prepares a new worker: takes the current credentials and proxies of the training process, and ends with it."""
    end_with_asker()
    replace_environment(environment)
    ignore_preemption_signals(worker)


def ignore_preemption_signals(worker: int) -> None:
    """Ignores SLURM's warning, which goes to the whole process group; only the training process reacts to it."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def unchanged(batch: Any) -> Any:
    """Returns the batch itself, because the fetcher already makes whole batches."""
    return batch


def small_tensors_to_arrays(batch: dict[str, Any]) -> dict[str, Any]:
    """Turns small tensors into arrays, because a shared-memory tensor costs a millisecond in both processes.

    Large ones move to shared memory here, where an error reaches the training process. Later, a thread of the queue
    would do it, which drops the batch if there is no room, and the training process would wait for ever.
    """
    return {name: for_the_queue(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def for_the_queue(value: torch.Tensor) -> torch.Tensor | np.ndarray:
    return value.numpy() if value.nbytes < SMALL else value.share_memory_()


def arrays_to_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """Reverses ``small_tensors_to_arrays``."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
