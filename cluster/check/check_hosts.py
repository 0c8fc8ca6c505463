"""``python -m cluster check``: a table of the hosts, and a remedy for each problem that would stop a run.

    python -m cluster check --hostfile hosts --shards data/rs5m     # over ssh
    python -m cluster check --nodes 4 --gpus-per-node 8             # SLURM, in a job of its own
    python -m cluster check                                         # inside a SLURM job: the job's nodes
    python -m cluster check                                         # elsewhere: this machine

A probe (host_probe.py) runs on every host in this folder and with this interpreter, as a run would. It tries to connect
to the other hosts. If no problem is found, real ranks measure compute and network (rank_rates.py). The exit code is 1
if there is any problem.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time

from priorclip.cluster.check.host_table import format_report
from priorclip.cluster.check.hosts import Hosts, ProbePlan, plan_probes
from priorclip.cluster.check.measure_speed import measure_speed
from priorclip.cluster.check.rules import Row, find_problems
from priorclip.cluster.commands import CheckConfig
from priorclip.cluster.launch.command_line import CPU_RANKS
from priorclip.common.output import say


def check_hosts(config: CheckConfig) -> int:
    """Prints the table and the findings, or all of it as JSON. Returns 1 if there are findings, otherwise 0.

    Raises:
        ValueError: the hostfile or the options are invalid.
    """
    if config.nodes and "SLURM_JOB_ID" not in os.environ:
        return run_in_a_job(config)
    plan = plan_probes(config)
    rows = probe_hosts(plan, config)
    findings = find_problems(rows, config)
    rates = None
    if config.measure and not findings:
        rates, findings = measure_speed(plan, rows, config)
    report = {"hosts": rows, "rates": rates, "findings": [dataclasses.asdict(finding) for finding in findings]}
    say(json.dumps(report, indent=1) if config.json else format_report(rows, rates, findings, config))
    return 1 if findings else 0


def run_in_a_job(config: CheckConfig) -> int:
    """Runs the same command inside a SLURM allocation and returns its exit code."""
    gpus = [f"--gpus-per-node={config.gpus_per_node}"] if config.gpus_per_node else []
    words = [f"--nodes={config.nodes}", f"--ntasks-per-node={config.gpus_per_node or CPU_RANKS}", *gpus]
    options = [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(config)
               if getattr(config, field.name) != field.default]  # fmt: skip
    command = [sys.executable, "-m", "priorclip.cluster", "check", *options]
    try:
        return subprocess.run(["salloc", *words, *shlex.split(config.srun_args), *command], check=False).returncode
    except FileNotFoundError as error:
        raise ValueError("--nodes is for SLURM, and salloc is not installed here; use --hostfile") from error


def probe_hosts(plan: ProbePlan, config: CheckConfig) -> list[Row]:
    """Returns one row a host: its description, its clock, and the hosts that it can connect to."""
    with Hosts(plan.commands) as hosts:
        rows = hosts.answers(config.timeout_seconds)
        asked = time.time()
        for name, answer in hosts.ask({"clock": True}, seconds=20).items():
            # The host read its clock between the question and the answer.
            rows[name]["skew_s"] = round(answer["time"] - (asked + answer["at"]) / 2, 2)
        if len(plan.slots) > 1 and rows:
            connect_hosts(hosts, rows, plan)
        failures = hosts.failures
    for name, row in rows.items():
        slots = plan.slots[name]
        row["slots"] = (row["count"] or CPU_RANKS) if slots is None else slots
        row.pop("at", None)
    return [
        {"host": name, "error": failures[name]} if name in failures else {"host": name, **rows[name]}
        for name in plan.slots
    ]


def connect_hosts(hosts: Hosts, rows: dict[str, Row], plan: ProbePlan) -> None:
    """Every host connects to the rendezvous on the first host, then to each other host.

    A host's address is the one from which it connected to the rendezvous.
    """
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
            address = master if name == first else answer["reached"]["rendezvous"]["from"]
            peers.append([name, address, rows[name]["data_port"]])
    for name, answer in hosts.ask({"reach": peers}, seconds=60).items():
        rows[name]["reached"] |= answer["reached"]
