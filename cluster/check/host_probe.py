"""``python -m priorclip.cluster.check.host_probe NAME FOLDER [SHARDS]``

What this host has and which hosts it reaches, for ``cluster check``.

It begins with its facts, then answers a question a line of its input, until that ends; all in JSON, answers marked:

    cluster-probe {"host": "worker-0", "torch": "2.14.1", "deepspeed": "0.19.8", "count": 8, "free_gb": 812.4, ...}
    {"clock": true}                           ->  {"host": "worker-0", "time": 1767225600.1}
    {"listen": {"worker-0": 29500}}           ->  {"host": "worker-0", "listening": null}     # or what is in the way
    {"reach": [["w1", "10.0.0.3", 40112]]}    ->  {"host": "worker-0", "reached": {"w1": {"from": "10.0.0.2"}}}

NAME ``-`` is the node's name under srun, where all nodes get the same command and the same questions.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

MARK = "cluster-probe "
CONNECT_SECONDS = 4.0
SHARDS_SECONDS = 60.0
PACKAGES = ("cluster", "common", "data_shards", "experiments", "finetune", "model", "pretrain", "retrieval", "training")
KINDS = (".py", ".json", ".yaml", ".sbatch", ".html")


def main(name: str, folder: str, shards: str | None) -> None:
    name = os.environ["SLURMD_NODENAME"] if name == "-" else name
    own = listener(0)
    say(name, {**facts(folder, shards), "data_port": own.getsockname()[1]})
    for line in sys.stdin:
        question = json.loads(line)
        if "clock" in question:
            say(name, {"time": time.time()})
        elif "listen" in question:
            say(name, {"listening": listen(question["listen"].get(name))})
        elif "reach" in question:
            with ThreadPoolExecutor(64) as pool:
                answers = pool.map(lambda target: reach(target[1], target[2]), question["reach"])
            say(name, {"reached": dict(zip((target[0] for target in question["reach"]), answers))})


def say(name: str, answer: dict[str, Any]) -> None:
    print(MARK + json.dumps({"host": name, **answer}), flush=True)


def listener(port: int) -> socket.socket:
    """A listening socket whose callers are let in and sent away."""
    server = socket.create_server(("", port), backlog=1024)

    def serve() -> None:
        while True:
            with contextlib.suppress(OSError):
                server.accept()[0].close()

    threading.Thread(target=serve, daemon=True).start()
    return server


def listen(port: int | None) -> str | None:
    """What keeps this host from listening on the port; None where it now does, or was not asked to."""
    if port is None:
        return None
    try:
        listener(port)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def reach(address: str, port: int) -> dict[str, str]:
    """``{"from": own address}`` where a connection can be made, else ``{"error": why}``."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            return {"from": connection.getsockname()[0]}
    except OSError as error:
        return {"error": os.strerror(error.errno) if error.errno else str(error)}


def facts(folder: str, shards: str | None) -> dict[str, Any]:
    """In this machine's own words; ``count`` accelerators, 0 on a CPU machine, sizes in GB (10^9 bytes)."""
    kind, count, cuda, nccl = accelerators()
    return {
        "hostname": socket.gethostname(),
        "addresses": addresses(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "cuda": cuda,
        "nccl": nccl,
        "code": {name: code_of(Path(__file__).resolve().parents[2] / name) for name in PACKAGES},
        "commit": commit(),
        "accelerator": kind,
        "count": count,
        "free_gb": free_gb(folder),
        "shm_gb": free_gb("/dev/shm"),
        "shards": look_at_shards(shards) if shards else None,
    }


def accelerators() -> tuple[str, int, str, str]:
    """(name, number, CUDA version, NCCL version) of what a run here would use."""
    if version("torch") == "missing":
        return "cpu", 0, "none", "none"
    import torch

    cuda = torch.version.cuda or torch.version.hip or "none"
    nccl = "none"
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return "cpu", 0, cuda, nccl
    return torch.cuda.get_device_name(0), torch.cuda.device_count(), cuda, nccl


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def code_of(package: Path) -> str:
    """Eight digits that differ where a file of the package that a run reads does."""
    digest = sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in KINDS):
        digest.update(f"{path.relative_to(package)}\0".encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


def commit() -> str | None:
    """git's name of the code, where it is a checkout."""
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def addresses() -> list[str]:
    """IPv4 addresses in the order of ``hostname -I``, whose first is DeepSpeed's choice of MASTER_ADDR."""
    interfaces = psutil.net_if_addrs().items()
    found = [entry.address for name, entries in interfaces if name != "lo" for entry in entries
             if entry.family == socket.AF_INET]  # fmt: skip
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True, timeout=10).stdout.split()
        found.sort(key=lambda address: said.index(address) if address in said else len(said))
    return found


def free_gb(folder: str) -> float | None:
    """Free space where ``folder`` is or would be made; None where even the parent is not there."""
    path = Path(folder).absolute()
    existing = path if path.exists() else path.parent
    return round(shutil.disk_usage(existing).free / 1e9, 2) if existing.exists() else None


def look_at_shards(specification: str) -> dict[str, Any]:
    """What ``data_shards verify --sizes`` says here of shards on a disk or behind a URL: the reader that a run has.

    In a process of its own, as this package knows no shards. ``count``, ``bytes``, ``digest`` (names and sizes),
    ``wrong`` and, for each that is not right, why.
    """
    command = [
        sys.executable,
        "-m",
        "priorclip.data_shards",
        "verify",
        "--sizes=true",
        "--json=true",
        f"--shards={specification}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SHARDS_SECONDS)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        problem = f"no answer within {SHARDS_SECONDS:g} s"
    except ValueError:
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"count": 0, "bytes": 0, "digest": "", "problems": {"the shards": problem}, "wrong": 1}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
    os._exit(0)  # the listeners' threads wait for ever
