"""Starts real ranks on all slots (rank_rates.py) and adds the compute rate of each host to its row."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from priorclip.cluster.check.hosts import ProbePlan
from priorclip.cluster.check.rules import Finding, Row, check_speeds
from priorclip.cluster.commands import CheckConfig, LaunchConfig
from priorclip.cluster.launch.command_line import deepspeed_command

RANK_PROGRAM = "priorclip.cluster.check.rank_rates"
RATES_MARK = "cluster-rates "  # starts the line with the JSON of rank 0
END_SECONDS = 20.0


def measure_speed(plan: ProbePlan, rows: list[Row], config: CheckConfig) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Returns the rates of the ranks, or None if they could not measure, and the findings. Adds ``tflops`` to rows."""
    with tempfile.TemporaryDirectory() as folder:
        command = ranks_command(plan, rows, config, Path(folder) / "hosts")
        rendezvous = {"MASTER_ADDR": plan.master_addr or "", "MASTER_PORT": str(plan.master_port)}
        environment = {**os.environ, **rendezvous} if "SLURM_JOB_ID" in os.environ else None
        code, output = run_with_limit(command, environment, config.timeout_seconds)
    marked = [line.partition(RATES_MARK)[2] for line in output.splitlines() if RATES_MARK in line]
    if not marked:
        last = "\n    ".join(output.strip().splitlines()[-8:])
        reason = f"exit code {code}" if code is not None else f"no result within {config.timeout_seconds:g} s"
        problem = f"ranks could not measure their speed: {reason}"
        return None, [Finding("all hosts", problem, f"{shlex.join(command)}\n    {last}")]
    rates = json.loads(marked[0])
    by_rank = {rank["rank"]: rank["tflops"] for rank in rates["ranks"]}
    first = 0
    for row in rows:
        # The other ranks wait for the slowest one.
        row["tflops"] = min(by_rank[rank] for rank in range(first, first + row["slots"]))
        first += row["slots"]
    return rates, list(check_speeds(rows, rates, config))


def ranks_command(plan: ProbePlan, rows: list[Row], config: CheckConfig, hostfile: Path) -> list[str]:
    """The command that starts the rank program in the same way as a run."""
    if config.hostfile:
        hostfile.write_text("".join(f"{name} slots={slots}\n" for name, slots in plan.slots.items()))
        master = rows[0].get("master", plan.master_addr)
        launch = LaunchConfig(hostfile=str(hostfile), ssh_port=config.ssh_port, master_addr=master,
                              master_port=plan.master_port)  # fmt: skip
        return deepspeed_command(launch, [RANK_PROGRAM], os.environ)
    if "SLURM_JOB_ID" in os.environ:
        tasks = [f"--nodes={len(rows)}", f"--ntasks-per-node={rows[0]['slots']}", "--overlap"]
        return ["srun", *tasks, sys.executable, "-u", "-m", RANK_PROGRAM]
    return deepspeed_command(LaunchConfig(nproc=rows[0]["slots"]), [RANK_PROGRAM], os.environ)


def run_with_limit(
    command: Sequence[str], environment: Mapping[str, str] | None, seconds: float
) -> tuple[int | None, str]:
    """Returns the exit code, or None after a timeout, and all output."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                os.killpg(process.pid, number)
                return None, process.communicate(timeout=END_SECONDS)[0]
        return None, "no output: a child process is still running"
