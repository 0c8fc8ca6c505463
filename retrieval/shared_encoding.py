"""Several processes, or several GPUs, share the encoding of a test set.

    torchrun --nproc-per-node 8 -m retrieval index ...

    batch     0 1 2 3 4 5 6      the batches of one process
    rank 0    0   2   4   6
    rank 1      1   3   5

A batch has the same images on whichever rank encodes it, so that the features are those of one process to the last
bit, if the devices and the threads of a rank are the same. At the end every rank gets the rows of all. Rank 0 writes.

    with joined():
        features = encode(...)               # calls from_all_ranks
        if is_first(): write(features)

A rank that fails says so and ends. torchrun then ends the others, which wait for its rows.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from priorclip.common.command_line import torchrun_ranks
from priorclip.model.losses.gather import rank, world_size

T = TypeVar("T")
WAIT = datetime.timedelta(days=1)  # for a slower rank; torchrun ends the others at once if one fails
PIECE = 1 << 28  # bytes that are sent together


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes of torchrun; a process that torchrun has not started is alone and joins nobody."""
    if torchrun_ranks() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # "cuda" then means this one
    dist.init_process_group("gloo", timeout=WAIT)  # rows travel in host memory
    yield
    # Not after an error: the other ranks wait for this one until torchrun ends them.
    dist.destroy_process_group()


def is_first() -> bool:
    """Tells whether this process writes the results: rank 0, or the only process."""
    return rank() == 0


def from_all_ranks(rows: Tensor) -> Tensor:
    """Returns the rows (n, ...) of all ranks in rank order, on the CPU and on every rank. n differs between ranks."""
    rows = rows.cpu()
    if world_size() == 1:
        return rows
    counts: list[int] = [0] * world_size()
    dist.all_gather_object(counts, len(rows))
    parts = []
    for source, count in enumerate(counts):
        part = rows.contiguous() if source == rank() else rows.new_empty((count, *rows.shape[1:]))
        for piece in part.view(-1).view(torch.uint8).split(PIECE) if count else ():
            dist.broadcast(piece, source)
        parts.append(part)
    return torch.cat(parts)


def of_first_rank(value: T) -> T:
    """Returns the value of rank 0, a small object, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]
