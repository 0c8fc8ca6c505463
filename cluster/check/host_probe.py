"""``python -m priorclip.cluster.check.host_probe NAME FOLDER [SHARDS]``

The probe of ``cluster check``: it describes its host and tests connections to other hosts.

First it prints a description of its host. Then it reads questions, one JSON a line, and answers each until its input
ends. Each answer is JSON behind a mark:

    cluster-probe {"host": "worker-0", "torch": "2.14.1", "deepspeed": "0.19.8", "count": 8, "free_gb": 812.4, ...}
    {"clock": true}                           ->  {"host": "worker-0", "time": 1767225600.1}
    {"listen": {"worker-0": 29500}}           ->  {"host": "worker-0", "listening": null}     # or the error
    {"reach": [["w1", "10.0.0.3", 40112]]}    ->  {"host": "worker-0", "reached": {"w1": {"from": "10.0.0.2"}}}

Under srun all nodes get the same command and the same questions; NAME is ``-`` and means the node's own name.
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
HASHED_PACKAGES = (
    "cluster",
    "common",
    "data_shards",
    "experiments",
    "finetune",
    "model",
    "pretrain",
    "retrieval",
    "training",
)
HASHED_SUFFIXES = (".py", ".json", ".yaml", ".sbatch", ".html")


def main(name: str, folder: str, shards: str | None) -> None:
    name = os.environ["SLURMD_NODENAME"] if name == "-" else name
    server = open_listener(0)
    send_answer(name, {**describe_host(folder, shards), "data_port": server.getsockname()[1]})
    for line in sys.stdin:
        question = json.loads(line)
        if "clock" in question:
            send_answer(name, {"time": time.time()})
        elif "listen" in question:
            send_answer(name, {"listening": listen(question["listen"].get(name))})
        elif "reach" in question:
            with ThreadPoolExecutor(64) as pool:
                answers = pool.map(lambda target: connect(target[1], target[2]), question["reach"])
            send_answer(name, {"reached": dict(zip((target[0] for target in question["reach"]), answers))})


def send_answer(name: str, answer: dict[str, Any]) -> None:
    print(MARK + json.dumps({"host": name, **answer}), flush=True)


def open_listener(port: int) -> socket.socket:
    """Opens a listening socket. A thread accepts each connection and closes it."""
    server = socket.create_server(("", port), backlog=1024)

    def serve() -> None:
        while True:
            with contextlib.suppress(OSError):
                server.accept()[0].close()

    threading.Thread(target=serve, daemon=True).start()
    return server


def listen(port: int | None) -> str | None:
    """Listens on the port. Returns the error, or None if it listens now or ``port`` is None."""
    if port is None:
        return None
    try:
        open_listener(port)
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def connect(address: str, port: int) -> dict[str, str]:
    """Returns ``{"from": own address}`` if a connection can be made, otherwise ``{"error": reason}``."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            return {"from": connection.getsockname()[0]}
    except OSError as error:
        return {"error": os.strerror(error.errno) if error.errno else str(error)}


def describe_host(folder: str, shards: str | None) -> dict[str, Any]:
    """Versions, code, accelerators and free space. ``count`` accelerators is 0 on a CPU machine; 1 GB is 10^9 bytes."""
    kind, count, cuda, nccl = accelerators()
    return {
        "hostname": socket.gethostname(),
        "addresses": ip_addresses(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "cuda": cuda,
        "nccl": nccl,
        "code": {name: code_hash(Path(__file__).resolve().parents[2] / name) for name in HASHED_PACKAGES},
        "commit": git_commit(),
        "accelerator": kind,
        "count": count,
        "free_gb": free_gb(folder),
        "shm_gb": free_gb("/dev/shm"),
        "shards": verify_shards(shards) if shards else None,
    }


def accelerators() -> tuple[str, int, str, str]:
    """(name, number, CUDA version, NCCL version) of the accelerators that a run here would use."""
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


def code_hash(package: Path) -> str:
    """Eight digits of a hash over the files of the package that a run reads."""
    digest = sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in HASHED_SUFFIXES):
        digest.update(f"{path.relative_to(package)}\0".encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:8]


def git_commit() -> str | None:
    """The short hash of the commit, or None if the code is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def ip_addresses() -> list[str]:
    """IPv4 addresses in the order of ``hostname -I``. DeepSpeed takes the first as MASTER_ADDR."""
    interfaces = psutil.net_if_addrs().items()
    found = [entry.address for name, entries in interfaces if name != "lo" for entry in entries
             if entry.family == socket.AF_INET]  # fmt: skip
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True, timeout=10)
        order = listed.stdout.split()
        found.sort(key=lambda address: order.index(address) if address in order else len(order))
    return found


def free_gb(folder: str) -> float | None:
    """Free space of ``folder``, or of its parent if it does not exist. None if the parent does not exist either."""
    path = Path(folder).absolute()
    existing = path if path.exists() else path.parent
    return round(shutil.disk_usage(existing).free / 1e9, 2) if existing.exists() else None


def verify_shards(specification: str) -> dict[str, Any]:
    """Runs ``data_shards verify --sizes`` on local or remote shards: it uses the same reader as a run.

    It is another process because this package does not import data_shards. Returns ``count``, ``bytes``, ``digest``
    (a hash of names and sizes), ``wrong`` (the number of bad shards) and ``problems`` (the reason by shard).
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
    os._exit(0)  # the threads of the listeners never end
