"""``python -m experiments sweep|resplit [--a.b value ...]``; ``python -m finetune sweep|resplit`` is the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from priorclip.common.command_line import run_command
from priorclip.common.options import parse_command
from priorclip.common.output import say
from priorclip.experiments.commands import COMMANDS, POSITIONAL, ResplitConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    command, config = parse_command(
        COMMANDS, argv, prog="experiments", description="Run experiments by name.", positional=POSITIONAL
    )
    return run(f"experiments {command}", config)


def run(prog: str, config: Any) -> int:
    """Runs the command whose options ``config`` holds, and returns its exit code."""
    return run_command(prog, lambda: work(config), interrupted="interrupted: the same command goes on")


def work(config: Any) -> int:
    if isinstance(config, ResplitConfig):
        from priorclip.experiments.resplit import resplit

        say("\n".join(map(str, resplit(config))))
        return 0
    from priorclip.experiments.sweep import sweep

    return sweep(config)


if __name__ == "__main__":
    sys.exit(main())
