"""Reads ahead: requests the bytes of a batch from remote shards before they are needed, several at a time.

    ahead = ReadAhead(16)
    ahead.plan([(file, 512, 90_000), (file, 91_000, 80_000), ...])   # in the order of need
    ahead.take(file, 512, 90_000)                                    # waits for this one while others load

Neighbours in one shard become one request if the gap between them is less than ``GAP`` bytes. At most ``depth``
requests are open or not taken yet, each of at most ``LONGEST`` bytes or one sample. That limits the memory.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from priorclip.data_shards.remote.shard_files import RemoteFile

GAP = 1 << 16  # bytes; fetching them takes about as long as another request
LONGEST = 4 << 20  # bytes of one request

Need = tuple[RemoteFile, int, int]  # file, offset, length


@dataclass(eq=False)
class Span:
    """One request for the bytes start .. end - 1 of a file. ``left`` needs have not taken their bytes yet."""

    file: RemoteFile
    start: int
    end: int
    left: int = 1
    future: Future[bytes] | None = None


@dataclass
class ReadAhead:
    """See the module docstring. One instance serves one reading thread."""

    depth: int
    _spans: dict[tuple[int, int, int], Span] = field(default_factory=dict)
    _waiting: deque[Span] = field(default_factory=deque)
    _under_way: int = 0

    def plan(self, needs: Sequence[Need]) -> None:
        """Drops the previous plan and starts to fetch."""
        self._spans.clear()
        self._waiting.clear()
        self._under_way = 0
        if self.depth:
            self._spans = merge_needs(needs)
            seen: set[int] = set()
            for span in self._spans.values():
                if id(span) not in seen:
                    seen.add(id(span))
                    self._waiting.append(span)
            self._go_on()

    def take(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """Returns the bytes, from the plan or by a new request. Raises as ``RemoteFile.pread`` does."""
        span = self._spans.pop((id(file), offset, length), None)
        if span is None:
            return file.pread(offset, length)
        if span.future is None:  # taken before its turn
            self._waiting.remove(span)
            self._start(span)
        assert span.future is not None
        try:
            data = span.future.result()
        finally:
            span.left -= 1
            if not span.left:
                span.future = None
                self._under_way -= 1
                self._go_on()
        return data[offset - span.start : offset - span.start + length]

    def _go_on(self) -> None:
        while self._waiting and self._under_way < self.depth:
            self._start(self._waiting.popleft())

    def _start(self, span: Span) -> None:
        self._under_way += 1
        span.future = threads(self.depth).submit(span)

    def __getstate__(self) -> dict:
        """Leaves out the plan, because a worker process starts without one."""
        return {"depth": self.depth, "_spans": {}, "_waiting": deque(), "_under_way": 0}


def merge_needs(needs: Sequence[Need]) -> dict[tuple[int, int, int], Span]:
    """Returns the span of each need, by (id of file, offset, length), in the order of the needs."""
    by_file: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        by_file[id(need[0])].append(need)
    spans: dict[tuple[int, int, int], Span] = {}
    for number, group in by_file.items():
        last: Span | None = None
        for file, offset, length in sorted(set(group), key=lambda need: need[1:]):
            end = offset + length
            if last and offset - last.end <= GAP and max(end, last.end) - last.start <= LONGEST:
                last.end, last.left = max(end, last.end), last.left + 1
            else:
                last = Span(file, offset, end)
            spans[number, offset, length] = last
    return {key: spans[key] for key in dict.fromkeys((id(file), offset, length) for file, offset, length in needs)}


class Threads:
    """Threads that read spans. They are daemon threads, so that a process ends without waiting for the network."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Span] = queue.SimpleQueue()
        self._count = 0

    def grown(self, count: int) -> Threads:
        while self._count < count:
            threading.Thread(target=self._work, name=f"read-ahead-{self._count}", daemon=True).start()
            self._count += 1
        return self

    def submit(self, span: Span) -> Future[bytes]:
        span.future = Future()
        self._queue.put(span)
        return span.future

    def _work(self) -> None:
        while True:
            span = self._queue.get()
            future = span.future
            if future is None:
                continue
            try:
                future.set_result(span.file.pread(span.start, span.end - span.start))
            except BaseException as error:
                future.set_exception(error)
            del span, future


_threads = Threads()


def threads(count: int) -> Threads:
    """Returns the threads of this process, at least ``count`` of them."""
    return _threads.grown(count)


def _reset_after_fork() -> None:
    global _threads
    _threads = Threads()  # a forked child has no threads of its parent


os.register_at_fork(after_in_child=_reset_after_fork)
