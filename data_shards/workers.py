"""Decoding workers of a stream or an evaluation: how they start, which signals they survive, how they end."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def batches(
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
            context.set_forkserver_preload(["data_shards.forkserver"])
        options = {
            "prefetch_factor": prefetch,
            "multiprocessing_context": context,
            "worker_init_fn": survive_preemption,
        }
    loader: DataLoader = DataLoader(
        fetcher, batch_sampler=plan, collate_fn=as_it_is, num_workers=workers, pin_memory=pin_memory, **options
    )
    iterator = iter(loader)
    # Workers ignore SIGTERM, by which multiprocessing ends them at exit: they are told to stop before it tries.
    stop = getattr(iterator, "_shutdown_workers", None)
    if stop is None:
        yield from iterator
        return
    atexit.register(stop)
    try:
        yield from iterator
    finally:
        atexit.unregister(stop)
        stop()


def survive_preemption(worker: int) -> None:
    """SLURM's warning goes to the whole process group; only the training process is to act on it."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """The fetcher returns whole batches already."""
    return batch
