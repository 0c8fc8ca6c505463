"""Waiting for a key in torch's store without blocking the other threads of this process."""

from __future__ import annotations

import threading
import time
from typing import Any

POLL_SECONDS = 0.05


def wait_for_key(store: Any, key: str, leaving: threading.Event | None = None) -> str:
    """Returns the value when it is there.

    It asks repeatedly, because the store's own wait blocks all threads of this process.

    Raises:
        RuntimeError: ``leaving`` is set, because the process ends
    """
    while not store.check([key]):
        if leaving and leaving.is_set():
            raise RuntimeError("the process ends")
        time.sleep(POLL_SECONDS)
    return store.get(key).decode()
