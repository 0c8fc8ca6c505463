"""This node's copies of remote shards: chunks of 4 MiB in a folder that all its ranks and workers share.

    ~/.cache/data_shards/chunks/3f2ab4...-000012          bytes 12 * 4 MiB .. of one version of one object
                                3f2ab4...-000013.part     being fetched, locked by the process that fetches it

One process fetches a chunk while others wait for it. A process that dies loses its lock; if it makes no progress,
another process fetches the chunk. A chunk counts before its first byte is requested, and the least recently used chunks
are deleted first, so the folder is always within its limit (unless the chunks that are being fetched exceed it). An
open chunk can still be read after its deletion; a deleted chunk is fetched again. If the disk is full, the run goes on
without new chunks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from priorclip.common.output import get_logger

log = get_logger(__name__)

CHUNK = 4 << 20  # bytes
KEPT_SHARE = 0.9  # share of the limit that an eviction leaves, so that the next one is not due at once
POLL = 0.01  # seconds
_warned_folders: set[Path] = set()  # full folders that this process has warned about
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class ChunkCache:
    """The files of a folder, at most ``limit`` bytes together.

    Args:
        folder: is created if it is missing
        limit: bytes; 0 keeps none
        patience: seconds to wait for another process that fetches and makes no progress
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience

    def open(self, name: str, size: int, fetch: Callable[[], Iterable[bytes]]) -> int | None:
        """Returns a file descriptor of the chunk, fetched if missing, or None without room. The caller closes it."""
        path = self.folder / name
        found = self._opened(path, size)
        if found is not None or not self.limit:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with claim_part(path, self.patience) as part:
                if part is None:
                    return self.open(name, size, fetch)  # another process has finished it
                self._make_room(part, size)
                filled = write(part, fetch())
                if filled != size:
                    raise OSError(f"{filled} of {size} bytes came")
                with self._book():  # so that a process that counts sees it under one name
                    publish(part, path)
                return os.dup(part.fileno())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if self.folder not in _warned_folders:
                _warned_folders.add(self.folder)
                log.warning("no room in %s (%s): remote shards are read without a copy", self.folder, error)
            return None

    def _opened(self, path: Path, size: int) -> int | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != size:  # not a file of ours
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(handle)  # eviction goes by the time of the last use
        return handle

    def _book(self) -> AbstractContextManager[IO[str]]:
        """Locks the file with the number of bytes in the folder, chunks in progress included."""
        return file_lock(self.folder / ".bytes", self.patience)

    def _make_room(self, part: IO[bytes], size: int) -> None:
        """Counts ``part`` as ``size`` bytes. Above the limit, evicts the least recently used chunks."""
        with self._book() as book:
            text = book.read(64).strip()
            held = int(text) if text.isascii() and text.isdigit() else self.limit + 1  # unknown: count again
            if held + size > self.limit:
                held = self._evict(size)
            part.truncate(size)  # a sparse file: its length tells other processes how much will come
            book.seek(0)
            book.truncate()
            book.write(str(held + size))

    def _evict(self, size: int) -> int:
        """Removes the least recently used chunks, down to the kept share. Returns the bytes that are left."""
        coming, found = 0, []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                state = entry.stat()
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                if entry.name.endswith(".part"):
                    coming += 0 if remove_if_abandoned(Path(entry.path)) else state.st_size
                    continue
                found.append((state.st_mtime, entry.path, state.st_size))
        held = coming + sum(row[2] for row in found)
        aim = max(0, int(self.limit * KEPT_SHARE) - size) if held + size > self.limit else held
        for _, path, count in sorted(found):
            if held <= aim:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            held -= count
        return held


def fetch_once(path: Path, patience: float, fetch: Callable[[], Iterable[bytes]]) -> Path:
    """Returns ``path``. If it is missing, one process of the node writes it by ``fetch`` while the others wait."""
    while not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim_part(path, patience) as part:
            if part is None:
                continue
            write(part, fetch())
            publish(part, path)
    return path


@contextlib.contextmanager
def claim_part(path: Path, patience: float) -> Iterator[IO[bytes] | None]:
    """Locks ``path.part`` for this process, which writes it. Yields None if another process has finished ``path``.

    Removes the part at the end, unless ``publish`` has renamed it.
    """
    place = path.with_name(f"{path.name}.part")
    patient_until = time.monotonic() + patience
    last = -1.0
    while True:
        if path.exists():
            yield None
            return
        part = os.fdopen(os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(part, place):
                if not path.exists():
                    break
                place.unlink(missing_ok=True)  # another process finished it just before we made an empty part
        except BlockingIOError:
            state = os.fstat(part.fileno())
            if state.st_mtime != last:  # it grows, so its writer is alive
                last, patient_until = state.st_mtime, time.monotonic() + patience
            elif time.monotonic() > patient_until:
                log.warning("%s: the process that fetches it makes no progress; fetching it again", place)
                place.unlink(missing_ok=True)
        _release(part)
        time.sleep(POLL)
    try:
        part.truncate(0)
        yield part
    finally:
        if _is_same_file(part, place):
            place.unlink(missing_ok=True)
        _release(part)


def publish(part: IO[bytes], path: Path) -> None:
    """Renames a finished part, unless another process has taken over: then ``path.part`` is a different file."""
    place = path.with_name(f"{path.name}.part")
    if _is_same_file(part, place):
        os.replace(place, path)


def remove_if_abandoned(place: Path) -> bool:
    """Removes the part and returns True if no process writes it any more."""
    part = open(place, "rb", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_same_file(part, place):
            place.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        _release(part)


def write(part: IO[bytes], data: Iterable[bytes]) -> int:
    """Writes all pieces and flushes them to the disk. Returns the number of bytes."""
    count = 0
    for piece in data:
        view = memoryview(piece)
        while view:
            view = view[part.write(view) :]
        count += len(piece)
    os.fdatasync(part.fileno())
    return count


def mark_alive(part: IO[bytes]) -> None:
    """Updates the time of the part, so that waiting processes see progress."""
    with contextlib.suppress(OSError):
        os.utime(part.fileno())


def _is_same_file(part: IO[bytes], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(part.fileno()), os.stat(place))
    except FileNotFoundError:
        return False


def _release(part: IO[bytes]) -> None:
    """Unlocks, then closes: a forked child shares the lock, and closing alone would leave it locked."""
    with contextlib.suppress(OSError):
        fcntl.flock(part, fcntl.LOCK_UN)
    part.close()


@contextlib.contextmanager
def file_lock(path: Path, patience: float) -> Iterator[IO[str]]:
    """Opens and locks a file. After ``patience`` seconds it goes on without the lock, because its holder has stopped.

    The lock guards a count or a copy, so doing the work twice does no harm.
    """
    until = time.monotonic() + patience
    with open(path, "a+", encoding="ascii") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    log.warning("%s: its holder makes no progress; going on without the lock", path)
                    break
                time.sleep(POLL)
        try:
            file.seek(0)
            yield file
            file.flush()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
