"""Decoding workers of a stream or an evaluation: how they start, which signals they survive, how they end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from priorclip.common.processes import replace_environment

SMALL = 1 << 18  # bytes that are sent through the pipe
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def load_batches(
    fetcher: Dataset,
    plan: Iterable[list],
    workers: int,
    *,
    prefetch: int = 2,
    start_method: str = "forkserver",
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """What ``fetcher.__getitems__`` returns for each entry of the plan, in the plan's order.

    Closing the iterator, or the end of the process, stops the workers.
    """
    options: dict[str, Any] = {}
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        context = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            start_forkserver()
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
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else each iterator would move the global generator, and with it dropout
        **options,
    )
    iterator = iter(loader)
    received = map(arrays_to_tensors, iterator)
    # Workers ignore SIGTERM, by which multiprocessing ends them at exit: they are told to stop before it tries.
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


def start_forkserver() -> None:
    """Start the fork server with our module loaded, also where the package is found by sys.path alone.

    Python 3.11 gives the fork server its environment and not its sys.path, and passes over what it cannot import.
    """
    multiprocessing.set_forkserver_preload(["priorclip.data_shards.stream.forkserver_preload"])
    root, before = str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root if not before else f"{root}{os.pathsep}{before}"
    # Blocked signals stay so in what is started: its own ignoring begins when it has imported torch.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def begin_worker(environment: Mapping[str, str], worker: int) -> None:
    """What a worker does first: credentials and proxies are those that the training process has now."""
    replace_environment(environment)
    ignore_preemption_signals(worker)


def ignore_preemption_signals(worker: int) -> None:
    """SLURM's warning goes to the whole process group; only the training process is to act on it."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def unchanged(batch: Any) -> Any:
    """The fetcher returns whole batches already."""
    return batch


def small_tensors_to_arrays(batch: dict[str, Any]) -> dict[str, Any]:
    """Small tensors as arrays: each tensor costs a handle of shared memory, a millisecond in both processes."""
    return {
        name: value.numpy() if isinstance(value, torch.Tensor) and value.nbytes < SMALL else value
        for name, value in batch.items()
    }


def arrays_to_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """What ``without_handles`` was given."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
