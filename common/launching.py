"""Starts a module on this machine, on one process or several ranks, and logs its output.

command = launch_command("priorclip.pretrain", ["--config", "c.yaml"], ranks=2)
-> ["deepspeed", "--hostfile", "/dev/null", "--num_gpus", "2", "--master_port", "40112",
    "--module", "priorclip.pretrain", "--config", "c.yaml"]
with Path("run.log").open("wb") as log: code = run_logged(command, log)
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from priorclip.common.masking import masked
from priorclip.common.ports import free_port


def launch_command(module: str, arguments: Sequence[str], ranks: int = 0) -> list[str]:
    """Returns ``python -m MODULE ARGUMENTS``, or with ``ranks`` the deepspeed launcher for these ranks on this host."""
    if not ranks:
        return [sys.executable, "-m", module, *arguments]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    # /dev/null: otherwise DeepSpeed reads /job/hostfile, which some clusters have.
    options = ["--hostfile", "/dev/null", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [launcher, *options, "--module", module, *arguments]


def display_command(command: Sequence[str]) -> str:
    """The command as a user types it: the program without its folder, and no secrets."""
    return masked(shlex.join([Path(command[0]).name, *command[1:]]))


def run_logged(
    command: Sequence[str],
    log: IO[bytes],
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> int:
    """Runs the command, writes all its output to ``log`` and returns its exit code. ``on_line`` also gets each line."""
    if on_line is None:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert process.stdout is not None
    rest = b""
    try:
        while chunk := os.read(process.stdout.fileno(), 65536):
            log.write(chunk)
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines:
                on_line(line.decode(errors="replace"))
        on_line(rest.decode(errors="replace"))
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
