"""A real HTTP server on loopback that serves a folder, counts requests, and fails in the ways a test asks for."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from served import served


@dataclass
class Asked:
    """One request, its status and the bytes sent."""

    path: str
    range: str | None
    status: int
    sent: int
    headers: dict[str, str]


@dataclass
class Behaviour:
    """How the server answers. Counters count requests whose path matches ``only``.

    Args:
        ranges: False answers every request with the whole file
        drop_every: every n-th answer is cut short
        drop_after: bytes of the body of such an answer
        statuses: (status, headers) of the next answers; then it serves files
        latency: seconds before an answer
        trickle: seconds between two bytes of a body
        etags: False sends neither ETag nor date
        check: function of (path with query, headers) that returns an error status or None
    """

    ranges: bool = True
    drop_every: int = 0
    drop_after: int = 0
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    latency: float = 0.0
    trickle: float = 0.0
    etags: bool = True
    only: str = r"\.tar$"
    check: Callable[[str, dict[str, str]], int | None] | None = None


class RemoteServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.behaviour, self.asked = folder, Behaviour(), []
        self.lock, self.count, self.busy = threading.Condition(), 0, 0
        self.asked: list[Asked] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def of(self, pattern: str) -> list[Asked]:
        """Returns the requests whose path matches, after the running ones have ended."""
        until = time.monotonic() + 5
        with self.lock:
            while self.busy and time.monotonic() < until:
                self.lock.wait(0.1)
            return [row for row in self.asked if re.search(pattern, row.path)]

    def handle_error(self, request: object, client_address: object) -> None:
        """Prints nothing: clients that hang up are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet for headers and the start of the body: the delayed ACK would cost 40 ms
    server: RemoteServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.busy += 1
        try:
            self.serve()
        finally:
            with self.server.lock:
                self.server.busy -= 1
                self.server.lock.notify_all()

    def serve(self) -> None:
        server, how = self.server, self.server.behaviour
        path = unquote(urlsplit(self.path).path)
        asked = Asked(path, self.headers.get("Range"), 0, 0, {k.lower(): v for k, v in self.headers.items()})
        concerned = bool(re.search(how.only, path))
        with server.lock:
            server.asked.append(asked)
            server.count += concerned
            number = server.count
            planned = how.statuses.pop(0) if concerned and how.statuses else None
        time.sleep(how.latency)
        file = server.folder / path.lstrip("/")
        refused = how.check(self.path, asked.headers) if how.check else None
        if planned or refused or not file.is_file():
            status, headers = planned or (refused or 404, {})
            return self.answer(asked, status, headers, b"<html>no</html>", len(b"<html>no</html>"))
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        headers = {"ETag": etag} if how.etags else {}
        if how.etags and self.headers.get("If-None-Match") == etag:
            return self.answer(asked, 304, headers, b"", 0)
        status = 200
        if asked.range and how.ranges:
            first, last = (int(text) for text in asked.range.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self.answer(asked, 416, {}, b"", 0)
            last = min(last, len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        cut = concerned and how.drop_every and number % how.drop_every == 0
        return self.answer(asked, status, headers, data, min(how.drop_after, len(data)) if cut else len(data))

    def answer(self, asked: Asked, status: int, headers: dict[str, str], body: bytes, sent: int) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        pieces = [body[:sent]]
        if self.server.behaviour.trickle:
            pieces = [body[i : i + 1] for i in range(sent)]
        try:
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                asked.sent += len(piece)
                time.sleep(self.server.behaviour.trickle)
        except OSError:
            self.close_connection = True
        if sent < len(body):
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[RemoteServer]:
    """Serves a folder until the end of the with block."""
    server = RemoteServer(folder)
    with served(server):
        yield server


@contextlib.contextmanager
def noting_server() -> Iterator[tuple[str, list[str]]]:
    """Yields the URL of a server that has nothing, and the paths that it was asked for."""
    paths: list[str] = []

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing)
    with served(server):
        yield f"http://127.0.0.1:{server.server_port}", paths
