"""``python -m finetune prior|instruct|closed|resplit|sweep [--config FILE.yaml] [--a.b value ...]``."""

from __future__ import annotations

import sys

from cluster.preemption import hear_early
from finetune.config import COMMANDS, DEFAULTS
from options import parse_command


def main() -> None:
    command, config = parse_command(
        COMMANDS,
        prog="finetune",
        description="Train what comes after stage one.",
        positional={"sweep": "name"},
        defaults=DEFAULTS,
    )
    if command == "prior":
        hear_early()
        from finetune.prior import train_prior

        train_prior(config)
    elif command == "resplit":
        from finetune.resplit import resplit

        try:
            print("\n".join(map(str, resplit(config))))
        except (OSError, ValueError) as error:
            sys.exit(f"finetune resplit: {error}")
    elif command == "sweep":
        from finetune.sweep import sweep

        try:
            sys.exit(sweep(config))
        except ValueError as error:
            sys.exit(f"finetune sweep: {error}")
        except KeyboardInterrupt:
            sys.exit("finetune sweep: interrupted: the same command goes on")
    else:
        hear_early()
        from finetune.captions import train_on_captions

        train_on_captions(config)


if __name__ == "__main__":
    main()
