"""``python -m experiments sweep|resplit|collect|tables|fit|shift [--a.b value ...]``.

``python -m finetune sweep|resplit`` is the same as the first two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorclip.common.command_line import run_command
from priorclip.common.options import parse_command
from priorclip.common.output import say
from priorclip.experiments.commands import (
    COMMANDS,
    POSITIONAL,
    CollectConfig,
    FitConfig,
    ResplitConfig,
    ShiftConfig,
    TablesConfig,
)


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
    if isinstance(config, CollectConfig):
        from priorclip.experiments.collected import collect

        say(f"{config.output}: {', '.join(collect(config.folders, Path(config.output)))}")
        return 0
    if isinstance(config, TablesConfig):
        from priorclip.experiments.collected import named_tables

        say("\n".join(named_tables(config.file, config.names, config.less)))
        return 0
    if isinstance(config, FitConfig):
        from priorclip.experiments.power_law import fit_study, fit_table

        say(fit_table(fit_study(config)))
        return 0
    if isinstance(config, ShiftConfig):
        from priorclip.experiments.shift import measure_shift, shift_table

        say(shift_table(measure_shift(config)))
        return 0
    from priorclip.experiments.sweep import sweep

    return sweep(config)


if __name__ == "__main__":
    sys.exit(main())
