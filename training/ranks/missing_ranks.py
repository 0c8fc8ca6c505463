"""Says which ranks have not come, while the others wait for them, and what to change if they never will.

with reporting_missing_ranks(address, port, hint="..."):
    deepspeed.init_distributed(...)

    rank 0 of 4 waits at 127.0.0.1:29577: rank 1, 2, 3 did not come in 6 s. SLURM_STEP_NUM_TASKS is 4: ...

torch waits in silence until its timeout. Here a thread of each rank that waits longer than a few seconds writes the
rank's number to the store, and rank 0 reads the numbers. A start that is quicker costs nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from priorclip.common.output import get_logger

logger = get_logger(__name__)

QUIET_SECONDS = 2.0  # until a rank tells the store that it waits
FIRST_SECONDS, LATER_SECONDS = 6.0, 60.0  # until rank 0 names the missing ranks, and until it does so again
POLL_SECONDS = 0.5
SHOWN = 16
ORIGINS = {
    "SLURM_STEP_NUM_TASKS": "in an interactive shell of srun (--pty), unset it for one process, or start every task"
    " with srun",
    "OMPI_COMM_WORLD_SIZE": "start every rank with mpirun, or unset it for one process",
    "WORLD_SIZE": "start every rank with deepspeed or torchrun, on every host, or unset RANK and WORLD_SIZE for one"
    " process",
}


def origin_hint(environment: Mapping[str, str], ranks_are_set: bool) -> str:
    """Returns which variable says how many ranks there are, and what to do if it is wrong.

    Args:
        environment: of this process, as the launcher made it
        ranks_are_set: the launcher has set torch's own variables, which go before those of SLURM and MPI
    """
    names = ["WORLD_SIZE"] if ranks_are_set else ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"]
    name = next((each for each in names if each in environment), None)
    return "" if name is None else f". {name} is {environment[name]}: {ORIGINS[name]}"


@contextlib.contextmanager
def reporting_missing_ranks(address: str, port: int, hint: str = "") -> Iterator[None]:
    """While the process group is created inside, logs after seconds which ranks are missing.

    Raises:
        TimeoutError: torch gave up, and ranks are missing; the message names them
    """
    roll = RollCall(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), address, port, hint)
    try:
        yield
    except dist.DistError as error:
        if roll.problem:
            raise TimeoutError(f"{roll.problem}{hint}") from error
        raise
    finally:
        roll.end()


class RollCall:
    """A thread that registers this rank and, on rank 0, looks who is missing. ``problem`` is what it said last."""

    def __init__(self, rank: int, world_size: int, address: str, port: int, hint: str) -> None:
        self.rank, self.world_size = rank, world_size
        self.address, self.port, self.hint = address, port, hint
        self.problem = ""
        self.ended = threading.Event()
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self.call, name="roll call", daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.ended.set()
        self.thread.join(timeout=10)

    def call(self) -> None:
        if self.ended.wait(QUIET_SECONDS):
            return
        next_report = FIRST_SECONDS
        store: dist.TCPStore | None = None
        while not self.ended.wait(POLL_SECONDS):
            # The run may fail or end meanwhile, and then the store is gone.
            with contextlib.suppress(OSError, dist.DistError):
                store = store or self.open_store()
            waited = time.monotonic() - self.began
            if waited < next_report:
                continue
            next_report = waited + LATER_SECONDS
            with contextlib.suppress(dist.DistError):
                self.report(self.missing(store), waited)

    def open_store(self) -> dist.TCPStore:
        """Connects to the server of rank 0 and registers this rank. Raises OSError if there is no server yet."""
        socket.create_connection((self.address, self.port), timeout=1).close()
        timeout = datetime.timedelta(seconds=5)
        store = dist.TCPStore(self.address, self.port, is_master=False, timeout=timeout, wait_for_workers=False)
        store.set(f"came/{self.rank}", "1")
        return store

    def missing(self, store: dist.TCPStore | None) -> list[int]:
        """Returns the ranks that did not register; on other ranks than 0 only rank 0, if it has no server."""
        if self.rank:
            return [] if store else [0]
        return [] if store is None else [rank for rank in range(self.world_size) if not store.check([f"came/{rank}"])]

    def report(self, missing: list[int], waited: float) -> None:
        self.problem = ""
        if missing:
            names = ", ".join(map(str, missing[:SHOWN])) + (" and others" if len(missing) > SHOWN else "")
            self.problem = (
                f"rank {self.rank} of {self.world_size} waits at {self.address}:{self.port}: rank {names} did not come"
                f" in {waited:.0f} s"
            )
            logger.warning("%s%s", self.problem, self.hint)
