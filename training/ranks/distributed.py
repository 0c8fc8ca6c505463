"""The rank of this process: under ``deepspeed``, ``torchrun``, ``srun``, ``mpirun``, or alone.

The deepspeed launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_*. ``srun`` sets SLURM_*, from which we
derive them. Under ``mpirun`` DeepSpeed asks mpi4py, unless MASTER_ADDR is set (``mpirun -x``). With none of these, the
run is one process. rendezvous.py defines where the ranks meet.

    rank = start(EngineConfig())      # Rank(rank=0, world_size=2, local_rank=0, device=cpu)
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import mpi_discovery

from priorclip.common.masking import deny_other_writers
from priorclip.common.output import get_logger
from priorclip.common.ports import TORCH_PORT, free_port, job_port
from priorclip.training.config import EngineConfig
from priorclip.training.ranks.missing_ranks import origin_hint, reporting_missing_ranks
from priorclip.training.ranks.rendezvous import bound_store, interface_to, torchrun_has_store

logger = get_logger(__name__)

TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_VARIABLES = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h


@dataclass(frozen=True)
class Rank:
    """One process of a run. ``device`` holds its tensors."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(config: EngineConfig) -> Rank:
    """Joins the other ranks and returns the rank of this process. Safe to call again in the same process.

    Raises:
        RuntimeError: the environment has some, but not all, of the launchers' variables
        TimeoutError: ranks are missing; the message names them
    """
    deny_other_writers()
    environment = rank_environment(dict(os.environ))
    hint = origin_hint(os.environ, ranks_are_set=not environment)
    os.environ.update(environment)
    # CUDA's matrix libraries are deterministic only with a fixed workspace. They read this when they start.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision(config.matmul_precision)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_shared_memory_op()
    join(datetime.timedelta(minutes=config.timeout_minutes), hint)
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        ranks = local_world_size(os.environ) or dist.get_world_size()
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // ranks))
        keep_freed_memory()
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
        if config.threads:
            torch.set_num_threads(config.threads)
    return Rank(dist.get_rank(), dist.get_world_size(), local_rank, device)


def join(timeout: datetime.timedelta, hint: str = "") -> None:
    """Creates the process group, with its sockets on the network of MASTER_ADDR.

    Args:
        timeout: for the other ranks to come, and for each collective
        hint: what to change if they do not come

    Raises:
        TimeoutError: ranks are missing; the message names them
    """
    if any(name not in os.environ for name in TORCH_VARIABLES):
        mpi_discovery(int(os.environ.get("MASTER_PORT", TORCH_PORT)), verbose=False)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    interface = interface_to(address, port)
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # otherwise gloo uses the address of the host's own name
    serves = os.environ["RANK"] == "0" and not torchrun_has_store() and not dist.is_initialized()
    alone = int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized()
    waiting = contextlib.nullcontext() if alone else reporting_missing_ranks(address, port, hint)
    with bound_store(address, port, timeout) if serves else contextlib.nullcontext(), waiting:
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(), timeout=timeout, verbose=False
        )
    leave_mpi()


def leave_at_exit() -> None:
    """Destroys the process group when this process exits. Call it after a successful run only.

    Without it, a gloo thread that still holds the tensors of a finished collective asks for Python's lock after the
    interpreter has ended, and the process aborts with SIGABRT. A failed rank must not call it, because collectives of
    other ranks wait for it.
    """
    atexit.unregister(leave)
    atexit.register(leave)


def leave() -> None:
    if dist.is_initialized():
        wait_for_gloo()  # its threads outlive the group if an engine keeps the group
        dist.destroy_process_group()


def wait_for_gloo(limit_seconds: float = 5.0) -> None:
    """Waits until each thread of gloo sleeps twice in a row, while it could have Python's lock. Needs Linux's /proc."""
    calm, end = 0, time.monotonic() + limit_seconds
    while calm < 2 and time.monotonic() < end:
        time.sleep(0.005)
        calm = calm + 1 if set(gloo_thread_states()) <= {"S"} else 0


