"""A budget of the time that a batch may lose to reads that fail, because a silent server costs ``timeout`` each time.

    budget = TimeBudget(60.0)
    budget.begin_batch()
    with budget.counting():                # counts the seconds only if the block raises OSError
        file.pread(offset, length)

Without it, a batch whose samples are all replaced by others of the same server waits 100 times ``timeout``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

TIMEOUTS = (
    4  # the budget, in timeouts of a request: below the 5 minutes of run.engine.hang_minutes at the default of 60 s
)


class SilentServer(RuntimeError):
    """Reading shards has failed for longer than a batch may wait. Not an error of one sample, so it ends the run."""


class TimeBudget:
    """Counts the seconds that failed reads of this process take.

    Args:
        timeout: seconds of one request; the budget of a batch is ``TIMEOUTS`` times as long
    """

    def __init__(self, timeout: float) -> None:
        self.limit = TIMEOUTS * timeout
        self.lost = 0.0
        self.is_batch = False

    def begin_batch(self) -> None:
        """Starts a new budget. Before the first call, a read that succeeds starts one too."""
        self.lost, self.is_batch = 0.0, True

    @property
    def is_spent(self) -> bool:
        return self.lost > self.limit

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the time of the block if it raises OSError.

        Raises:
            SilentServer: in place of the OSError, if the budget is spent
        """
        started = time.monotonic()
        try:
            yield
        except OSError as error:
            self.lost += time.monotonic() - started
            if self.is_spent:
                raise SilentServer(
                    f"reads of shards have failed for {self.lost:.0f} s, more than a batch may wait "
                    f"({TIMEOUTS} x data.timeout): the server is silent. The last error: {error}"
                ) from error
            raise
        if not self.is_batch:
            self.lost = 0.0
