"""Redirections: they are followed, also with credentials, which reach no other origin and nothing in clear."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_data import SECRET, TAR, open_shards, sample_of
from remote_server import Behaviour, RemoteServer

from priorclip.data_shards import ShardSet
from priorclip.data_shards.remote import http_ranges
from priorclip.data_shards.remote.http_headers import keeps_credentials, parse_count, retry_seconds
from priorclip.data_shards.remote.http_ranges import RemoteError, fetch_range, fetch_version

pytestmark = pytest.mark.usefixtures("quick_retries")
DATA = bytes(range(256)) * 8


class Redirecting(http.server.BaseHTTPRequestHandler):
    """/empty and /body send a redirection to /real; the asked (path, Authorization) pairs are in ``server.asked``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        if self.path != "/real":
            body = b"moved" if self.path == "/body" else b""
            place = self.server.place or "/real"  # type: ignore[attr-defined]
            return self.answer(302, {"Location": place}, body)
        first, last = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
        return self.answer(206, {"Content-Range": f"bytes {first}-{last}/{len(DATA)}"}, DATA[first : last + 1])

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Logs nothing."""


class BothSchemes(http.server.ThreadingHTTPServer):
    """Answers http and https on one port, as the first byte of a connection tells."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Redirecting)
        self.context, self.asked, self.place, self.clear = context, [], "", 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
        if self.context and request.recv(1, socket.MSG_PEEK) == b"\x16":
            request = self.context.wrap_socket(request, server_side=True)
        else:
            self.clear += 1
        super().finish_request(request, client_address)


@pytest.fixture
def plain() -> Iterator[BothSchemes]:
    server = BothSchemes(None)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BothSchemes]:
    """A server with a certificate that this process trusts."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server = BothSchemes(context)
    yield server
    server.shutdown()
    server.server_close()


def read(url: str) -> bytes:
    version = fetch_version(url, 10)
    return b"".join(fetch_range(url, 100, 1000, version, 10))


@pytest.mark.parametrize("path", ["/empty", "/body"])
@pytest.mark.parametrize("user", ["", f"me:{SECRET}@"])
def test_a_redirection_on_the_same_host_is_read(plain: BothSchemes, path: str, user: str) -> None:
    assert read(f"http://{user}127.0.0.1:{plain.server_port}{path}") == DATA[100:1100]
    assert len(plain.asked) == (4 if user else 3), "each request and redirection once; without a password it is kept"
    assert all(bool(sent) == bool(user) for _, sent in plain.asked)


def test_a_redirection_to_http_on_the_same_host_and_port_gets_no_password(secure: BothSchemes) -> None:
    place = f"127.0.0.1:{secure.server_port}"
    secure.place = f"http://{place}/real"
    assert read(f"https://me:{SECRET}@{place}/empty") == DATA[100:1100]
    assert secure.clear
    assert all(sent for path, sent in secure.asked if path == "/empty")
    assert {sent for path, sent in secure.asked if path == "/real"} == {None}


def test_a_redirection_on_the_same_https_origin_keeps_the_password(secure: BothSchemes) -> None:
    assert read(f"https://me:{SECRET}@127.0.0.1:{secure.server_port}/body") == DATA[100:1100]
    assert not secure.clear
    assert all(sent for _, sent in secure.asked)


@pytest.mark.parametrize(
    ("address", "target", "kept"),
    [
        ("https://host/a", "https://HOST:443/b", True),
        ("http://host/a", "http://host:80/b", True),
        ("http://host/a", "https://host/b", True),
        ("https://host/a", "http://host/b", False),
        ("https://host:8443/a", "http://host:8443/b", False),
        ("http://host:8080/a", "https://host:8443/b", False),
        ("https://host/a", "https://host:8443/b", False),
        ("https://host/a", "https://host.evil/b", False),
        ("https://host/a", "https://me@other/b", False),
    ],
)
def test_credentials_stay_with_their_origin(address: str, target: str, kept: bool) -> None:
    assert keeps_credentials(address, target) is kept


@pytest.mark.parametrize(
    "place", ["http://[bad", "http://host:port/", "file:///etc/passwd", "http://host:99999/", "//["]
)
def test_a_redirection_to_no_address_is_an_error_at_once(plain: BothSchemes, place: str) -> None:
    plain.place = place
    with pytest.raises(RemoteError, match="no http"):
        read(f"http://127.0.0.1:{plain.server_port}/empty")
    assert len(plain.asked) == 1


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(
    st.text(max_size=20), st.text("²³٣௧0123456789+-.e _", max_size=30), st.just("9" * 5000),
    st.builds("{}, {} {} {} {}".format, st.sampled_from(["Wed", "x"]), st.integers(), st.sampled_from(["Oct", "²"]),
              st.integers(), st.sampled_from(["07:28:00 GMT", "99:99:99 +9999", "", "²:²:²"])),
))  # fmt: skip
def test_no_text_of_retry_after_is_an_error(text: str) -> None:
    seconds = retry_seconds(text)
    assert seconds is None or seconds >= 0
    count = parse_count(text)
    assert count is None or (text.strip().isascii() and count == int(text))


@pytest.mark.parametrize("header", ["²", "9" * 400, "nan", "-1", "soon", "Wed, 21 Oct 99999 07:28:00 GMT"])
def test_a_server_with_an_odd_retry_after_is_read_all_the_same(
    server: RemoteServer, packed: Path, tmp_path: Path, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_ranges, "LONGEST_PAUSE", 0.01)
    shards = open_shards(f"{server.url}/train/{TAR}", tmp_path)
    server.behaviour = Behaviour(statuses=[(503, {"Retry-After": header.encode().decode("latin-1")})])
    assert sample_of(shards, 4) == sample_of(ShardSet(str(packed)), 24)
