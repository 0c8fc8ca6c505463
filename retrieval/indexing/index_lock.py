"""One command at a time makes or changes an index, so that none puts older content over newer one.

with changing(Path("runs/index")) as folder: ...       # runs/.index.lock is locked, and removed at the end
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def changing(folder: Path) -> Iterator[Path]:
    """Yields the whole path of an index, which need not exist yet, while no other command makes or changes it.

    Raises:
        BlockingIOError: another command does
    """
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    path = place.with_name(f".{place.name}.lock")
    while True:
        with open(path, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f"another command changes the index {folder}: wait until it has ended") from error
            if not is_file(path, lock.fileno()):
                continue  # the last holder removed it before this one had it
            try:
                yield place
            finally:
                path.unlink(missing_ok=True)
            return


def is_file(path: Path, handle: int) -> bool:
    """Tells whether an open file is still the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
