"""``python -m cluster sbatch``: writes the batch script of a run from ``cluster/slurm/*.sbatch`` and submits it.

    python -m cluster sbatch --nodes 4 --gpus-per-node 8 --partition gpu -- pretrain --config c.yaml

A template is text with ``{{names}}``. A line whose name has no value is left out: ``--partition`` appears only if the
user gave one. Values of #SBATCH lines may hold only characters of names, times and paths. Shell words are quoted.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from priorclip.cluster.commands import SbatchConfig
from priorclip.cluster.launch.command_line import CPU_RANKS, MODULE
from priorclip.common.command_names import module_of
from priorclip.common.output import get_logger
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

logger = get_logger(__name__)

TEMPLATES = {
    name: Path(__file__).parents[1] / "slurm" / f"{file}.sbatch" for name, file in (("srun", "run"), ("node", "node"))
}
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Allowed values of #SBATCH lines. No shell reads these lines, and no quoting works in all versions of SLURM.
NAME = re.compile(r"[\w.+-]+")
LIST = re.compile(r"[\w.+,@-]+")
PATH = re.compile(r"[\w.+@=:/-]+")
MOUNT = re.compile(r"/[^:,]*(:/[^:,]*)?")
TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}")


def submit(config: SbatchConfig, run: Sequence[str]) -> int:
    """Submits ``run`` (a module and its options) and prints the job's number. Returns sbatch's exit code.

    Raises:
        ValueError: an option has characters that are not allowed, or sbatch is not installed.
    """
    script = render_script(config, run)
    if config.dry_run:
        print(script, end="")
        return 0
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not installed here: run this on a login node, or print the script with --dry-run")
    Path(config.logs).mkdir(parents=True, exist_ok=True)
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


def render_script(config: SbatchConfig, run: Sequence[str]) -> str:
    """Returns the batch script of ``run``."""
    path = Path(config.template) if config.template else TEMPLATES[config.launcher]
    try:
        template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--template {path} is no text in UTF-8: {error}") from error
    if not template.startswith("#!"):
        raise ValueError(f"--template {path} is no batch script: its first line must be #!/bin/bash")
    if "{{command}}" not in template:
        raise ValueError(f"--template {path} does not start the run: put {{{{command}}}} where it belongs")
    return fill_template(template, template_values(config, run), str(path))


def template_values(config: SbatchConfig, run: Sequence[str]) -> dict[str, str]:
    """Returns the text of each name in the template. An empty text leaves the line out."""
    module, *words = module_of(run[0]), *run[1:]
    if not MODULE.fullmatch(module):
        raise ValueError(f"'{module}' is not the name of a module: write pretrain, or finetune and its sub-command")
    for name, least in (
        ("nodes", 1),
        ("gpus_per_node", 0),
        ("cpus_per_task", 1),
        ("signal_seconds", 0),
        ("retries", 0),
    ):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: at least {least} is needed")
    time = checked("time", config.time, TIME)
    if 0 < seconds_of(time) <= config.signal_seconds:
        raise ValueError(
            f"--time {time} is no more than --signal-seconds {config.signal_seconds}: the run would get the signal to"
            " end when it starts, and go back into the queue forever"
        )
    ranks = config.ranks_per_node or config.gpus_per_node or CPU_RANKS
    logs = os.path.abspath(config.logs)
    return {
        "job_name": checked("job_name", config.job_name, NAME),
        "nodes": str(config.nodes),
        "ranks_per_node": str(ranks),
        "gpus_per_node": str(config.gpus_per_node or ""),
        "cpus_per_task": str(config.cpus_per_task),
        "cpus_per_node": str(config.cpus_per_task * ranks),
        "time": time,
        "partition": checked("partition", config.partition, LIST),
        "account": checked("account", config.account, LIST),
        "qos": checked("qos", config.qos, LIST),
        "folder": checked("chdir (the working folder)", os.getcwd(), PATH),
        "logs": checked("logs", logs, PATH),
        "signal_seconds": str(config.signal_seconds),
        "requeue_code": str(REQUEUE_EXIT_CODE),
        "retries": str(config.retries),
        **interpreter(config),
        "command": shlex.join([module, *words]),
    }


def seconds_of(time: str) -> int:
    """Seconds of a SLURM limit: minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]."""
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def interpreter(config: SbatchConfig) -> dict[str, str]:
    """srun's options, the words before the interpreter, and the interpreter. A container mounts the working folder."""
    python = shlex.quote(config.python or ("python3" if config.container else sys.executable))
    if config.container is None:
        if config.container_mounts:
            raise ValueError("--container-mounts needs --container IMAGE")
        return {"srun_options": "", "prefix": "", "python": python}
    folder = os.getcwd()
    mounts = [folder, *mounted(config.container_mounts)]
    if config.container_runtime == "pyxis":
        pairs = [each if ":" in each else f"{each}:{each}" for each in mounts]
        words = [f"--container-image={config.container}", f"--container-mounts={','.join(pairs)}"]
        return {"srun_options": shlex.join([*words, f"--container-workdir={folder}"]), "prefix": "", "python": python}
    gpu = ["--nv"] if config.gpus_per_node else []
    words = ["apptainer", "exec", *gpu, "--bind", ",".join(mounts), "--pwd", folder, config.container]
    return {"srun_options": "", "prefix": shlex.join(words), "python": python}


def mounted(mounts: str | None) -> list[str]:
    """Returns the folders of --container-mounts. Raises ValueError for a path that is not absolute."""
    folders = mounts.split(",") if mounts else []
    for folder in folders:
        if not MOUNT.fullmatch(folder):
            raise ValueError(
                f"--container-mounts '{folder}': write an absolute path, or HOST:CONTAINER with two of them"
            )
    return folders


def checked(name: str, value: str | None, allowed: re.Pattern[str]) -> str:
    """Returns the value of the option, "" for None. Raises ValueError if an #SBATCH line cannot hold it."""
    if value and not allowed.fullmatch(value):
        raise ValueError(f"--{name.replace('_', '-')} '{value}' has characters that an #SBATCH line cannot hold")
    return value or ""


def fill_template(template: str, known: Mapping[str, str], path: str) -> str:
    """Replaces the names of the template by their values and drops lines with an empty value."""
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
