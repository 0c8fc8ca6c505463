"""What a request must be before the search server answers it. Any web page and any program can send one.

    a name in Host: that is not ours     421: a page of another site reached us by a name of its own (DNS rebinding)
    a body, or headers that are broken   400, and the connection ends: their rest would be read as the next request
    another method than GET and HEAD     501, and the connection ends; except POST to the paths in ``BODIES``
    a POST that is no JSON               415, and the connection ends: a page of another site may send forms and text,
                                         but no JSON, because the browser asks us first and gets 501
    a POST of unknown or large size      411 or 413, and the connection ends
    a head or a body that takes too long the connection ends after ``HEAD_SECONDS``, however it trickles
    a client that does not read          the connection ends after ``IDLE_SECONDS``

Allowed names are addresses in digits, localhost, the name of this machine, the host that the server listens on, and
those that the user adds. An address in digits is safe, because only a name can be pointed elsewhere.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from priorclip.common.output import get_logger

log = get_logger(__name__)

METHODS = ("GET", "HEAD")
BODIES = ("/search",)  # paths that take POST with a JSON body
MOST_BODY = 1 << 20  # bytes
IDLE_SECONDS = 30.0  # between two requests of a connection
HEAD_SECONDS = 20.0  # for request line and headers, from their first byte
LOGGED = 300  # bytes of a malformed request that the log shows


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


class Guard:
    """Lets requests that may be answered through to ``app``, and refuses the others.

    Args:
        app: an ASGI application
        names: under which it may be asked, lower-case
        headers: of a refusal
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], headers: dict[str, str]) -> None:
        self.app, self.names, self.headers = app, names, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        target = (scope["raw_path"] + b"?" + scope["query_string"]).decode("latin-1").removesuffix("?")
        log.debug("%s asks %s %s", scope["client"], scope["method"], target)

        async def send_titled(message: Message) -> None:
            """Sends header names as programs write them that do not know that their case is free."""
            if message["type"] == "http.response.start":
                message = {**message, "headers": [(name.title(), value) for name, value in message["headers"]]}
            await send(message)

        try:
            check_request(scope, self.names)
        except RefusedRequest as error:
            headers = {**self.headers, "Cache-Control": "no-store", "Connection": "close"}
            await JSONResponse({"error": str(error)}, error.status, headers)(scope, receive, send_titled)
            return
        await self.app(scope, receive, send_titled)


def check_request(scope: Scope, names: frozenset[str]) -> None:
    """Checks method, body and host, and reduces a target such as ``http://host/path`` to its path.

    Raises:
        RefusedRequest: the request must not be answered
    """
    posts = scope["method"] == "POST"
    if not is_answered(scope["method"], scope["path"]):
        raise RefusedRequest("this server only reads: it answers GET and HEAD", HTTPStatus.NOT_IMPLEMENTED)
    headers = [(name, value.decode("latin-1").strip()) for name, value in scope["headers"]]
    if posts:
        check_body(headers)
    lengths = [value for name, value in headers if name == b"content-length"]
    has_body = any(name == b"transfer-encoding" for name, _ in headers) or any(length != "0" for length in lengths)
    if has_body and not posts:
        raise RefusedRequest("a request with a body is not answered")
    places = [value for name, value in headers if name == b"host"]
    if len(places) != 1:
        raise RefusedRequest("a request needs one Host header")
    check_host(places[0], names)
    target = scope["raw_path"].decode("latin-1")
    if not target.startswith("/"):
        try:
            parts = urlsplit(target)
        except ValueError as error:
            raise RefusedRequest("the address is malformed") from error
        check_host(parts.netloc, names)
        scope["path"] = unquote(parts.path)


def is_answered(method: str, path: str) -> bool:
    """Tells whether this server has an answer to such requests at all."""
    return method in METHODS or (method == "POST" and path in BODIES)


def check_body(headers: list[tuple[bytes, str]]) -> None:
    """Checks the headers of a request with a body: JSON of a known length.

    Raises:
        RefusedRequest: it has another type, no length, or too many bytes
    """
    kinds = [value.partition(";")[0].strip().lower() for name, value in headers if name == b"content-type"]
    if kinds != ["application/json"]:
        raise RefusedRequest("a POST takes Content-Type: application/json", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    lengths = [value for name, value in headers if name == b"content-length"]
    if any(name == b"transfer-encoding" for name, _ in headers) or len(lengths) != 1:
        raise RefusedRequest("a POST needs one Content-Length, and no Transfer-Encoding", HTTPStatus.LENGTH_REQUIRED)
    if not re.fullmatch(r"\d{1,19}", lengths[0], re.ASCII):
        raise RefusedRequest("the Content-Length is malformed")
    if int(lengths[0]) > MOST_BODY:
        raise RefusedRequest(f"a body has at most {MOST_BODY} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


class GuardedProtocol(H11Protocol):
    """One connection of uvicorn, with limits for clients that are silent, slow, or do not read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._begun = b""  # the first bytes of a head that is not complete yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Otherwise each answer waits some 40 ms for the client's acknowledgement. asyncio does not set it for ours.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._set_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_after(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        begins = not self._is_busy() and not self._begun
        if begins:
            self._begun = data[:LOGGED]
        super().data_received(data)
        if self._is_busy():
            self._begun = b""
        if begins or self._is_busy():
            self._set_limit()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which may begin the answer to the next request
        if not self.transport.is_closing():
            self._begun = b"" if self._is_busy() else self.conn.trailing_data[0][:LOGGED]
            self._set_limit()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_after(IDLE_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_limit()

    def send_400_response(self, msg: str) -> None:
        """Refuses a malformed head or body, with the status of the method if that is not answered at all."""
        log.debug("%s sent a malformed request: %s", self.client, self._begun.decode("latin-1"))
        method, _, rest = self._begun.decode("latin-1").partition(" ")
        path = rest.partition(" ")[0]
        status = HTTPStatus.BAD_REQUEST
        if self.cycle is not None:
            if self.cycle.response_started and not self.cycle.response_complete:
                self.transport.abort()
                return
            method, path = self.scope["method"], self.scope["path"]
            self.cycle.disconnected = True  # its answer would be written after this one
        if re.fullmatch("[A-Z]+", method) and not is_answered(method, path):
            status = HTTPStatus.NOT_IMPLEMENTED
        body = b"" if method == "HEAD" else b'{"error": "the request is malformed"}'
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _is_busy(self) -> bool:
        """Tells whether an answer is being made or sent."""
        return self.cycle is not None and not self.cycle.response_complete

    def _set_limit(self) -> None:
        """Sets how long the connection may stay as it is. The limit of a client that does not read stays."""
        if not self.flow.write_paused:
            self._end_after(None if self._is_busy() else HEAD_SECONDS if self._begun else IDLE_SECONDS)

    def _end_after(self, seconds: float | None) -> None:
        """Ends the connection after some seconds, if nothing else sets the limit anew; None takes the limit away."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
