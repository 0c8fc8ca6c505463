"""``pipe:`` shards: the output of a command, fetched whole into the cache folder, once on each node.

    pipe:ssh store cat /data/train-0000.tar  ->  ~/.cache/data_shards/3f2a...-train-0000.tar

A pipe has no random access. The ranks of a node share the copy: a lock file makes one of them fetch while the others
wait. Nothing deletes the copy. Only the command line and the configuration may name a ``pipe:``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path

from priorclip.common.output import get_logger
from priorclip.data_shards.remote.urls import public_url, safe_file_name

log = get_logger(__name__)

ATTEMPTS = 4
FIRST_PAUSE = 1.0  # seconds; doubles after each failed attempt


def fetch_pipe(url: str, cache: str | None = None) -> Path:
    """Returns the local copy of the command's output, fetched if missing. Raises OSError after ATTEMPTS failures."""
    folder = Path(cache or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = folder if cache else folder / "data_shards"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe_file_name(url)}"
    if path.exists():
        return path
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _fetch(url, path)
    return path


def _fetch(url: str, path: Path) -> None:
    from webdataset.gopen import gopen

    temporary = path.with_name(path.name + ".tmp")
    for attempt in range(ATTEMPTS):
        try:
            with gopen(url, "rb") as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
            if temporary.stat().st_size == 0:
                raise OSError("the command printed nothing")
            os.replace(temporary, path)
            return
        except Exception as error:  # webdataset raises many types of errors
            if attempt + 1 == ATTEMPTS:
                raise OSError(
                    f"cannot fetch {public_url(url)}: {type(error).__name__}; run the command by hand to see why"
                ) from error
            log.warning("fetching %s failed (%s); retrying", public_url(url), type(error).__name__)
            time.sleep(FIRST_PAUSE * 2**attempt)
