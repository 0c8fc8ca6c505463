"""``python -m experiments sweep|resplit [--a.b value ...]``; ``python -m finetune sweep|resplit`` is the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from priorclip.common.options import parse_command
from priorclip.experiments.commands import COMMANDS, POSITIONAL, ResplitConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    command, config = parse_command(
        COMMANDS, argv, prog="experiments", description="Run experiments by name.", positional=POSITIONAL
    )
    return run(f"experiments {command}", config)


def run(prog: str, config: Any) -> int:
    """Runs the command whose options ``config`` holds. Exits with a message if a name, file or folder is wrong."""
    try:
        if isinstance(config, ResplitConfig):
            from priorclip.experiments.resplit import resplit

            print("\n".join(map(str, resplit(config))))
            return 0
        from priorclip.experiments.sweep import sweep

        return sweep(config)
    except (OSError, ValueError) as error:
        sys.exit(f"{prog}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted: the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
