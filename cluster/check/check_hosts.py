"""``python -m cluster check``: a table of what each host has and does, and what to do about what would stop a run.

    python -m cluster check --hostfile hosts --shards data/rs5m     # over ssh
    python -m cluster check --nodes 4 --gpus-per-node 8             # SLURM, in a job of its own
    python -m cluster check                                         # the SLURM job that this is in
    python -m cluster check                                         # else this machine

Every host is probed in this folder and with this interpreter, as a run would be (host_probe.py), and tries to
connect to the others; where that went well, real ranks measure how fast they compute and talk (rank_rates.py). The
exit code is 1 where anything was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorclip.cluster.check.hosts import Hosts, here, over_srun, over_ssh
from priorclip.cluster.check.rules import Finding, Row, findings, speeds
from priorclip.cluster.commands import CheckConfig, LaunchConfig
from priorclip.cluster.launch.command_line import CPU_RANKS, deepspeed_command
from priorclip.cluster.launch.hostfile import read_hostfile
from priorclip.common.ports import TORCH_PORT, job_port

COLUMNS = ("host", "slots", "python", "torch", "deepspeed", "cuda", "nccl", "code", "accelerator", "count", "free_gb",
           "shm_gb", "skew_s", "shards", "tflops")  # fmt: skip
END_SECONDS = 20.0
RATES_MARK = "cluster-rates "


@dataclass(frozen=True)
class Plan:
    """Which hosts are looked at, the command that probes them, and where their ranks would meet."""

    slots: dict[str, int | None]
    commands: Mapping[str, Sequence[str]]
    master_addr: str | None
    master_port: int


def check(config: CheckConfig) -> int:
    """Print the table and the findings, or all of it as JSON; returns 1 if there are any.

    Raises:
        ValueError: the hostfile or the options make no sense.
    """
    if config.nodes and "SLURM_JOB_ID" not in os.environ:
        return in_a_job(config)
    plan = plan_of(config)
    rows = look(plan, config)
    found = findings(rows, config)
    rates = None
    if config.measure and not found:
        rates, found = measure(plan, rows, config)
    report = {"hosts": rows, "rates": rates, "findings": [dataclasses.asdict(finding) for finding in found]}
    print(json.dumps(report, indent=1) if config.json else text(rows, rates, found, config))
    return 1 if found else 0


def in_a_job(config: CheckConfig) -> int:
    """The same command within an allocation; its exit code."""
    gpus = [f"--gpus-per-node={config.gpus_per_node}"] if config.gpus_per_node else []
    words = [f"--nodes={config.nodes}", f"--ntasks-per-node={config.gpus_per_node or CPU_RANKS}", *gpus]
    own = [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)
           if getattr(config, field.name) != field.default]  # fmt: skip
    again = [sys.executable, "-m", "cluster", "check", *own]
    try:
        return subprocess.run(["salloc", *words, *shlex.split(config.srun_args), *again], check=False).returncode
    except FileNotFoundError as error:
        raise ValueError("--nodes is for SLURM, and salloc is not installed here; use --hostfile") from error


def plan_of(config: CheckConfig) -> Plan:
    port = config.master_port or TORCH_PORT
    if config.hostfile:
        slots: dict[str, int | None] = dict(read_hostfile(config.hostfile))
        return Plan(
            slots, over_ssh(list(slots), config.ssh_port, config.folder, config.shards), config.master_addr, port
        )
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return Plan({"localhost": None}, here(config.folder, config.shards), None, port)
    names = scontrol("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    commands = over_srun(names, [f"--nodes={len(names)}", "--overlap"], config.folder, config.shards)
    known = scontrol("--oneliner", "show", "node", names[0]).split()
    address = next((word.removeprefix("NodeAddr=") for word in known if word.startswith("NodeAddr=")), names[0])
    port = config.master_port or job_port(int(job))
    return Plan(dict.fromkeys(names, config.gpus_per_node), commands, config.master_addr or address, port)


def scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"scontrol {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def look(plan: Plan, config: CheckConfig) -> list[Row]:
    """A row a host: its facts, its clock, and whom it reaches."""
    with Hosts(plan.commands) as hosts:
        rows = hosts.answers(config.timeout_seconds)
        asked = time.time()
        for name, answer in hosts.ask({"clock": True}, seconds=20).items():
            # The host read its clock between the question and the answer.
            rows[name]["skew_s"] = round(answer["time"] - (asked + answer["at"]) / 2, 2)
        if len(plan.slots) > 1 and rows:
            connect(hosts, rows, plan)
        lost = hosts.lost
    for name, row in rows.items():
        slots = plan.slots[name]
        row["slots"] = (row["count"] or CPU_RANKS) if slots is None else slots
        row.pop("at", None)
    return [
        {"host": name, "error": lost[name]} if name in lost else {"host": name, **rows[name]} for name in plan.slots
    ]


def connect(hosts: Hosts, rows: dict[str, Row], plan: Plan) -> None:
    """Every host to the rendezvous on the first, then to every other by the address that it came from."""
    first, port = next(iter(rows)), plan.master_port
    master = plan.master_addr or (rows[first]["addresses"] or ["127.0.0.1"])[0]
    rows[first] |= {"master": master, "port": port}
    for name, answer in hosts.ask({"listen": {first: port}}, seconds=20).items():
        rows[name]["listening"] = answer["listening"]
    targets = [["rendezvous", master, port], *([address, address, port] for address in rows[first]["addresses"])]
    peers = []
    for name, answer in hosts.ask({"reach": targets}, seconds=30).items():
        rows[name]["reached"] = answer["reached"]
        if "from" in answer["reached"]["rendezvous"]:
            own = master if name == first else answer["reached"]["rendezvous"]["from"]
            peers.append([name, own, rows[name]["data_port"]])
    for name, answer in hosts.ask({"reach": peers}, seconds=60).items():
        rows[name]["reached"] |= answer["reached"]


def measure(plan: Plan, rows: list[Row], config: CheckConfig) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Real ranks on all slots: their rates, which are added to the rows, and what is wrong with them."""
    with tempfile.TemporaryDirectory() as folder:
        command = ranks_command(plan, rows, config, Path(folder) / "hosts")
        place = {"MASTER_ADDR": plan.master_addr or "", "MASTER_PORT": str(plan.master_port)}
        code, output = output_of(command, {**os.environ, **place} if "SLURM_JOB_ID" in os.environ else None, config)
    said = [line.partition(RATES_MARK)[2] for line in output.splitlines() if RATES_MARK in line]
    if not said:
        last = "\n    ".join(output.strip().splitlines()[-8:])
        why = f"exit code {code}" if code is not None else f"nothing within {config.timeout_seconds:g} s"
        return None, [
            Finding("all hosts", f"ranks could not measure their speed: {why}", f"{shlex.join(command)}\n    {last}")
        ]
    rates = json.loads(said[0])
    by_rank = {rank["rank"]: rank["tflops"] for rank in rates["ranks"]}
    begun = 0
    for row in rows:
        # The slowest rank is what the others wait for.
        row["tflops"] = min(by_rank[rank] for rank in range(begun, begun + row["slots"]))
        begun += row["slots"]
    return rates, list(speeds(rows, rates, config))


