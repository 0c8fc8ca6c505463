"""``python -m cluster launch ... -- priorclip.cluster.check.rank_rates``.

Measures compute and network of the ranks for ``cluster check``.

All ranks multiply matrices at the same time. Then they all-reduce. Then the first rank of each host sends to the first
rank of the next host. Rank 0 prints the result as one line:

    cluster-rates {"ranks": [{"rank": 0, "host": "worker-0", "tflops": 412.3}, ...],
                   "all_reduce_gb_s": 142.1, "links": [[0, 8, 23.9], ...]}

The bus bandwidth of the all-reduce is 2 (n - 1) / n bytes / seconds, as in nccl-tests. The rate of a link is one way.
"""

from __future__ import annotations

import itertools
import json
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from priorclip.cluster.check.measure_speed import RATES_MARK
from priorclip.training.config import EngineConfig
from priorclip.training.ranks.distributed import Rank, start

BURSTS = 7
BURST_SECONDS = 0.15


def main() -> None:
    # One thread a rank, because the data workers of a run use the other cores.
    rank = start(EngineConfig(threads=1, timeout_minutes=2))
    own = {"rank": rank.rank, "host": socket.gethostname(), "tflops": compute_rate(rank.device)}
    ranks: list[dict[str, Any]] = [own] * rank.world_size
    dist.all_gather_object(ranks, own)
    rates = {"ranks": ranks, "all_reduce_gb_s": all_reduce_rate(rank), "links": link_rates(rank)}
    if rank.is_first:
        print(RATES_MARK + json.dumps(rates), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def compute_rate(device: torch.device) -> float:
    """Rate of the best of several bursts of matrix products, in 10^12 operations a second."""
    size, dtype = (384, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    multiply(left, right, 0.0)
    dist.barrier()
    return max(multiply(left, right, BURST_SECONDS) for _ in range(BURSTS))


def multiply(left: torch.Tensor, right: torch.Tensor, seconds: float) -> float:
    count, begun = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begun < seconds:
        for _ in range(4):
            left @ right
        synchronize(left.device)
        count += 4
    return 2 * len(left) ** 3 * count / (time.perf_counter() - begun) / 1e12


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def message(device: torch.device) -> torch.Tensor:
    """The tensor that ranks send: 64 MiB on GPUs, 16 MiB on CPUs."""
    return torch.ones((4 if device.type == "cpu" else 16) * 2**20, device=device)


def all_reduce_rate(rank: Rank) -> float | None:
    """Bus bandwidth in GB/s, the median of several all-reduces; None for one rank."""
    if rank.world_size == 1:
        return None
    data, seconds = message(rank.device), []
    for _ in range(1 + BURSTS):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(data)
        synchronize(rank.device)
        seconds.append(time.perf_counter() - begun)
        data.fill_(1)
    scale = 2 * (rank.world_size - 1) / rank.world_size * data.nbytes
    return scale / statistics.median(seconds[1:]) / 1e9


def link_rates(rank: Rank) -> list[tuple[int, int, float]]:
    """(sender, receiver, GB/s) between the first ranks of neighbouring hosts, one pair after the other."""
    first = [0] * rank.world_size
    dist.all_gather_object(first, int(rank.local_rank == 0))
    firsts = [number for number, is_first in enumerate(first) if is_first]
    pairs = list(itertools.pairwise(firsts + firsts[:1] * (len(firsts) > 2)))
    data, own = message(rank.device), []
    for sender, receiver in pairs:
        dist.barrier()
        if rank.rank == sender:
            for _ in range(3):
                dist.send(data, receiver)
            dist.recv(data[:1], receiver)
        if rank.rank == receiver:
            begun = 0.0
            for _ in range(3):  # the first opens the connection
                dist.recv(data, sender)
                synchronize(rank.device)
                begun = begun or time.perf_counter()
            own.append((sender, receiver, 2 * data.nbytes / (time.perf_counter() - begun) / 1e9))
            dist.send(data[:1], sender)
    found: list[list[tuple[int, int, float]]] = [own] * rank.world_size
    dist.all_gather_object(found, own)
    return sorted(link for links in found for link in links)


if __name__ == "__main__":
    main()
