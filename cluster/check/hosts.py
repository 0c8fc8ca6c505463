"""The hosts that ``cluster check`` looks at, each with a probe (cluster/check/host_probe.py) that answers questions.

    with Hosts(over_ssh(["worker-0", "worker-1"], ...)) as hosts:
        facts = hosts.answers(seconds=60)                          # {"worker-0": {"torch": "2.14.1", ...}, ...}
        clocks = hosts.ask({"clock": True}, seconds=10)

Over ssh a host has a probe process of its own here; under SLURM one ``srun`` carries every question to all nodes.
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
from types import TracebackType
from typing import IO, Any

from priorclip.cluster.check.host_probe import MARK


class Hosts:
    """Probes that run. ``commands`` maps the hosts that a process answers for, space-separated, to its command."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self.names = [name for names in commands for name in names.split()]
        self.lost: dict[str, str] = {}
        self.queue: queue.Queue[tuple[float, dict[str, Any]]] = queue.Queue()
        self.said: dict[str, list[str]] = {names: [] for names in commands}
        self.probes: dict[str, subprocess.Popen[str]] = {}
        for names, command in commands.items():
            try:
                self.probes[names] = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            except FileNotFoundError as error:
                self.lost.update(dict.fromkeys(names.split(), f"{error.filename} is not installed here"))
                continue
            threading.Thread(target=self.listen, args=(names, self.probes[names].stdout), daemon=True).start()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for probe in self.probes.values():
            with contextlib.suppress(OSError):
                assert probe.stdin is not None
                probe.stdin.close()  # what a probe ends with
        for probe in self.probes.values():
            try:
                probe.wait(timeout=10)
            except subprocess.TimeoutExpired:
                probe.kill()
                probe.wait()

    def listen(self, names: str, output: IO[str]) -> None:
        """Reads what a process says until it ends; what is no answer is kept, for it may be why there is none."""
        for line in output:
            _, mark, answer = line.partition(MARK)
            if mark:
                self.queue.put((time.time(), json.loads(answer)))
            elif line.strip():
                self.said[names].append(line.strip())
        code = self.probes[names].wait()
        for name in names.split():
            last = (self.said[names] or ["no output"])[-1]
            self.queue.put((time.time(), {"host": name, "gone": f"exit code {code}: {last}"}))

    def answers(self, seconds: float) -> dict[str, dict[str, Any]]:
        """One answer of every host that is still there, with ``at``, when it came; others move to ``lost``."""
        deadline = time.time() + seconds
        found: dict[str, dict[str, Any]] = {}
        while waiting := [name for name in self.names if name not in found and name not in self.lost]:
            try:
                at, answer = self.queue.get(timeout=max(0.0, deadline - time.time()))
            except queue.Empty:
                self.lost.update(dict.fromkeys(waiting, f"no answer within {seconds:g} s"))
                break
            name = answer.pop("host")
            if "gone" in answer:
                self.lost.setdefault(name, answer["gone"])
                found.pop(name, None)
            elif name not in self.lost:
                found[name] = {**answer, "at": at}
        return {name: found[name] for name in self.names if name in found}

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, dict[str, Any]]:
        for names, probe in self.probes.items():
            try:
                assert probe.stdin is not None
                print(json.dumps(question), file=probe.stdin, flush=True)
            except OSError:
                self.lost.update(dict.fromkeys((n for n in names.split() if n not in self.lost), "its probe has ended"))
        return self.answers(seconds)


def probe_command(name: str, folder: str, shards: str | None) -> list[str]:
    return [
        sys.executable,
        "-u",
        "-m",
        "priorclip.cluster.check.host_probe",
        name,
        folder,
        *([shards] if shards else []),
    ]


def here(folder: str, shards: str | None) -> dict[str, list[str]]:
    """This machine's probe."""
    return {"localhost": probe_command("localhost", folder, shards)}


def over_ssh(names: Sequence[str], port: int | None, folder: str, shards: str | None) -> dict[str, list[str]]:
    """A probe on each host, in this folder and with this interpreter, as a run would be."""
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *(["-p", str(port)] if port else []), "--"]
    there = f"cd {shlex.quote(os.getcwd())} && exec "
    return {name: [*words, name, there + shlex.join(probe_command(name, folder, shards))] for name in names}


def over_srun(names: Sequence[str], options: Sequence[str], folder: str, shards: str | None) -> dict[str, list[str]]:
    """One step of one task a node."""
    return {" ".join(names): ["srun", *options, "--ntasks-per-node=1", *probe_command("-", folder, shards)]}
