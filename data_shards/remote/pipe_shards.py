"""``pipe:`` shards: the output of a command, fetched whole into the cache folder, once on each node.

    pipe:ssh store cat /data/train-0000.tar  ->  ~/.cache/data_shards/3f2a...-train-0000.tar

A pipe has no random access. The ranks of a node share the copy: a lock file makes one of them fetch while the others
wait. A command that prints nothing for ``data.timeout`` seconds is ended, with all that it started, and tried again.
Nothing deletes the copy. Only the command line and the configuration may name a ``pipe:``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from priorclip.common.output import get_logger
from priorclip.data_shards.remote.urls import public_url, safe_file_name

log = get_logger(__name__)

ATTEMPTS = 4
FIRST_PAUSE = 1.0  # seconds; doubles after each failed attempt
PIECE = 1 << 20
READER_STOPPED = 141  # exit code of a shell whose command was ended because nobody read on


def fetch_pipe(url: str, cache: str | None = None, timeout: float = 60.0) -> Path:
    """Returns the local copy of the command's output, fetched if missing.

    Args:
        url: ``pipe:COMMAND``, for the shell
        cache: folder of the copies; None is ~/.cache/data_shards
        timeout: seconds without output after which the command is ended

    Raises:
        OSError: the command failed, was silent or printed nothing, ATTEMPTS times
    """
    folder = Path(cache or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = folder if cache else folder / "data_shards"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe_file_name(url)}"
    if path.exists():
        return path
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _fetch(url, path, timeout)
    return path


def _fetch(url: str, path: Path, timeout: float) -> None:
    temporary = path.with_name(path.name + ".tmp")
    for attempt in range(ATTEMPTS):
        try:
            with open(temporary, "wb") as target:
                copy_output(url.removeprefix("pipe:"), target, timeout)
                target.flush()
                os.fsync(target.fileno())
            if temporary.stat().st_size == 0:
                raise OSError("the command printed nothing")
            os.replace(temporary, path)
            return
        except OSError as error:
            why = f"{error.strerror or error}"
            if attempt + 1 == ATTEMPTS:
                message = f"cannot fetch {public_url(url)}: {why}; run the command by hand to see why"
                raise OSError(message) from error
            log.warning("fetching %s failed (%s); retrying", public_url(url), why)
            time.sleep(FIRST_PAUSE * 2**attempt)


def copy_output(command: str, target: IO[bytes], timeout: float) -> None:
    """Runs a shell command and copies what it prints.

    Raises:
        TimeoutError: it printed nothing for ``timeout`` seconds
        OSError: it ended with another exit code than 0
    """
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            while piece := read_piece(process.stdout, timeout):
                target.write(piece)
            code = process.wait(timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):  # the shell may have ended while what it started goes on
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
                raise TimeoutError(f"the command was silent for {timeout:g} seconds (data.timeout)") from None
            raise
    if code not in (0, READER_STOPPED):
        raise OSError(f"the command ended with exit code {code}")


def read_piece(output: IO[bytes], timeout: float) -> bytes:
    """Returns what the command has printed since, b"" at its end. Raises TimeoutError."""
    ready, _, _ = select.select([output], [], [], timeout)
    if not ready:
        raise TimeoutError
    return os.read(output.fileno(), PIECE)
