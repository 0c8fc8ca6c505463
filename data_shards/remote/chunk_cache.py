"""The node's copy of remote shards: chunks of 4 MiB in a folder that all its ranks and workers share.

    ~/.cache/data_shards/chunks/3f2ab4...-000012          bytes 12 * 4 MiB .. of one state of one object
                                3f2ab4...-000013.part     being fetched, locked by who fetches it

A chunk is fetched by one process while others wait for it; a holder that dies loses its lock, one that makes no
progress is passed over. A chunk counts from before its first byte is asked for, and chunks that were used longest ago
go first, so that the folder is within its limit at every moment (unless what is being fetched just then is more). A
chunk that is open still reads after it has gone, and one that is gone is fetched again. With a full disk the run goes
on without new chunks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

CHUNK = 4 << 20  # bytes
KEPT_SHARE = 0.9  # of the limit: what an eviction leaves, so that it is not due again at once
POLL = 0.01  # seconds
_warned_folders: set[Path] = set()  # folders without room that this process has remarked upon
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class ChunkCache:
    """Files of a folder, at most ``limit`` bytes of them.

    Args:
        folder: is made where it is missing
        limit: bytes; 0 keeps none
        patience: seconds without progress after which a process that fetches is not waited for any longer
    """

    def __init__(self, folder: Path, limit: int, patience: float) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience

    def open(self, name: str, size: int, fetch: Callable[[], Iterable[bytes]]) -> int | None:
        """A descriptor of the chunk, fetched if it is not here; None where it cannot be kept. The caller closes it."""
        path = self.folder / name
        found = self._opened(path, size)
        if found is not None or not self.limit:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with claim_part(path, self.patience) as part:
                if part is None:
                    return self.open(name, size, fetch)  # another has finished it
                self._make_room(part, size)
                filled = write(part, fetch())
                if filled != size:
                    raise OSError(f"{filled} of {size} bytes came")
                with self._book():  # whoever counts sees one name of it
                    publish(part, path)
                return os.dup(part.fileno())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if self.folder not in _warned_folders:
                _warned_folders.add(self.folder)
                log.warning("no room in %s (%s): remote shards are read without keeping them", self.folder, error)
            return None

    def _opened(self, path: Path, size: int) -> int | None:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != size:  # cannot come from us
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(handle)  # the time of use that eviction goes by
        return handle

    def _book(self) -> AbstractContextManager[IO[str]]:
        """The bytes that are held, chunks on their way included; locked, for each change of them."""
        return file_lock(self.folder / ".bytes", self.patience)

    def _make_room(self, part: IO[bytes], size: int) -> None:
        """Count ``part`` as ``size`` bytes; where that is past the limit, drop what was used longest ago."""
        with self._book() as book:
            text = book.read(64).strip()
            held = int(text) if text.isdigit() else self.limit + 1  # unknown: count
            if held + size > self.limit:
                held = self._evict(size)
            part.truncate(size)  # a hole so far; its length tells others what is coming
            book.seek(0)
            book.truncate()
            book.write(str(held + size))

    def _evict(self, size: int) -> int:
        """Remove chunks, oldest use first, down to the share that is kept; returns the bytes left."""
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
    """``path``, which one process of the node makes by ``fetch`` while the others wait, if it is not there."""
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
    """``path.part``, locked and empty, for the one who is to write it; None where another has finished it meanwhile.

    What is not renamed by the end is removed.
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
                place.unlink(missing_ok=True)  # another finished it after we had looked, and we made an empty one
        except BlockingIOError:
            state = os.fstat(part.fileno())
            if state.st_mtime != last:  # it grows, so its writer lives
                last, patient_until = state.st_mtime, time.monotonic() + patience
            elif time.monotonic() > patient_until:
                log.warning("%s: whoever fetches it makes no progress; it is fetched again", place)
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
    """Give a finished part its name, unless its maker was passed over meanwhile: then ``path.part`` is another's."""
    place = path.with_name(f"{path.name}.part")
    if _is_same_file(part, place):
        os.replace(place, path)


def remove_if_abandoned(place: Path) -> bool:
    """Whether nobody writes the part any more; then it is removed."""
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
    """Write all pieces and let them reach the disk; returns their bytes."""
    count = 0
    for piece in data:
        view = memoryview(piece)
        while view:
            view = view[part.write(view) :]
        count += len(piece)
    os.fdatasync(part.fileno())
    return count


def mark_alive(part: IO[bytes]) -> None:
    """Tell those who wait for the file that its maker lives."""
    with contextlib.suppress(OSError):
        os.utime(part.fileno())


def _is_same_file(part: IO[bytes], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(part.fileno()), os.stat(place))
    except FileNotFoundError:
        return False


def _release(part: IO[bytes]) -> None:
    """Unlock first: a child forked meanwhile holds the same lock, and closing here would leave it locked there."""
    with contextlib.suppress(OSError):
        fcntl.flock(part, fcntl.LOCK_UN)
    part.close()


@contextlib.contextmanager
def file_lock(path: Path, patience: float) -> Iterator[IO[str]]:
    """The file, locked. After ``patience`` seconds it is used unlocked: whoever holds it was stopped, and none may wait
    for ever. What is guarded so is a count or a copy, which doing twice does not spoil."""
    until = time.monotonic() + patience
    with open(path, "a+", encoding="ascii") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    log.warning("%s: whoever holds the lock makes no progress; it is passed over", path)
                    break
                time.sleep(POLL)
        try:
            file.seek(0)
            yield file
            file.flush()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
