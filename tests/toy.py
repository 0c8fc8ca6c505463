"""``python -m tests.toy``: starts toy_run like ``python -m pretrain``, which keeps signals that come early."""

from __future__ import annotations

from priorclip.training.ranks.preemption import keep_early_signals

if __name__ == "__main__":
    keep_early_signals()
    from tests.toy_run import main

    main()
