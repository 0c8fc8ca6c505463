"""Runs the steps of the demo in order. Each is a title and a command; its output is shown and logged."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from priorclip.common.launching import display_command, launch_command, run_logged
from priorclip.common.output import say

# Output of DeepSpeed at every launch, which the log file has and the terminal does not show.
NOISE = re.compile(
    r"\[(INFO|WARNING)\] \[|^\[?W\d+ |FutureWarning|UserWarning|warnings\.warn|^\s*$|^Time to load|ninja|^\[\d{4}-|"
    r"^(Emitting|Building extension|Allowing|Loading extension|Using .* as PyTorch ext|Detected CUDA|Creating ext)"
)


class StepFailed(Exception):
    """A command failed. The message names the step and its log."""


@dataclass(frozen=True)
class Step:
    """One command. With ``ranks`` above 0, the deepspeed launcher starts it on that many processes here."""

    name: str
    title: str
    module: str
    arguments: tuple[str, ...]
    ranks: int = 0

    def command(self) -> list[str]:
        return launch_command(self.module, self.arguments, self.ranks)


def run_steps(steps: list[Step], folder: Path) -> None:
    """Runs the steps in order. Raises StepFailed at the first step that fails."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        begun = time.time()
        say(f"\n[{number}/{len(steps)}] {step.title}")
        command = step.command()
        say(f"    {display_command(command)}")
        code = run_step(command, logs / f"{step.name}.log")
        if code != 0:
            raise StepFailed(f"step '{step.name}' ended with code {code}: see {logs / step.name}.log")
        say(f"    done in {time.time() - begun:.0f} s")


def run_step(command: list[str], log: Path) -> int:
    """Runs a command. Writes its whole output to the log, and shows the lines without NOISE in the terminal."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # DeepSpeed looks for ninja on the PATH, which lacks it if the virtual environment is not activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with log.open("wb") as file:
        return run_logged(command, file, environment, on_line=show)


def show(line: str) -> None:
    if not NOISE.search(line):
        say(f"    {line}")
