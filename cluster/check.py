"""``python -m cluster check``: a table of what each host has, and what to do about what would stop a run.

    python -m cluster check --hostfile hosts

Each host of the hostfile is asked over ssh, in this folder and with this interpreter, as a run would be
(cluster/probe.py); without a hostfile this machine is. The exit code is 1 where anything was found.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.commands import CheckConfig
from cluster.hostfile import read_hostfile

COLUMNS = (
    "host",
    "slots",
    "python",
    "torch",
    "deepspeed",
    "cuda",
    "accelerator",
    "count",
    "free_gb",
    "shm_gb",
    "skew_s",
)
VERSIONS = ("python", "torch", "deepspeed", "cuda")


@dataclass(frozen=True)
class Finding:
    """Something that would stop or spoil a run on ``host``, and what to do about it."""

    host: str
    problem: str
    remedy: str


def check(config: CheckConfig) -> int:
    """Print the table and the findings; returns 1 if there are any."""
    slots = read_hostfile(config.hostfile) if config.hostfile else {}
    hosts = list(slots) or ["this machine"]
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        rows = list(pool.map(lambda host: ask(host, config), hosts))
    for row in rows:
        row["slots"] = slots.get(row["host"], row.get("count"))
    found = findings(rows, config)
    print(table(rows))
    for finding in found:
        print(f"\n{finding.host}: {finding.problem}\n    {finding.remedy}")
    print(f"\n{len(found)} found" if found else "\nnothing found that would stop a run")
    return 1 if found else 0


def ask(host: str, config: CheckConfig) -> dict[str, Any]:
    """The host's probe, ``skew_s`` its clock's lead over ours in seconds; ``error`` where it did not answer."""
    command = [sys.executable, "-m", "cluster.probe", config.folder]
    if config.hostfile:
        remote = f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"
        port = ["-p", str(config.ssh_port)] if config.ssh_port else []
        command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", *port, "--", host, remote]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=config.timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"host": host, "error": f"no answer within {config.timeout_seconds:g} s"}
    except FileNotFoundError as error:
        return {"host": host, "error": f"{error.filename} is not installed here"}
    answered = time.time()
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"host": host, "error": f"exit code {done.returncode}: {last}"}
    row = json.loads(lines[-1])
    return {**row, "host": host, "skew_s": round(row.pop("time") - answered, 1)}


def findings(rows: Sequence[dict[str, Any]], config: CheckConfig) -> list[Finding]:
    """What is wrong, host by host."""
    found: list[Finding] = []
    answered = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            way = f"see what `ssh {row['host']} hostname` says" if config.hostfile else "install the project here"
            found.append(Finding(row["host"], row["error"], f"{way}; {sys.executable} and {os.getcwd()} must be there"))
    for name in (*VERSIONS, "accelerator"):
        usual = Counter(row[name] for row in answered).most_common(1)[0][0] if answered else ""
        for row in answered:
            if row[name] == "missing":
                found.append(Finding(row["host"], f"{name} is missing", f"install it for {sys.executable}"))
            elif row[name] != usual:
                remedy = "use one environment on all hosts" if name in VERSIONS else "take the host out of the hostfile"
                found.append(Finding(row["host"], f"{name} is {row[name]}, elsewhere {usual}", remedy))
    for row in answered:
        found += capacity(row, config)
    return found


def capacity(row: dict[str, Any], config: CheckConfig) -> list[Finding]:
    """Accelerators, disk, shared memory and clock of one host."""
    found = []
    host, folder = row["host"], config.folder
    if row["count"] and row["count"] < row["slots"]:
        found.append(Finding(host, f"{row['slots']} slots for {row['count']} GPUs", f"write slots={row['count']}"))
    if row["free_gb"] is None:
        found.append(Finding(host, f"{folder} is not there", "mount it, or pass --folder"))
    elif row["free_gb"] < config.free_gb:
        remedy = f"make room, or accept less with --free-gb {row['free_gb']:g}"
        found.append(Finding(host, f"{row['free_gb']} GB free in {folder}, {config.free_gb:g} wanted", remedy))
    if row["shm_gb"] is None or row["shm_gb"] < config.shm_gb:
        remedy = "mount -o remount,size=16G /dev/shm, or docker run --shm-size=16g"
        found.append(Finding(host, f"{row['shm_gb']} GB free in /dev/shm, {config.shm_gb:g} wanted", remedy))
    if abs(row["skew_s"]) > config.skew_seconds:
        found.append(Finding(host, f"its clock is {row['skew_s']:+.1f} s off", "start chronyd or timesyncd there"))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text, one line a host."""
    cells = [COLUMNS, *(tuple(str(row.get(name, "-")) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)
