"""Finds the processes of a run on this machine that ``cluster faults`` may kill: ranks and SLURM's step daemons.

processes = RunProcesses("runs/faults/shot")    # a word that only this run has on its command line
processes.choose("rank", random.Random(0))      # [psutil.Process(pid=4711, ...)]
"""

from __future__ import annotations

import contextlib
import os
import random
import re
from itertools import pairwise

import psutil


class RunProcesses:
    """Processes of one run. Its ranks have ``marker`` on the command line and the variables of their launcher."""

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.names: dict[int, str] = {}

    def name(self, process: psutil.Process) -> str:
        return self.names.get(process.pid, str(process.pid))

    def ranks(self) -> list[psutil.Process]:
        """The ranks and their data workers."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            if self.marker in words and "python" in os.path.basename(words[0]):
                with contextlib.suppress(psutil.Error):
                    environment = process.environ()
                    rank = environment.get("RANK") or environment.get("SLURM_PROCID")
                    if rank is not None and is_rank(words, environment):
                        self.names[process.pid] = f"rank {rank} (process {process.pid})"
                        found.append(process)
        return found

    def choose(self, kind: str, chance: random.Random) -> list[psutil.Process]:
        """Chooses the processes for a kill of this kind; empty if there are none now."""
        if kind == "daemon":
            return self.step_daemon(chance)
        ranks = without_children(self.ranks())
        if not ranks:
            return []
        return ranks if kind in ("job", "notice") else [chance.choice(ranks)]

    def job(self) -> str | None:
        """The number of the SLURM job of the ranks."""
        for process in self.ranks():
            with contextlib.suppress(psutil.Error):
                return process.environ().get("SLURM_JOB_ID")
        return None

    def step_daemon(self, chance: random.Random) -> list[psutil.Process]:
        """One slurmstepd of the job: the daemon that watches the tasks of a step on a node."""
        job = self.job()
        found = []
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            step = re.match(r"slurmstepd: \[(\d+)\.(\d+)\]", title)
            if step and step[1] == job:
                self.names[process.pid] = f"{title} (process {process.pid})"
                found.append(process)
        return [chance.choice(found)] if found else []


def is_rank(words: list[str], environment: dict[str, str]) -> bool:
    """Whether a process is a rank. Launchers have the words of the run too, and in a SLURM step also the variables."""
    modules = {module for option, module in pairwise(words) if option == "-m"}
    launchers = modules & {"cluster", "priorclip.cluster", "deepspeed.launcher.launch"}
    return not launchers and ("LOCAL_RANK" in environment or "SLURM_STEP_ID" in environment)


def without_children(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Drops data workers: they are forks of their rank, with its command line and variables."""
    ids = {process.pid for process in processes}
    parents = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() not in ids:
                parents.append(process)
    return parents
