"""``python -m cluster sbatch``: the batch script of a run from ``cluster/slurm/*.sbatch``, and its submission.

    python -m cluster sbatch --nodes 4 --gpus-per-node 8 --partition gpu -- pretrain --config c.yaml

A template is text with ``{{names}}``. A line with a name that has no value is left out, so that ``--partition`` is only
there if one was given. Values of #SBATCH lines may hold only characters of names, times and paths; what goes to the
shell is quoted.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from priorclip.cluster.commands import SbatchConfig
from priorclip.cluster.launch.deepspeed_launch import CPU_RANKS, MODULE
from priorclip.common.command_names import module_of
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

logger = logging.getLogger(__name__)

TEMPLATES = {
    name: Path(__file__).parents[1] / "slurm" / f"{file}.sbatch" for name, file in (("srun", "run"), ("node", "node"))
}
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# What #SBATCH lines take; they are not read by a shell and know no quoting that all versions share.
NAME = re.compile(r"[\w.+-]+")
LIST = re.compile(r"[\w.+,@-]+")
PATH = re.compile(r"[\w.+@=:/-]+")
TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}")


def submit(config: SbatchConfig, run: Sequence[str]) -> int:
    """Submit ``run`` (a module and its options) and print the job's number; returns sbatch's exit code.

    Raises:
        ValueError: an option has characters that have no place in it, or sbatch is not installed.
    """
    script = render(config, run)
    if config.dry_run:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not installed here: run this on a login node, or see the script with --dry-run")
    Path(config.logs).mkdir(parents=True, exist_ok=True)
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


def render(config: SbatchConfig, run: Sequence[str]) -> str:
    """The batch script."""
    path = Path(config.template) if config.template else TEMPLATES[config.launcher]
    try:
        template = path.read_text()
    except OSError as error:
        raise ValueError(f"--template {path} cannot be read: {error.strerror}") from error
    return fill(template, values(config, run), str(path))


def values(config: SbatchConfig, run: Sequence[str]) -> dict[str, str]:
    """The text of each name in the template; empty where the line is to be left out."""
    module, *words = module_of(run[0]), *run[1:]
    if not MODULE.fullmatch(module):
        raise ValueError(f"'{module}' is not the name of a module: pretrain, or finetune with its sub-command first")
    for name, least in (
        ("nodes", 1),
        ("gpus_per_node", 0),
        ("cpus_per_task", 1),
        ("signal_seconds", 0),
        ("retries", 0),
    ):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: at least {least} is needed")
    time = plain("time", config.time, TIME)
    if 0 < seconds_of(time) <= config.signal_seconds:
        raise ValueError(
            f"--time {time} is no more than --signal-seconds {config.signal_seconds}: the run would be told to end as"
            " it begins, and go back into the queue for ever"
        )
    ranks = config.ranks_per_node or config.gpus_per_node or CPU_RANKS
    logs = os.path.abspath(config.logs)
    return {
        "job_name": plain("job_name", config.job_name, NAME),
        "nodes": str(config.nodes),
        "ranks_per_node": str(ranks),
        "gpus_per_node": str(config.gpus_per_node or ""),
        "cpus_per_task": str(config.cpus_per_task),
        "cpus_per_node": str(config.cpus_per_task * ranks),
        "time": time,
        "partition": plain("partition", config.partition, LIST),
        "account": plain("account", config.account, LIST),
        "qos": plain("qos", config.qos, LIST),
        "folder": plain("chdir (the working folder)", os.getcwd(), PATH),
        "logs": plain("logs", logs, PATH),
        "signal_seconds": str(config.signal_seconds),
        "requeue_code": str(REQUEUE_EXIT_CODE),
        "retries": str(config.retries),
        **in_container(config),
        "command": shlex.join([module, *words]),
    }


def seconds_of(time: str) -> int:
    """Of a SLURM time limit: minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]."""
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def in_container(config: SbatchConfig) -> dict[str, str]:
    """srun's options, the words before the interpreter, and the interpreter. The working folder is mounted as it is."""
    python = shlex.quote(config.python or ("python3" if config.container else sys.executable))
    if config.container is None:
        return {"srun_options": "", "prefix": "", "python": python}
    folder = os.getcwd()
    if config.container_runtime == "pyxis":
        words = [f"--container-image={config.container}", f"--container-mounts={folder}:{folder}"]
        return {"srun_options": shlex.join([*words, f"--container-workdir={folder}"]), "prefix": "", "python": python}
    gpu = ["--nv"] if config.gpus_per_node else []
    words = ["apptainer", "exec", *gpu, "--bind", folder, "--pwd", folder, config.container]
    return {"srun_options": "", "prefix": shlex.join(words), "python": python}


def plain(name: str, value: str | None, allowed: re.Pattern[str]) -> str:
    if value and not allowed.fullmatch(value):
        raise ValueError(f"--{name.replace('_', '-')} '{value}' has characters that an #SBATCH line cannot take")
    return value or ""


def fill(template: str, known: Mapping[str, str], path: str) -> str:
    """The template with its names replaced; lines with an empty one left out."""
    lines = []
    for number, line in enumerate(template.splitlines(), start=1):
        names = PLACEHOLDER.findall(line)
        comment = line.startswith("#") and not line.startswith("#SBATCH")
        unknown = [name for name in names if name not in known and not comment]
        if unknown:
            raise ValueError(f"{path}, line {number}: {{{{{unknown[0]}}}}} is not one of {', '.join(known)}")
        if all(known.get(name, name) for name in names):
            lines.append(PLACEHOLDER.sub(lambda found: known.get(found[1], found[0]), line))
    return "\n".join(lines) + "\n"
