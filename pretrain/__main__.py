"""``python -m pretrain --config FILE.yaml [--a.b value ...]``, one process; with ``deepspeed --module`` many."""

from __future__ import annotations

from cluster.preemption import hear_early
from options import parse
from pretrain.config import PretrainConfig, model_defaults


def main() -> None:
    hear_early()
    config = parse(PretrainConfig, prog="pretrain", defaults=model_defaults)
    from pretrain.train import pretrain

    pretrain(config)


if __name__ == "__main__":
    main()
