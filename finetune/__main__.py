"""``python -m finetune prior|instruct|closed|resplit|sweep [--config FILE.yaml] [--a.b value ...]``."""

from __future__ import annotations

import sys
from typing import Any

from priorclip.common.command_line import run_command
from priorclip.common.options import parse_command
from priorclip.experiments.commands import OF_FINETUNE as EXPERIMENTS
from priorclip.experiments.commands import POSITIONAL
from priorclip.finetune.commands import COMMANDS, DEFAULTS
from priorclip.training.ranks.preemption import keep_early_signals


def main() -> int:
    command, config = parse_command(
        {**COMMANDS, **EXPERIMENTS},
        prog="finetune",
        description="Train what comes after stage one.",
        positional=POSITIONAL,
        defaults=DEFAULTS,
    )
    if command in EXPERIMENTS:
        from priorclip.experiments.__main__ import run

        return run(f"finetune {command}", config)
    keep_early_signals()
    return run_command(f"finetune {command}", lambda: train(command, config))


def train(command: str, config: Any) -> None:
    if command == "prior":
        from priorclip.finetune.train_prior import train_prior

        train_prior(config)
    else:
        from priorclip.pretrain.train_retrieval import train_retrieval

        train_retrieval(config, config.lora, config.test)


if __name__ == "__main__":
    sys.exit(main())
