"""`retrieval serve` over real sockets: the page, searches, images, and requests that it must refuse."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from running_server import running_server
from small_galleries import TestSet

from priorclip.retrieval import create_server
from priorclip.retrieval.web.guarded_requests import IDLE_SECONDS
from priorclip.retrieval.web.server import SearchServer, render_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    """Serves PNGs, a TIFF that browsers cannot show, and a deleted file. The JSON has markup in its name."""
    folder = tmp_path_factory.mktemp("<b>served")
    files = ["a.png", "b.png", "c.tif", "gone.png"]
    with running_server(test_set, folder, files, label="<script>") as served:
        yield served


def ask(server: SearchServer, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_page_is_whole_and_asks_nothing_of_other_hosts(server: SearchServer) -> None:
    answer, body = ask(server, "/")
    text = body.decode()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert '<input type="search"' in text
    assert "4 images." in text
    assert "&lt;b&gt;served" in text
    assert "<b>served" not in text
    assert "{{" not in text
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text)


def test_the_routes_are_described_for_people_and_programs(server: SearchServer) -> None:
    """Every route is described, and every described address that needs no row is answered."""
    answer, body = ask(server, "/openapi.json")
    assert answer.headers["Content-Type"] == "application/json"
    told = json.loads(body)
    assert told["openapi"] == "3.1.0"
    routes = {route.path for route in server._routes()} - {"/{path:path}"}
    assert set(told["paths"]) == routes
    assert routes >= {"/", "/search", "/image/{row}", "/belief/{row}", "/docs"}
    hit = json.loads(ask(server, "/search?image=0&k=1")[1])["hits"][0]
    items = told["paths"]["/search"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    described = items["properties"]["hits"]["items"]
    assert set(hit) == set(described["properties"])
    assert set(described["required"]) <= set(hit)
    answer, body = ask(server, "/docs")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert all(f"<code>{path}</code>" in body.decode() for path in routes)
    assert "<script" not in body.decode()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", body.decode())


def test_a_text_finds_what_the_index_finds(server: SearchServer) -> None:
    answer, body = ask(server, f"/search?text={quote('a harbour & 3 ships')}&k=3")
    assert answer.status == 200
    found = json.loads(body)
    expected = server.searcher.by_text("a harbour & 3 ships", 3)
    assert found["query"] == {"text": "a harbour & 3 ships"}
    assert [(hit["row"], hit["rank"], hit["label"]) for hit in found["hits"]] == [
        (hit.row, hit.rank, "<script>") for hit in expected
    ]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_an_image_finds_itself(server: SearchServer) -> None:
    for row in range(3):
        hits = json.loads(ask(server, f"/search?image={row}")[1])["hits"]
        assert hits[0]["row"] == row
        assert len(hits) == 4


def test_images_come_as_they_are_or_as_square_jpegs(server: SearchServer) -> None:
    answer, body = ask(server, "/image/1")
    assert answer.headers["Content-Type"] == "image/png"
    assert body == server.searcher.index.read_image(1)
    for path, size in (("/image/1?side=40", (40, 40)), ("/image/2?side=64", (64, 64)), ("/image/2", (58, 48))):
        answer, body = ask(server, path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(body)).size == size
    assert Image.open(io.BytesIO(ask(server, "/image/0?side=99999999")[1])).size == (1024, 1024)


def test_a_belief_map_is_the_image_repainted(server: SearchServer) -> None:
    answer, body = ask(server, "/belief/1?side=64")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/jpeg")
    painted = np.asarray(Image.open(io.BytesIO(body)), dtype=float)
    assert painted.shape == (64, 64, 3)
    assert np.abs(painted - np.asarray(server.searcher.belief(1, 64))).mean() < 8  # the difference of the JPEG
    plain = np.asarray(Image.open(io.BytesIO(ask(server, "/image/1?side=64")[1])), dtype=float)
    assert np.abs(painted - plain).mean() > 20
    assert re.search(r'<label [^>]*><input type="checkbox" id="belief">', ask(server, "/")[1].decode())


def test_a_model_without_prior_has_no_belief_to_show(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hidden><input" not in render_page(server.searcher).decode().replace(" >", ">")
    monkeypatch.setattr(server.searcher.encoder.model, "has_belief", False)
    answer, body = ask(server, "/belief/1")
    assert answer.status == 404
    assert "no scene prior" in json.loads(body)["error"]
    assert "hidden><input" in render_page(server.searcher).decode()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/image/4", 404),
        ("/image/-1", 404),
        ("/image/1/../../set.json", 404),
        ("/../../../../etc/passwd", 404),
        ("/image/%2e%2e%2fset.json", 404),
        ("/index.json", 404),
        ("//etc/passwd", 404),
        ("/search", 400),
        ("/search?text=", 400),
        ("/search?text=a&image=1", 400),
        ("/search?text=" + "x" * 1001, 400),
        ("/search?image=4", 404),
        ("/search?image=../set.json", 400),
        ("/search?text=a&k=many", 400),
        ("/image/3", 410),
        ("/image/3?side=20", 410),
        ("/belief/4", 404),
        ("/belief/1?side=large", 400),
        ("/belief/3", 410),
    ],
)
def test_what_is_not_there_is_refused(server: SearchServer, path: str, status: int) -> None:
    answer, body = ask(server, path)
    assert answer.status == status
    message = json.loads(body)["error"]
    assert "river" not in message
    assert str(server.searcher.index.folder) not in message


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_written(server: SearchServer, method: str) -> None:
    assert ask(server, "/image/0", method)[0].status == 501


def test_head_has_the_length_and_no_body(server: SearchServer) -> None:
    answer, body = ask(server, "/image/0", "HEAD")
    assert (answer.status, body) == (200, b"")
    assert int(answer.headers["Content-Length"]) == len(server.searcher.index.read_image(0))


def test_what_is_no_address_is_refused(server: SearchServer) -> None:
    with socket.create_connection(server.server_address[:2], timeout=30) as connection:
        connection.sendall(b"GET http://[bad/search?text=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_a_browser_that_goes_away_leaves_no_traceback(server: SearchServer, capsys: pytest.CaptureFixture[str]) -> None:
    connection = socket.create_connection(server.server_address[:2], timeout=30)
    at_once = struct.pack("ii", 1, 0)  # closing resets the connection
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    connection.sendall(b"GET /search?text=river HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.close()
    assert ask(server, "/")[0].status == 200  # the other request is answered or in work
    deadline = time.monotonic() + 30
    while server._open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server._open
    assert "Traceback" not in capsys.readouterr().err


def test_many_at_once_get_the_answers_of_one_at_a_time(server: SearchServer) -> None:
    paths = [f"/search?text={quote(f'a river with {n} ships')}" for n in range(6)] + ["/search?image=1", "/image/1"]
    alone = [ask(server, path)[1] for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda path: ask(server, path)[1], paths * 3)) == alone * 3


def test_the_model_is_asked_one_thing_at_a_time(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    encode = server.searcher.encoder.text

    def watched(text: str) -> torch.Tensor:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return encode(text)

    monkeypatch.setattr(server.searcher.encoder, "text", watched)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: ask(server, f"/search?text=ship{n}")[0].status, range(6)))
    assert (answers, most) == ([200] * 6, 1)


def test_closing_ends_the_threads_of_connections_that_are_still_open(server: SearchServer) -> None:
    before = set(threading.enumerate())
    other = create_server(server.searcher)
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    connections = [http.client.HTTPConnection(*other.server_address[:2], timeout=30) for _ in range(3)]
    for connection in connections:
        connection.request("GET", "/image/0")
        connection.getresponse().read()
    assert len(set(threading.enumerate()) - before) >= 2  # one that talks, and those that read images
    started = time.monotonic()
    other.shutdown()
    other.server_close()
    thread.join()
    assert set(threading.enumerate()) <= before
    assert time.monotonic() - started < IDLE_SECONDS / 2
    for connection in connections:
        connection.close()


def test_a_port_in_use_is_an_error_that_says_so(server: SearchServer) -> None:
    with pytest.raises(OSError, match=r"cannot listen on 127.0.0.1:\d+"):
        create_server(server.searcher, port=server.server_address[1])


def test_the_command_serves_until_interrupted(server: SearchServer) -> None:
    words = ["--index", str(server.searcher.index.folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "retrieval", "serve", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.:]+/", line)))
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        connection.request("GET", "/search?image=2&k=1")
        assert json.loads(connection.getresponse().read())["hits"][0]["row"] == 2
        process.send_signal(signal.SIGINT)  # the connection stays open, as in browsers
        assert process.wait(120) == 0  # torch unloads slowly on a busy machine
        connection.close()
    finally:
        process.kill()
        process.wait()
