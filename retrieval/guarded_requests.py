"""What a request must be before the search server answers it. Any web page and any program can send one.

    a name in Host: that is not ours     421: a page of another site reached us by a name of its own (DNS rebinding)
    a body, or headers that are broken   400, and the connection ends: their rest would be read as the next request
    a head that takes too long           the connection ends after ``HEAD_SECONDS``, however it trickles

Allowed names are addresses in digits, localhost, the name of this machine, the host that the server listens on, and
those that the user adds. An address in digits is safe, because only a name can be pointed elsewhere.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

IDLE_SECONDS = 30.0  # between two requests of a connection
HEAD_SECONDS = 20.0  # for request line and headers, from their first byte


class RefusedRequest(ValueError):
    """A request that is not answered; the connection ends."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


def allowed_names(host: str, more: Iterable[str] = ()) -> frozenset[str]:
    """Returns the lower-case names under which a server that listens on ``host`` may be asked."""
    machine = socket.gethostname()
    return frozenset(name.lower().rstrip(".") for name in ("localhost", machine, socket.getfqdn(), host, *more) if name)


def check_host(place: str, names: frozenset[str]) -> None:
    """Checks ``HOST`` or ``HOST:PORT`` of a request. The port is free, because a tunnel may change it.

    Raises:
        RefusedRequest: it is malformed, or names a host that is not ours
    """
    try:
        parts = urlsplit(f"//{place}")
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        host = ""
    if not host or not re.fullmatch(r"[\w.:\[\]-]+", place, re.ASCII):
        raise RefusedRequest("the Host header is malformed")
    if host not in names and not host.endswith(".localhost") and not is_address(host):
        raise RefusedRequest(
            "this server has another name: ask it by its address, or add the name by --names", HTTPStatus(421)
        )


def is_address(host: str) -> bool:
    """Tells whether the host is an IP address in digits."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class TimedReader(io.RawIOBase):
    """Reads a socket. Once ``begin`` was called, all reads together end ``HEAD_SECONDS`` after the first byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._until = connection, 0.0
        self._is_waiting = True

    def begin(self) -> None:
        """A new request may come; until its first byte the connection is idle."""
        self._is_waiting = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        left = IDLE_SECONDS if self._is_waiting else self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request comes too slowly")
        self._socket.settimeout(left)
        count = self._socket.recv_into(buffer)
        self._socket.settimeout(IDLE_SECONDS)  # for the answer
        if self._is_waiting:
            self._is_waiting, self._until = False, time.monotonic() + HEAD_SECONDS
        return count


class GuardedHandler(BaseHTTPRequestHandler):
    """One connection. A sub-class answers requests that passed ``check_request``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits some 40 ms for the client's delayed acknowledgement
    timeout = IDLE_SECONDS
    names: frozenset[str] = frozenset()

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        if not self.rfile.peek(1):  # type: ignore[attr-defined]
            self.close_connection = True  # the client has closed it
            return
        super().handle_one_request()
        self.reader.begin()

    def handle(self) -> None:
        try:
            super().handle()
        except TimeoutError:  # idle, or slow: nobody waits for an answer
            self.close_connection = True

    def handle_expect_100(self) -> bool:
        """Invites no body, because none is read."""
        return True

    def check_request(self) -> None:
        """Raises RefusedRequest, and lets the connection end, for a request that must not be answered."""
        try:
            self.check_body()
            self.check_names()
        except RefusedRequest:
            self.close_connection = True
            raise

    def check_body(self) -> None:
        """Refuses a body and broken headers, which may hide one."""
        headers = self.headers
        lengths = headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in headers or any(length.strip() != "0" for length in lengths):
            raise RefusedRequest("a request with a body is not answered")
        if headers.defects or headers.get_payload():
            raise RefusedRequest("the headers are malformed")

    def check_names(self) -> None:
        """Refuses a host that is not ours in Host:, or in a target such as ``GET http://host/``."""
        places = self.headers.get_all("Host", [])
        if len(places) != 1:
            raise RefusedRequest("a request needs one Host header")
        check_host(places[0].strip(), self.names)
        if not self.path.startswith("/"):
            try:
                target = urlsplit(self.path).netloc
            except ValueError as error:
                raise RefusedRequest("the address is malformed") from error
            check_host(target, self.names)
