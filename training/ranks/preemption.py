"""SLURM's notice that a job will end: SIGTERM or SIGUSR1 becomes a flag that the loop reads at each step boundary.

    hear_early()            # before torch is imported, which takes seconds
    notice = Notice()       # as training begins; given is true where SIGUSR1 has come meanwhile

SIGTERM is no notice until training begins: launchers end ranks by it that wait for one which has failed.
"""

from __future__ import annotations

import atexit
import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

# EX_TEMPFAIL: the batch script requeues a job that ends with it.
REQUEUE_EXIT_CODE = 75
# Of a rank that ends a run that hangs.
HANG_EXIT_CODE = 76


HEARD: list[int] = []


def hear_early() -> None:
    """Keep a SIGUSR1 for the ``Notice`` to come, which would else end a run that still starts, and its job with it."""
    signal.signal(signal.SIGUSR1, lambda number, frame: HEARD.append(number))


class Noticed(Exception):
    """Leaves an evaluation that the notice came in, on all ranks at the same place."""


class Notice:
    """``notice.given`` is True from the first SIGTERM or SIGUSR1 on. Only the main thread can install it.

    Python takes its handlers away as it ends: a time limit's SIGUSR1 that comes then must not kill a run that is done.
    """

    def __init__(self) -> None:
        self.given = False
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.take)
        for early in HEARD:  # none is added any more
            self.take(early, None)
        HEARD.clear()

    def take(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.given:
            logger.warning(
                "%s: a checkpoint is written at the next step, then the run ends", signal.Signals(number).name
            )
        self.given = True
