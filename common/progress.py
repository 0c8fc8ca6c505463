"""Progress of long work: a bar on a terminal, and elsewhere a line a minute, because a log cannot show a bar.

    with Progress(9700, "pack", "img") as progress:
        progress.update(32)

    INFO pack: 6,112 of 9,700 (63.0 %), 101.3 img/s, 0:00:35 left      a log gets this every minute
    INFO pack: 9,700 of 9,700 in 0:01:37                               and this at the end, if it got a line before

    for run in counted(runs, "evaluations", "run"): ...

The line comes from a thread, so that it also comes while one item takes many minutes. It is a log record: the logger
removes secrets and control characters, and in a training only rank 0 shows it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from priorclip.common.output import get_logger, safe_text
from priorclip.common.printable import one_line

log = get_logger(__name__)

T = TypeVar("T")
EVERY = 60.0  # seconds between two lines
RECENT = 10  # the rate is that of the last so many lines, because cached items are much faster than others


class Progress:
    """Counts finished items and shows how many there are.

    Args:
        total: number of items
        title: what is done; it may be untrusted text
        unit: name of one item
        done: items that were finished before
        shown: False shows nothing, for ranks other than the first
        stream: whose terminal shows the bar; None is standard error
        every: seconds between two lines in a log
    """

    def __init__(
        self,
        total: int,
        title: str,
        unit: str,
        *,
        done: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
        every: float | None = None,
    ) -> None:
        self.total, self.title, self.unit, self.done = total, one_line(safe_text(title)), unit, done
        self.every = EVERY if every is None else every
        self.values, self.lines = "", 0
        stream = stream or sys.stderr
        is_terminal = shown and stream.isatty()
        self.bar = tqdm(
            total=total, initial=done, desc=self.title, unit=unit, file=stream, disable=not is_terminal, leave=None,
            dynamic_ncols=True,
        )  # fmt: skip
        self.started = time.monotonic()
        self.counts = deque([(self.started, done)], maxlen=RECENT)
        self.closed, self.writing = threading.Event(), threading.Lock()
        if shown and not is_terminal:
            threading.Thread(target=self._report, name=f"progress of {self.title}", daemon=True).start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Adds finished items."""
        self.done += count
        self.bar.update(count)

    def show(self, values: Mapping[str, float]) -> None:
        """Shows these values beside the progress, for example the loss."""
        texts = {name: f"{value:.4g}" for name, value in values.items()}
        self.values = ", ".join(f"{name} {text}" for name, text in texts.items())
        self.bar.set_postfix(texts, refresh=False)

    def close(self) -> None:
        """Ends the bar; a log that got a line gets the number of finished items and the time that they took."""
        with self.writing:
            if not self.closed.is_set() and self.lines:
                seconds = time.monotonic() - self.started
                log.info("%s: %s of %s in %s", self.title, f"{self.done:,}", f"{self.total:,}", clock_time(seconds))
            self.closed.set()
        self.bar.close()

    def _report(self) -> None:
        while not self.closed.wait(self.every):
            with self.writing:
                if not self.closed.is_set():
                    self._write_line()

    def _write_line(self) -> None:
        now, done = time.monotonic(), self.done
        before, earlier = self.counts[0]
        self.counts.append((now, done))
        self.lines += 1
        line = progress_line(done, self.total, self.unit, (done - earlier) / max(1e-9, now - before))
        log.info("%s: %s", self.title, f"{line}; {self.values}" if self.values else line)


def print_above(text: str, stream: TextIO) -> None:
    """Prints a line, above a bar if one is shown. The text is safe to print already."""
    tqdm.write(text, file=stream)


def progress_line(done: int, total: int, unit: str, rate: float) -> str:
    """Returns share, rate and time left as text; ``rate`` is in items a second."""
    share = f" ({100 * done / total:.1f} %)" if total else ""
    if rate <= 0:
        return f"{done:,} of {total:,}{share}, time left unknown"
    speed = f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{1 / rate:,.1f} s/{unit}"
    return f"{done:,} of {total:,}{share}, {speed}, {clock_time(max(0, total - done) / rate)} left"


def clock_time(seconds: float) -> str:
    """Returns ``"0:01:37"``; 30 hours are ``"30:00:00"``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def counted(items: Iterable[T], title: str, unit: str, total: int | None = None, **options: Any) -> Iterator[T]:
    """Yields the items and shows how many are finished. ``total`` is needed if ``items`` has no length."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with Progress(total, title, unit, **options) as progress:
        for item in items:
            yield item
            progress.update()
