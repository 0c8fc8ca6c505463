"""The processes that pack (this one, local ones, MPI ranks), and the share of the work that this task has.

    python -m data_shards pack ... --workers 8        8 processes of this machine
    mpirun -n 9 python -m data_shards pack ...        rank 0 plans and hands out jobs, ranks 1 to 8 work
    sbatch --array=0-7 ... data_shards pack ...       8 independent tasks, each with a share of the jobs
    srun -n 8 python -m data_shards pack ...          MPI if srun offers it (--mpi=pmix), otherwise 8 shares

    with open_worker_pool(workers) as pool:
        if pool is None: return                       # an MPI rank that has finished its jobs
        for result in pool.run(work, jobs, count): ...

Each worker gets one job at a time and one ahead, so that slow jobs are balanced and only a few jobs are in memory or
on the network. MPI is imported only in a job of several ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from priorclip.common.output import get_logger
from priorclip.common.processes import pool

log = get_logger(__name__)

AHEAD = 2  # jobs per worker: one that runs, one that waits


@dataclass(frozen=True)
class TaskShare:
    """The jobs of this task: index, index + count, index + 2 count ..."""

    index: int = 0
    count: int = 1

    def has(self, job: int) -> bool:
        return job % self.count == self.index


class WorkerPool:
    """Runs jobs in ``workers`` processes, which it starts with the first job, or in the given executor."""

    def __init__(self, workers: int, executor: Executor | None = None) -> None:
        self.workers = workers
        self.executor = executor

    def run(self, work: Callable[..., Any], jobs: Iterable[tuple], count: int) -> Iterator[Any]:
        """Yields ``work(*job)`` of ``count`` jobs in the order in which they end. The first error ends all."""
        workers = max(1, min(self.workers, count))
        if self.executor is None and workers <= 1:
            for job in jobs:
                yield work(*job)
            return
        with self._open_executor(workers) as executor:
            waiting: set[Future] = set()
            try:
                for job in jobs:
                    waiting.add(executor.submit(work, *job))
                    if len(waiting) >= AHEAD * workers:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        yield from (future.result() for future in done)
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            finally:
                for future in waiting:
                    future.cancel()

    def _open_executor(self, workers: int) -> AbstractContextManager[Executor]:
        if self.executor is not None:
            return nullcontext(self.executor)  # stays open for the next run
        return pool(workers)


@contextmanager
def open_worker_pool(workers: int) -> Iterator[WorkerPool | None]:
    """Opens the worker pool of this process. An MPI rank other than 0 first does its jobs and then gets None.

    Raises:
        ValueError: the launcher started several ranks, but the MPI library does not see them
    """
    world = mpi_world(os.environ)
    if world == 1:
        yield WorkerPool(workers)
        return
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    if MPI.COMM_WORLD.Get_size() != world:
        raise ValueError(
            f"the launcher started {world} ranks, but the MPI library of mpi4py sees {MPI.COMM_WORLD.Get_size()}: "
            "start them with that library's own mpirun, or with srun --mpi=pmix if the library supports it"
        )
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as ranks:
        if ranks is not None:
            log.info("%d MPI ranks: rank 0 hands out jobs, the others pack; --workers has no effect", world)
        yield WorkerPool(world - 1, cast(Executor, ranks)) if ranks is not None else None


def mpi_world(environment: Mapping[str, str]) -> int:
    """Returns the number of ranks of this MPI job from the launcher's variables; 1 without MPI."""
    # mpirun's variables come first, because in a SLURM job srun's variables describe mpirun's daemons.
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in environment:
            return read_number(environment, name)
    if "PMIX_RANK" in environment or "PMI_RANK" in environment:
        return read_number(environment, "SLURM_STEP_NUM_TASKS", 1)
    return 1


def find_task_share(environment: Mapping[str, str]) -> TaskShare:
    """Returns this process's share of the work, from its SLURM array task and its rank in a step without MPI.

    Raises:
        ValueError: the task numbers of the array are not evenly spaced
    """
    share = TaskShare()
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, count = (read_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
        lowest, step = (
            read_number(environment, "SLURM_ARRAY_TASK_MIN", 0),
            read_number(environment, "SLURM_ARRAY_TASK_STEP", 1),
        )
        place, rest = divmod(task - lowest, max(1, step))
        highest = read_number(environment, "SLURM_ARRAY_TASK_MAX", lowest + (count - 1) * step)
        if rest or not 0 <= place < count or highest != lowest + (count - 1) * step:
            raise ValueError(
                f"SLURM array task {task} of {count} tasks from {lowest} to {highest} in steps of {step}: pack needs "
                "evenly spaced task numbers, for example --array=0-7"
            )
        share = TaskShare(place, count)
    launched = any(name in environment for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if not launched and mpi_world(environment) == 1 and read_number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        ranks, rank = read_number(environment, "SLURM_STEP_NUM_TASKS"), read_number(environment, "SLURM_PROCID")
        share = TaskShare(share.index * ranks + rank, share.count * ranks)
    return share


def read_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]  # None is the TypeError below
    except (TypeError, ValueError) as error:
        raise ValueError(f"the launcher's variable {name} must be a number, not {text!r}") from error
