"""``python -m pretrain --config FILE.yaml [--a.b value ...]``, one process; with ``deepspeed --module`` many."""

from __future__ import annotations

from priorclip.common.options import parse
from priorclip.pretrain.commands import PretrainConfig, model_defaults
from priorclip.training.ranks.preemption import hear_early


def main() -> None:
    hear_early()
    config = parse(PretrainConfig, prog="pretrain", defaults=model_defaults)
    from priorclip.pretrain.train_retrieval import train_retrieval

    train_retrieval(config)


if __name__ == "__main__":
    main()
