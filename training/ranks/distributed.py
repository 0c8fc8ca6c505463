"""Who am I among the ranks: one process, ``deepspeed``, ``torchrun``, ``srun`` or ``mpirun``.

The deepspeed launcher and torchrun set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_*; ``srun`` sets SLURM_*, from which
they are derived here; under ``mpirun`` DeepSpeed asks mpi4py, unless MASTER_ADDR is given (``mpirun -x``); with none of
these the run is one process. Where the ranks meet is in training/ranks/rendezvous.py.

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
from collections.abc import Mapping
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.comm import mpi_discovery

from priorclip.common.masking import deny_other_writers
from priorclip.common.ports import TORCH_PORT, free_port, job_port
from priorclip.training.config import EngineConfig
from priorclip.training.ranks.rendezvous import agent_has_store, bound_store, interface_to

logger = logging.getLogger(__name__)

TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_VARIABLES = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h


@dataclass(frozen=True)
class Rank:
    """One process of a run. ``device`` is where its tensors live."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def start(config: EngineConfig) -> Rank:
    """Join the other ranks and return this process's place. Safe to call again in the same process.

    Raises:
        RuntimeError: some, but not all, of the variables that the launchers set are there.
    """
    deny_other_writers()
    environment = rank_environment(dict(os.environ))
    os.environ.update(environment)
    # CUDA's matrix libraries are deterministic only with a fixed workspace, read when they start.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_shared_memory_op()
    join(datetime.timedelta(minutes=config.timeout_minutes))
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


def join(timeout: datetime.timedelta) -> None:
    """Make the process group, with its sockets on the network of MASTER_ADDR."""
    if any(name not in os.environ for name in TORCH_VARIABLES):
        mpi_discovery(int(os.environ.get("MASTER_PORT", TORCH_PORT)), verbose=False)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    interface = interface_to(address, port)
    if interface and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # gloo would take what the host's own name stands for
    serving = os.environ["RANK"] == "0" and not agent_has_store() and not dist.is_initialized()
    with bound_store(address, port, timeout) if serving else contextlib.nullcontext():
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(), timeout=timeout, verbose=False
        )
    leave_mpi()


def leave_at_exit() -> None:
    """Take the process group down at the exit of this process, which is done with its run.

    Left to the end of the interpreter, a thread of gloo that still holds a finished collective's tensors wants Python's
    lock too late, and aborts the process: a run that went well would end with SIGABRT. A rank that failed must not do
    this: its group has collectives that wait for it.
    """
    atexit.unregister(leave)
    atexit.register(leave)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc reuse what large tensors leave, instead of giving it back and faulting it in again in each step.

    That takes a quarter of the processor time of a convolutional net's step. The peak of memory is the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its CPU inference collective, which training has no use for.

    It takes a compiler, a lock that all runs of this user wait for, and 69 MB of /dev/shm a rank, never removed.
    """
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_mpi() -> None:
    """MPI has told the ranks apart and is done with; a rank that failed would wait for the others at its exit.

    DeepSpeed counts local ranks by host name, and its engine then insists on mpirun's own count: that is taken.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or mpi.Is_finalized():
        return
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]
    mpi.Finalize()


def rank_environment(environment: dict[str, str]) -> dict[str, str]:
    """The variables that torch.distributed reads, derived from the launcher's; empty where nothing is to be added."""
    present = [name for name in TORCH_VARIABLES if name in environment]
    if len(present) == len(TORCH_VARIABLES):
        return {}
    if "OMPI_COMM_WORLD_SIZE" in environment:  # before SLURM_*, which mpirun hands on inside a job
        return openmpi_environment(environment)
    # A step of a job, which srun starts: the batch script itself has SLURM_PROCID and SLURM_NTASKS, but is no rank.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return slurm_environment(environment)
    if any(name in environment for name in MPI_VARIABLES):
        return {}  # mpi4py is asked
    if "RANK" in environment or int(environment.get("WORLD_SIZE", "1")) > 1:
        missing = ", ".join(name for name in TORCH_VARIABLES if name not in environment)
        raise RuntimeError(
            f"the environment has {', '.join(present)} but not {missing}: start the run with deepspeed, torchrun, srun"
            " or mpirun, which set all of them, or unset these for one process"
        )
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def openmpi_environment(environment: dict[str, str]) -> dict[str, str]:
    """Under ``mpirun -x MASTER_ADDR=...``; without it mpi4py tells the first address of rank 0's host."""
    if "MASTER_ADDR" not in environment:
        return {}
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "MASTER_PORT": environment.get("MASTER_PORT", str(TORCH_PORT)),
    }


def slurm_environment(environment: dict[str, str]) -> dict[str, str]:
    """One task a rank under ``srun``: the first host is the master, its port follows from the job's number."""
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
    """Ranks on this host, from the launcher's variables; None where it says nothing."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):  # torchrun, deepspeed, mpirun
        if name in environment:
            return int(environment[name])
    # srun: ``2(x3),1`` are two tasks on each of three nodes and one on the last.
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    counts = [int(count) for count, nodes in groups for _ in range(int(nodes or 1))]
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def seed_everything(seed: int, deterministic: bool) -> None:
    """The same initial weights on every rank; ``deterministic`` refuses kernels that are not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout of a step follows from (seed, step, rank), so that a resumed run draws what the whole one would have."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank: all of them get the same answer."""
    if dist.get_world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Mean of each figure over the ranks; every rank passes the same keys."""
    packed = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(sorted(values), (packed / dist.get_world_size()).tolist()))


def gather_rows_no_grad(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``(n, ...)`` of all ranks, rank after rank: ``(world n, ...)``. Each rank passes the same n. No gradient."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
