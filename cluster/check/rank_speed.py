"""``python -m cluster launch ... -- priorclip.cluster.check.rank_speed``.

Measures how fast the ranks compute and talk, for ``cluster check``.

All ranks multiply matrices at once; then they all-reduce; then each host's first rank sends to the next host's. Rank 0
says it in one line:

    cluster-rates {"ranks": [{"rank": 0, "host": "worker-0", "tflops": 412.3}, ...],
                   "all_reduce_gb_s": 142.1, "links": [[0, 8, 23.9], ...]}

The bus bandwidth of the all-reduce is 2 (n - 1) / n bytes / seconds, as nccl-tests states it; a link's is one way.
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

from priorclip.training.config import EngineConfig
from priorclip.training.ranks.distributed import Rank, start

MARK = "cluster-rates "
BURSTS = 7
BURST_SECONDS = 0.15


def main() -> None:
    # One thread a rank: hosts are compared, and a run's data workers have the other cores.
    rank = start(EngineConfig(threads=1, timeout_minutes=2))
    mine = {"rank": rank.rank, "host": socket.gethostname(), "tflops": compute_rate(rank.device)}
    ranks: list[dict[str, Any]] = [mine] * rank.world_size
    dist.all_gather_object(ranks, mine)
    rates = {"ranks": ranks, "all_reduce_gb_s": all_reduce_rate(rank), "links": link_rates(rank)}
    if rank.is_first:
        print(MARK + json.dumps(rates), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def compute_rate(device: torch.device) -> float:
    """The best of several bursts of matrix products, in 10^12 operations a second: a slow host is slow in all."""
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
        settle(left.device)
        count += 4
    return 2 * len(left) ** 3 * count / (time.perf_counter() - begun) / 1e12


def settle(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def payload(device: torch.device) -> torch.Tensor:
    """What is sent: 64 MiB between GPUs, 16 MiB else."""
    return torch.ones((4 if device.type == "cpu" else 16) * 2**20, device=device)


def all_reduce_rate(rank: Rank) -> float | None:
    """Bus bandwidth in GB/s, median of several; None for one rank."""
    if rank.world_size == 1:
        return None
    data, seconds = payload(rank.device), []
    for _ in range(1 + BURSTS):
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(data)
        settle(rank.device)
        seconds.append(time.perf_counter() - begun)
        data.fill_(1)
    scale = 2 * (rank.world_size - 1) / rank.world_size * data.nbytes
    return scale / statistics.median(seconds[1:]) / 1e9


def link_rates(rank: Rank) -> list[tuple[int, int, float]]:
    """(rank, rank, GB/s) between the first rank of each host and that of the next, one pair after the other."""
    first = [0] * rank.world_size
    dist.all_gather_object(first, int(rank.local_rank == 0))
    firsts = [number for number, is_first in enumerate(first) if is_first]
    pairs = list(itertools.pairwise(firsts + firsts[:1] * (len(firsts) > 2)))
    data, mine = payload(rank.device), []
    for sender, receiver in pairs:
        dist.barrier()
        if rank.rank == sender:
            for _ in range(3):
                dist.send(data, receiver)
            dist.recv(data[:1], receiver)
        if rank.rank == receiver:
            begun = 0.0
            for _ in range(3):  # the first opens the way
                dist.recv(data, sender)
                settle(rank.device)
                begun = begun or time.perf_counter()
            mine.append((sender, receiver, 2 * data.nbytes / (time.perf_counter() - begun) / 1e9))
            dist.send(data[:1], sender)
    found: list[list[tuple[int, int, float]]] = [mine] * rank.world_size
    dist.all_gather_object(found, mine)
    return sorted(link for links in found for link in links)


if __name__ == "__main__":
    main()
