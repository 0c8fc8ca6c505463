"""``python -m tests.toy``: toy_run as ``python -m pretrain`` starts a run, hearing signals from the first."""

from __future__ import annotations

from priorclip.training.ranks.preemption import keep_early_signals

if __name__ == "__main__":
    keep_early_signals()
    from tests.toy_run import main

    main()
