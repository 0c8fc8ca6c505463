"""SLURM's signal that a job will end: SIGTERM or SIGUSR1 becomes a flag that the run reads after each step.

    keep_early_signals()           # before torch is imported, which takes seconds
    stop_signal = StopSignal()     # when training begins; `received` is True if SIGUSR1 came before

Until training begins, SIGTERM ends the process, because launchers use it to end ranks that wait for a failed one.
"""

from __future__ import annotations

import atexit
import signal
from types import FrameType

from priorclip.common.output import get_logger

logger = get_logger(__name__)

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL: the batch script requeues a job that ends with it
HANG_EXIT_CODE = 76  # of a rank that ends a run because it hangs

EARLY_SIGNALS: list[int] = []


def keep_early_signals() -> None:
    """Keeps a SIGUSR1 for the later ``StopSignal``. Without this, it would end a starting run, and its job."""
    signal.signal(signal.SIGUSR1, lambda number, frame: EARLY_SIGNALS.append(number))


class EvaluationInterrupted(Exception):
    """Leaves an evaluation, on all ranks at the same place, after a stop signal."""


class StopSignal:
    """``received`` becomes True at the first SIGTERM or SIGUSR1. Create it in the main thread only.

    Python removes its signal handlers when it exits. We then ignore SIGUSR1, so that it cannot kill a finished run.
    """

    def __init__(self) -> None:
        self.received = False
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)
        for early in EARLY_SIGNALS:  # no more are added, because the handlers above are set
            self.receive(early, None)
        EARLY_SIGNALS.clear()

    def receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.received:
            name = signal.Signals(number).name
            logger.warning("%s: the run writes a checkpoint after this step or the next, then it ends", name)
        self.received = True
