"""``python -m finetune prior|instruct|closed|resplit|sweep [--config FILE.yaml] [--a.b value ...]``."""

from __future__ import annotations

import sys

from priorclip.common.options import parse_command
from priorclip.experiments.commands import COMMANDS as EXPERIMENTS
from priorclip.experiments.commands import POSITIONAL
from priorclip.finetune.commands import COMMANDS, DEFAULTS
from priorclip.training.ranks.preemption import hear_early


def main() -> None:
    command, config = parse_command(
        {**COMMANDS, **EXPERIMENTS},
        prog="finetune",
        description="Train what comes after stage one.",
        positional=POSITIONAL,
        defaults=DEFAULTS,
    )
    if command == "prior":
        hear_early()
        from priorclip.finetune.train_prior import train_prior

        train_prior(config)
    elif command in EXPERIMENTS:
        from priorclip.experiments.__main__ import run

        sys.exit(run(f"finetune {command}", config))
    else:
        hear_early()
        from priorclip.pretrain.train_retrieval import train_retrieval

        train_retrieval(config, config.lora, config.test)


if __name__ == "__main__":
    main()
