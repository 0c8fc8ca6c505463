"""Ports of the rendezvous: a free one on one machine, or one that follows from the job number under SLURM."""

from __future__ import annotations

import socket

TORCH_PORT = 29500  # default of torch and DeepSpeed


def free_port() -> int:
    """Returns a port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def job_port(job: int) -> int:
    """Returns the port of a SLURM job. Every rank computes the same."""
    return 20000 + job % 20000
