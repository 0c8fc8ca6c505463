"""``pipe:`` shards: what a command prints, fetched whole, once a node, into the cache folder.

    pipe:ssh store cat /data/train-0000.tar  ->  ~/.cache/data_shards/3f2a...-train-0000.tar

A pipe cannot be sought in. The ranks of a node share the copy, which is kept until it is deleted: a lock file makes one
of them fetch while the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from pathlib import Path

from priorclip.data_shards.remote.urls import public_url, safe_file_name

log = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_PAUSE = 1.0  # seconds; doubles after each failed attempt


def fetch_pipe(url: str, cache: str | None = None) -> Path:
    """Local path of what the command prints, fetched if it is not there. Raises OSError after some failed attempts."""
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
                raise OSError("nothing was received")
            os.replace(temporary, path)
            return
        except Exception as error:  # the openers raise whatever their transport does
            if attempt + 1 == ATTEMPTS:
                raise OSError(
                    f"cannot fetch {public_url(url)}: {type(error).__name__}; run the command by hand to see why"
                ) from error
            log.warning("fetching %s failed (%s); trying again", public_url(url), type(error).__name__)
            time.sleep(FIRST_PAUSE * 2**attempt)


def _base_name(url: str) -> str:
    name = url.rstrip("/").split("?")[0].rsplit("/", 1)[-1]
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[-80:]
