"""A rank that has finished leaves only when no thread of gloo still works: it would abort the process at its end."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from priorclip.training.ranks.distributed import gloo_thread_states, wait_for_gloo

PR_SET_NAME = 15  # of prctl.h
ROUNDS = 1_000_000  # of a hash, about half a second without Python's lock


@contextmanager
def gloo_thread(rounds: int) -> Iterator[list[str]]:
    """A thread with the name of gloo's, which works for a while and then sleeps. Yields what it has done."""
    done: list[str] = []
    begun, left = threading.Event(), threading.Event()

    def work() -> None:
        ctypes.CDLL(None).prctl(PR_SET_NAME, b"pt_gloo_runloop")
        begun.set()
        hashlib.pbkdf2_hmac("sha256", b"a tensor", b"of a collective", rounds)
        done.append("worked")
        left.wait()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield done
    finally:
        left.set()
        thread.join()


def test_it_waits_until_the_thread_sleeps() -> None:
    with gloo_thread(ROUNDS) as done:
        wait_for_gloo()
        assert done == ["worked"]
        assert list(gloo_thread_states()) == ["S"]


def test_it_does_not_wait_for_ever() -> None:
    with gloo_thread(4 * ROUNDS) as done:
        wait_for_gloo(limit_seconds=0.05)
        assert done == []
