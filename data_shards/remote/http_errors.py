"""The errors of requests for remote files, and how they are worded: without URLs, which may hold secrets."""

from __future__ import annotations

from collections.abc import Iterator

import urllib3

SILENCE = "timeout"  # starts the text of an attempt that took all its time


class RemoteError(OSError):
    """A remote file that cannot be read. ``reason`` is a phrase that is counted; the text has no secrets."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Transient(Exception):
    """A failed attempt that may be repeated, after ``pause`` seconds if the server asks for it."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause, self.is_silence = pause, text.startswith(SILENCE)


def at_most(most: int, pieces: Iterator[bytes], shown: str) -> Iterator[bytes]:
    """Yields the pieces of a body. Raises RemoteError as soon as they have more than ``most`` bytes together."""
    for piece in pieces:
        most -= len(piece)
        if most < 0:
            raise RemoteError("remote cannot be read", f"{shown} is larger than a file of its kind can be")
        yield piece


def describe_error(error: BaseException) -> str:
    """Describes an error without the URL that urllib3 puts in its texts."""
    cause = error.__cause__ or error.__context__ or error
    kinds = {
        urllib3.exceptions.NameResolutionError: "the host name is unknown",
        urllib3.exceptions.NewConnectionError: "no connection (refused, or the host cannot be reached)",
        urllib3.exceptions.TimeoutError: SILENCE,
        urllib3.exceptions.SSLError: "TLS failed: is the certificate valid here? SSL_CERT_FILE adds authorities",
        urllib3.exceptions.ProxyError: "the proxy cannot be reached",
        urllib3.exceptions.IncompleteRead: "the body was cut short",
    }
    for kind, text in kinds.items():
        if isinstance(error, kind):
            return text
    return f"the connection broke ({type(cause).__name__})"
