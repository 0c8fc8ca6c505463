"""The hosts of ``cluster check``. On each of them runs a probe (host_probe.py), which answers questions.

    plan = plan_probes(config)                                     # host names and the commands that start the probes
    with Hosts(plan.commands) as hosts:
        descriptions = hosts.answers(seconds=60)                   # {"worker-0": {"torch": "2.14.1", ...}, ...}
        clocks = hosts.ask({"clock": True}, seconds=10)

Over ssh, each host has one local process that talks to its probe. Under SLURM, one ``srun`` sends every question to all
nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from priorclip.cluster.check.host_probe import MARK
from priorclip.cluster.commands import CheckConfig
from priorclip.cluster.launch.hostfile import read_hostfile
from priorclip.common.ports import TORCH_PORT, job_port


@dataclass(frozen=True)
class ProbePlan:
    """The hosts with their slots, the commands that start their probes, and the rendezvous of a run there."""

    slots: dict[str, int | None]
    commands: Mapping[str, Sequence[str]]
    master_addr: str | None
    master_port: int


def plan_probes(config: CheckConfig) -> ProbePlan:
    """Plans probes for the hosts of the hostfile, the nodes of this SLURM job, or this machine, in this order."""
    port = config.master_port or TORCH_PORT
    if config.hostfile:
        slots: dict[str, int | None] = dict(read_hostfile(config.hostfile))
        commands = over_ssh(list(slots), config.ssh_port, config.folder, config.shards)
        return ProbePlan(slots, commands, config.master_addr, port)
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        here = {"localhost": probe_command("localhost", config.folder, config.shards)}
        return ProbePlan({"localhost": None}, here, None, port)
    names = scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    srun = over_srun(names, [f"--nodes={len(names)}", "--overlap"], config.folder, config.shards)
    fields = scontrol("--oneliner", "show", "node", names[0]).split()
    address = next((word.removeprefix("NodeAddr=") for word in fields if word.startswith("NodeAddr=")), names[0])
    port = config.master_port or job_port(int(job))
    return ProbePlan(dict.fromkeys(names, config.gpus_per_node), srun, config.master_addr or address, port)


def scontrol(*words: str) -> str:
    """The output of scontrol. Raises ValueError with its error message if it fails."""
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"scontrol {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def over_ssh(names: Sequence[str], port: int | None, folder: str, shards: str | None) -> dict[str, list[str]]:
    """The command of each host's probe. It runs in this folder and with this interpreter, as a run would."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *(["-p", str(port)] if port else []), "--"]
    change_folder = f"cd {shlex.quote(os.getcwd())} && exec "
    return {name: [*ssh, name, change_folder + shlex.join(probe_command(name, folder, shards))] for name in names}


def over_srun(names: Sequence[str], options: Sequence[str], folder: str, shards: str | None) -> dict[str, list[str]]:
    """The command of one SLURM step with one probe a node."""
    return {" ".join(names): ["srun", *options, "--ntasks-per-node=1", *probe_command("-", folder, shards)]}


def probe_command(name: str, folder: str, shards: str | None) -> list[str]:
    words = [name, folder, *([shards] if shards else [])]
    return [sys.executable, "-u", "-m", "priorclip.cluster.check.host_probe", *words]


class Hosts:
    """Running probes. ``commands`` maps host names, separated by spaces, to the command that answers for them.

    ``failures`` maps each host that gives no answers to the reason.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self.names = [name for names in commands for name in names.split()]
        self.failures: dict[str, str] = {}
        self.queue: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        self.other_output: dict[str, list[str]] = {names: [] for names in commands}
        self.probes: dict[str, subprocess.Popen[str]] = {}
        for names, command in commands.items():
            try:
                self.probes[names] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            except FileNotFoundError as error:
                self.failures.update(dict.fromkeys(names.split(), f"{error.filename} is not installed here"))
                continue
            threading.Thread(target=self.read_output, args=(names, self.probes[names].stdout), daemon=True).start()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for probe in self.probes.values():
            with contextlib.suppress(OSError):
                assert probe.stdin is not None
                probe.stdin.close()  # a probe ends when its input ends
        for probe in self.probes.values():
            try:
                probe.wait(timeout=10)
            except subprocess.TimeoutExpired:
                probe.kill()
                probe.wait()

    def read_output(self, names: str, output: IO[str]) -> None:
        """Reads the output of a process until it ends. Lines that are no answers can explain a failure."""
        for line in output:
            _, mark, answer = line.partition(MARK)
            if mark:
                self.queue.put((time.time(), json.loads(answer)))
            elif line.strip():
                self.other_output[names].append(line.strip())
        code = self.probes[names].wait()
        for name in names.split():
            last = (self.other_output[names] or ["no output"])[-1]
            self.queue.put((time.time(), {"host": name, "failure": f"exit code {code}: {last}"}))

    def answers(self, seconds: float) -> dict[str, dict[str, Any]]:
        """One answer of each host, with ``at``, the time when it came. A host without one goes to ``failures``."""
        deadline = time.time() + seconds
        found: dict[str, dict[str, Any]] = {}
        while waiting := [name for name in self.names if name not in found and name not in self.failures]:
            try:
                at, answer = self.queue.get(timeout=max(0.0, deadline - time.time()))
            except queue.Empty:
                self.failures.update(dict.fromkeys(waiting, f"no answer within {seconds:g} s"))
                break
            name = answer.pop("host")
            if "failure" in answer:
                self.failures.setdefault(name, answer["failure"])
                found.pop(name, None)
            elif name not in self.failures:
                found[name] = {**answer, "at": at}
        return {name: found[name] for name in self.names if name in found}

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, dict[str, Any]]:
        """Sends the question to all probes and returns the answers by host."""
        for names, probe in self.probes.items():
            try:
                assert probe.stdin is not None
                print(json.dumps(question), file=probe.stdin, flush=True)
            except OSError:
                for name in names.split():
                    self.failures.setdefault(name, "its probe has ended")
        return self.answers(seconds)
