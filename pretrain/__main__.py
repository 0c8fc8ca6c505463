"""``python -m pretrain --config FILE.yaml [--a.b value ...]``, one process; with ``deepspeed --module`` many."""

from __future__ import annotations

import sys

from priorclip.common.command_line import run_command
from priorclip.common.options import parse
from priorclip.pretrain.commands import PretrainConfig, model_defaults
from priorclip.training.ranks.preemption import keep_early_signals


def main() -> int:
    keep_early_signals()
    config = parse(PretrainConfig, prog="pretrain", defaults=model_defaults)
    return run_command("pretrain", lambda: train(config))


def train(config: PretrainConfig) -> None:
    from priorclip.pretrain.train_retrieval import train_retrieval

    train_retrieval(config)


if __name__ == "__main__":
    sys.exit(main())
