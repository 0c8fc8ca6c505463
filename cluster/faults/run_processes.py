"""The processes of a run on this machine that ``cluster faults`` may kill: its ranks, and SLURM's daemons above them.

ranks = Ranks("runs/faults/shot")            # a word of the run's command line that no other run has
ranks.victims("rank", random.Random(0))      # [psutil.Process(pid=4711, ...)]
"""

from __future__ import annotations

import contextlib
import os
import random
import re
from itertools import pairwise

import psutil


class Ranks:
    """Processes of the run on this machine, found by the variables that its launcher gave them."""

    def __init__(self, marker: str) -> None:
        self.marker = marker
        self.names: dict[int, str] = {}

    def name(self, process: psutil.Process) -> str:
        return self.names.get(process.pid, str(process.pid))

    def all(self) -> list[psutil.Process]:
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

    def victims(self, kind: str, chance: random.Random) -> list[psutil.Process]:
        ranks = without_children(self.all())
        if kind == "daemon":
            return self.daemons(chance)
        if not ranks:
            return []
        return ranks if kind in ("job", "notice") else [chance.choice(ranks)]

    def job(self) -> str | None:
        """The number of the SLURM job that the ranks are in."""
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                return process.environ().get("SLURM_JOB_ID")
        return None

    def daemons(self, chance: random.Random) -> list[psutil.Process]:
        """A slurmstepd of a step of the job, which is what watches its tasks on a node."""
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
    """Launchers and batch scripts have the run's words too, and those of a SLURM step its variables."""
    modules = {after for word, after in pairwise(words) if word == "-m"}
    launches = modules & {"cluster", "priorclip.cluster", "deepspeed.launcher.launch"}
    return not launches and ("LOCAL_RANK" in environment or "SLURM_STEP_ID" in environment)


def without_children(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Data workers are forks of their rank, with its words and variables."""
    ids = {process.pid for process in processes}
    with_parents = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() not in ids:
                with_parents.append(process)
    return with_parents
