"""Ports that ranks meet at: a free one on one machine, one that follows from the job's number under SLURM."""

from __future__ import annotations

import socket

TORCH_PORT = 29500  # torch's and DeepSpeed's, where nothing else is said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def job_port(job: int) -> int:
    """A port that every rank of a SLURM job knows without being told."""
    return 20000 + job % 20000
