"""Steps of the demo: a title and a command line each, run in turn, shown as they go and logged."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# What DeepSpeed says on its own of every launch; it is in the log file, the terminal shows the run itself.
NOISE = re.compile(
    r"\[(INFO|WARNING)\] \[|^\[?W\d+ |FutureWarning|UserWarning|warnings\.warn|^\s*$|^Time to load|ninja|^\[\d{4}-|"
    r"^(Emitting|Building extension|Allowing|Loading extension|Using .* as PyTorch ext|Detected CUDA|Creating ext)"
)


class StepFailed(Exception):
    """A command ended with an error; the message names it and its log."""


@dataclass(frozen=True)
class Step:
    """One command. ``ranks`` above zero starts it with the deepspeed launcher on that many processes here."""

    name: str
    title: str
    module: str
    arguments: tuple[str, ...]
    ranks: int = 0

    def command(self) -> list[str]:
        if not self.ranks:
            return [sys.executable, "-u", "-m", self.module, *self.arguments]
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        # No hostfile: DeepSpeed would take one that a cluster has at /job/hostfile.
        place = ["--hostfile", "/dev/null", "--num_gpus", str(self.ranks), "--master_port", str(free_port())]
        return [launcher, *place, "--module", self.module, *self.arguments]


def run_steps(steps: list[Step], folder: Path) -> None:
    """Run the steps in order; raises StepFailed at the first that fails."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        begun = time.time()
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        command = step.command()
        print(f"    {shown(command)}", flush=True)
        code = run_logged(command, logs / f"{step.name}.log")
        if code != 0:
            raise StepFailed(f"step '{step.name}' ended with code {code}; its log: {logs / step.name}.log")
        print(f"    done in {time.time() - begun:.0f} s", flush=True)


def run_logged(command: list[str], log: Path) -> int:
    """Run a command; its whole output goes to the log, what is worth reading to the terminal as well."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # A virtual environment that was not activated: DeepSpeed looks for ninja on the PATH.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert process.stdout is not None
        rest = b""
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                file.write(chunk)
                *lines, rest = re.split(rb"[\r\n]", rest + chunk)
                for line in lines:
                    show(line.decode(errors="replace"))
            show(rest.decode(errors="replace"))
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def show(line: str) -> None:
    if not NOISE.search(line):
        print(f"    {line}", flush=True)


def shown(command: list[str]) -> str:
    """The command as a user would type it."""
    words = [Path(command[0]).name, *command[1:]]
    return " ".join(word if re.fullmatch(r"[\w./:,=@%+-]+", word) else f"'{word}'" for word in words if word != "-u")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
