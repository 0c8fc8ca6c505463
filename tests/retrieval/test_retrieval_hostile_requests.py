"""`retrieval serve` against requests of other sites, of broken programs and of slow ones."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import socket
import statistics
import threading
import time
from collections.abc import Iterator

import pytest
from running_server import running_server
from small_galleries import TestSet

from priorclip.retrieval.web import guarded_requests
from priorclip.retrieval.web.guarded_requests import allowed_names
from priorclip.retrieval.web.server import SearchServer

ESCAPE = "\x1b[31m\x9b31m\u202e"


@pytest.fixture(scope="module")
def server(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    """Serves one image and one that is gone; it may be asked as search.lab too."""
    folder = tmp_path_factory.mktemp("served")
    with running_server(test_set, folder, ["a.png", "gone.png"], names=["search.lab"]) as served:
        yield served


def send(server: SearchServer, text: str | bytes, seconds: float = 10) -> bytes:
    """Sends bytes as they are, and returns everything until the server closes or is silent for ``seconds``."""
    with socket.create_connection(server.server_address[:2], timeout=seconds) as connection:
        connection.sendall(text.encode("latin-1") if isinstance(text, str) else text)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except TimeoutError:
            pass
        return found


def status(answer: bytes) -> int:
    return int(answer.split()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:99", "localhost:8008", "[::1]:80", "LOCALHOST.", "search.lab",
                                  "a.localhost", "10.0.0.7", socket.gethostname()])  # fmt: skip
def test_our_own_names_are_answered(server: SearchServer, host: str) -> None:
    assert status(send(server, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")) == 200


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ("Host: evil.example", 421),
        ("Host: evil.example:8008", 421),
        ("Host: localhost.evil.example", 421),
        ("Host: 127.0.0.1.evil.example", 421),
        ("Host: localhost@evil.example", 400),
        ("Host: localhost\r\nHost: evil.example", 400),
        ("Host: local host", 400),
        ("Host: localhost:port", 400),
        ("Host:", 400),
        ("X: y", 400),
    ],
)
@pytest.mark.parametrize("path", ["/", "/search?image=0", "/image/0"])
def test_a_foreign_host_gets_nothing(server: SearchServer, head: str, code: int, path: str) -> None:
    answer = send(server, f"GET {path} HTTP/1.1\r\n{head}\r\n\r\n")
    assert status(answer) == code
    assert b"hits" not in answer
    assert b"<html" not in answer


def test_a_foreign_host_in_the_target_gets_nothing(server: SearchServer) -> None:
    assert status(send(server, "GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n")) == 421
    assert allowed_names("0.0.0.0", ["Lab."]) >= {"localhost", "lab", socket.gethostname().lower()}


INNER = "GET /image/0 HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        f"Content-Length: {len(INNER)}",
        f"Content-Length: 0\r\nContent-Length: {len(INNER)}",
        f"content-length : {len(INNER)}",
        f"X\r\nContent-Length: {len(INNER)}",
        "Content-Length: +0",
        "Content-Length: many",
        "Transfer-Encoding: chunked",
        f"Expect: 100-continue\r\nContent-Length: {len(INNER)}",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_a_body_is_not_taken_for_the_next_request(server: SearchServer, headers: str, method: str) -> None:
    answer = send(server, f"{method} / HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n{INNER}")
    assert status(answer) == (501 if method == "POST" else 400)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in answer


def test_two_requests_without_bodies_on_one_connection_are_answered(server: SearchServer) -> None:
    last = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert send(server, INNER + last).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("place", ["/image/1?side=20&", "/image/1?", "/nothing"])
def test_escapes_of_a_request_do_not_reach_the_log(
    server: SearchServer, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    caplog.set_level(logging.DEBUG, "priorclip")
    handler = logging.StreamHandler(stream := io.StringIO())  # of a program that knows nothing of us
    logging.getLogger().addHandler(handler)
    try:
        target = f"{place}{ESCAPE}\rERROR".encode()
        send(server, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    finally:
        logging.getLogger().removeHandler(handler)
    assert place.rstrip("&?") in stream.getvalue()
    for letter in "\x1b\x9b\u202e\r":
        assert letter not in stream.getvalue()


def test_slow_headers_hold_no_thread(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_requests, "HEAD_SECONDS", 1.0)
    before = set(threading.enumerate())
    started = time.monotonic()
    with socket.create_connection(server.server_address[:2], timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 20:
                connection.sendall(b"X")
                time.sleep(0.2)
    assert time.monotonic() - started < 10
    while set(threading.enumerate()) - before and time.monotonic() - started < 10:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


def test_a_client_that_does_not_read_is_dropped(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks on and on over one connection, so that answers wait in the server. Idle clients are dropped as well."""
    monkeypatch.setattr(guarded_requests, "IDLE_SECONDS", 1.0)
    with (
        socket.create_connection(server.server_address[:2], timeout=20) as greedy,
        socket.create_connection(server.server_address[:2], timeout=20) as idle,
    ):
        with contextlib.suppress(OSError):
            for _ in range(100):
                greedy.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        with contextlib.suppress(ConnectionResetError):
            assert idle.recv(1) == b""
        deadline = time.monotonic() + 20
        while server._open and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not server._open


def test_a_body_that_breaks_after_its_head_leaves_no_traceback(
    server: SearchServer, caplog: pytest.LogCaptureFixture
) -> None:
    head = "GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = send(server, f"{head}no size\r\n{INNER}")
    assert status(answer) == 400
    assert answer.count(b"HTTP/1.1 ") == 1
    assert send(server, INNER.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")).count(b"HTTP/1.1 200") == 1
    assert not [record for record in caplog.records if record.exc_info]


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head(server: SearchServer) -> None:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    seconds = []
    for _ in range(21):
        started = time.perf_counter()
        connection.request("GET", "/")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - started)
    connection.close()
    assert statistics.median(seconds) < 0.03, "Nagle's algorithm costs 0.04 s"


def test_many_connections_at_the_same_moment_are_all_answered(server: SearchServer) -> None:
    start, answered = threading.Barrier(200), []

    def one() -> None:
        start.wait(30)
        answer = send(server, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 30)
        answered.append(status(answer))

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answered == [200] * 200