def ranks_command(plan: Plan, rows: list[Row], config: CheckConfig, hostfile: Path) -> list[str]:
    """Starts ``priorclip.cluster.check.rank_speed`` the way that a run would be started."""
    if config.hostfile:
        hostfile.write_text("".join(f"{name} slots={slots}\n" for name, slots in plan.slots.items()))
        master = rows[0].get("master", plan.master_addr)
        launch = LaunchConfig(hostfile=str(hostfile), ssh_port=config.ssh_port, master_addr=master,
                              master_port=plan.master_port)  # fmt: skip
        return deepspeed_command(launch, ["priorclip.cluster.check.rank_speed"], os.environ)
    if "SLURM_JOB_ID" in os.environ:
        tasks = [f"--nodes={len(rows)}", f"--ntasks-per-node={rows[0]['slots']}", "--overlap"]
        return ["srun", *tasks, sys.executable, "-u", "-m", "priorclip.cluster.check.rank_speed"]
    return deepspeed_command(LaunchConfig(nproc=rows[0]["slots"]), ["priorclip.cluster.check.rank_speed"], os.environ)


def output_of(
    command: Sequence[str], environment: Mapping[str, str] | None, config: CheckConfig
) -> tuple[int | None, str]:
    """Exit code, None where the time was up, and all output."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=config.timeout_seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        for number, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
            with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(process.pid, number)
                return None, process.communicate(timeout=seconds)[0]
        return None, "what it said is not to be had: something that it started lives on"


def text(rows: Sequence[Row], rates: dict[str, Any] | None, found: Sequence[Finding], config: CheckConfig) -> str:
    """The table, the rates and the findings for people."""
    parts = [table(rows)]
    if rates and rates["all_reduce_gb_s"] is not None:
        parts.append(f"all-reduce over {len(rates['ranks'])} ranks: {rates['all_reduce_gb_s']:.3g} GB/s bus bandwidth")
    if rates is None and config.measure and found:
        parts.append("the speed of the hosts was not measured: first mend what was found")
    parts += [f"{finding.host}: {finding.problem}\n    {finding.remedy}" for finding in found]
    parts.append(f"{len(found)} found" if found else "nothing found that would stop a run")
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line a host."""
    cells = [COLUMNS, *(tuple(cell(row, name) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name == "code":
        return str(row["commit"] or "-")
    if name == "shards":
        return f"{value['count']}" + (f" ({value['wrong']} wrong)" if value["wrong"] else "")
    return f"{value:.3g}" if name == "tflops" else str(value)