def gloo_thread_states() -> Iterator[str]:
    """State of each thread that gloo started: S is asleep, R runs or wants to."""
    for path in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            name, _, rest = path.read_text().partition("(")[2].rpartition(") ")
            if "gloo" in name:
                yield rest[0]


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed large tensors, instead of returning it and page-faulting it in each step.

    The page faults take a quarter of the CPU time of a convolutional network's step. Peak memory is the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def disable_shared_memory_op() -> None:
    """Keeps DeepSpeed from compiling its CPU inference collective, which training does not use.

    It needs a compiler, a lock that all runs of this user wait for, and 69 MB of /dev/shm for each rank, which it
    never removes. DeepSpeed reads its table of the operators that it could build for this one only. It fills the table
    when it is read, by asking the compiler in each rank for all of them: so the table is given before.
    """
    if get_accelerator().device_name() == "cpu":
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def leave_mpi() -> None:
    """Finalizes MPI, which we need only for the ranks. Otherwise a failed rank waits for the others at its exit.

    DeepSpeed counts local ranks by host name, but its engine requires mpirun's own count, so we set that.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or mpi.Is_finalized():
        return
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]
    mpi.Finalize()


def rank_environment(environment: dict[str, str]) -> dict[str, str]:
    """Returns torch.distributed's variables, derived from the launcher's; empty if nothing is to be added."""
    present = [name for name in TORCH_VARIABLES if name in environment]
    if len(present) == len(TORCH_VARIABLES):
        return {}
    if "OMPI_COMM_WORLD_SIZE" in environment:  # before SLURM_*, which mpirun passes on inside a job
        return openmpi_environment(environment)
    # srun starts a step of a job. The batch script itself has SLURM_PROCID and SLURM_NTASKS too, but is no rank.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return slurm_environment(environment)
    if any(name in environment for name in MPI_VARIABLES):
        return {}  # DeepSpeed asks mpi4py
    if "RANK" in environment or int(environment.get("WORLD_SIZE", "1")) > 1:
        missing = ", ".join(name for name in TORCH_VARIABLES if name not in environment)
        raise RuntimeError(
            f"the environment has {', '.join(present)} but not {missing}: start the run with deepspeed, torchrun, srun"
            " or mpirun, which set all of them, or unset these variables for one process"
        )
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def openmpi_environment(environment: dict[str, str]) -> dict[str, str]:
    """Variables under ``mpirun -x MASTER_ADDR=...``; without it mpi4py gives the first address of rank 0's host."""
    if "MASTER_ADDR" not in environment:
        return {}
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "MASTER_PORT": environment.get("MASTER_PORT", str(TORCH_PORT)),
    }


def slurm_environment(environment: dict[str, str]) -> dict[str, str]:
    """Variables under ``srun``: a task is a rank, the first host is the master, its port follows from the job ID."""
    master = environment.get("MASTER_ADDR")
    if master is None:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        master = hosts.stdout.split()[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": master,
        "MASTER_PORT": environment.get("MASTER_PORT", str(job_port(int(environment["SLURM_JOB_ID"])))),
    }


def local_world_size(environment: Mapping[str, str]) -> int | None:
    """Number of ranks on this host, from the launcher's variables; None if it sets none."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):  # torchrun, deepspeed, mpirun
        if name in environment:
            return int(environment[name])
    # srun: ``2(x3),1`` means two tasks on each of three nodes and one on the last.
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, nodes in groups for _ in range(int(nodes or 1))]
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds all generators equally on every rank; with ``deterministic``, torch refuses other kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # Unlike use_deterministic_algorithms, this does not import torch's compiler to tell it.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds a step by (seed, step, rank), so that dropout of a resumed run equals that of an uninterrupted one."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. All ranks get the same answer. A collective."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Mean of each value over the ranks. Every rank passes the same keys. A collective."""
    packed = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(sorted(values), (packed / dist.get_world_size()).tolist()))


def gather_rows_no_grad(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``(n, ...)`` of all ranks in order: ``(world size * n, ...)``, without gradient. n is the same on all."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
