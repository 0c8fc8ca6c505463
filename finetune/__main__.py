"""``python -m finetune prior|instruct|closed --config FILE.yaml [--a.b value ...]``; many with ``deepspeed``."""

from __future__ import annotations

from finetune.config import COMMANDS, DEFAULTS
from options import parse_command


def main() -> None:
    command, config = parse_command(
        COMMANDS, prog="finetune", description="Train what comes after stage one.", defaults=DEFAULTS
    )
    if command == "prior":
        from finetune.prior import train_prior

        train_prior(config)
    else:
        from finetune.captions import train_on_captions

        train_on_captions(config)


if __name__ == "__main__":
    main()
