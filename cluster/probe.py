"""``python -m cluster.probe FOLDER``: what this machine has, as one line of JSON; ``cluster check`` runs it on hosts.

{"host": "worker-0", "python": "3.11.14", "torch": "2.14.1", "deepspeed": "0.19.8", "cuda": "12.8",
 "accelerator": "NVIDIA H200", "count": 8, "free_gb": 812.4, "shm_gb": 63.9, "time": 1767225600.1}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any


def probe(folder: str) -> dict[str, Any]:
    """The facts, in this machine's own words; ``count`` accelerators, 0 on a CPU machine, sizes in GB (10^9 bytes)."""
    kind, count, cuda = accelerators()
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "cuda": cuda,
        "accelerator": kind,
        "count": count,
        "free_gb": free_gb(folder),
        "shm_gb": free_gb("/dev/shm"),
        # Last, so that reading the line tells the clocks apart by no more than the way it came.
        "time": time.time(),
    }


def accelerators() -> tuple[str, int, str]:
    """(name, number, CUDA version) of what a run here would use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or version("torch") == "missing":
        return "cpu", 0, "none"
    import torch

    cuda = torch.version.cuda or torch.version.hip or "none"
    if not torch.cuda.is_available():
        return "cpu", 0, cuda
    return torch.cuda.get_device_name(0), torch.cuda.device_count(), cuda


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def free_gb(folder: str) -> float | None:
    """Free space where ``folder`` is or would be made; None where even the parent is not there."""
    path = Path(folder).absolute()
    existing = path if path.exists() else path.parent
    return round(shutil.disk_usage(existing).free / 1e9, 1) if existing.exists() else None


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1])), flush=True)
    os._exit(0)  # torch takes half a second to go, which would count as clock skew
