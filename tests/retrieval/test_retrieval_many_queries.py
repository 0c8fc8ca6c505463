"""POST /search with a list of texts: the answers of single searches, and requests that it must refuse."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from running_server import running_server, serving
from small_galleries import TestSet

from priorclip.retrieval import Searcher
from priorclip.retrieval.indexing.cell_training import make_cells
from priorclip.retrieval.web import guarded_requests, server
from priorclip.retrieval.web.server import MOST_WAITING, SearchServer

TEXTS = ["a river", "two ships", '  a río, "wide"  ', "a river"]


@pytest.fixture(scope="module")
def served(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    names = [f"{name}.png" for name in ("a", "b", "c", "gone")]
    with running_server(test_set, tmp_path_factory.mktemp("served"), names) as found:
        yield found


@pytest.fixture
def connection(served: SearchServer) -> Iterator[http.client.HTTPConnection]:
    found = http.client.HTTPConnection(*served.server_address[:2], timeout=30)
    yield found
    found.close()


def post(url: str, body: object) -> Any:
    """Asks as a program does that uses Python's own client."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}search", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def get(url: str, query: str) -> Any:
    with urllib.request.urlopen(f"{url}search?{query}", timeout=60) as answer:
        return json.load(answer)


def refused(connection: http.client.HTTPConnection, body: object, **headers: str) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/search", data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())["error"]


def test_each_text_is_answered_in_its_place(served: SearchServer) -> None:
    found = post(served.url, {"queries": TEXTS, "k": 3})
    assert found["search"] == "exact"
    assert [answer["query"]["text"] for answer in found["answers"]] == [text.strip() for text in TEXTS]
    for text, answer in zip(TEXTS, found["answers"], strict=True):
        hits = served.searcher.by_text(text, 3)
        assert [(hit["rank"], hit["row"], hit["key"]) for hit in answer["hits"]] == [
            (hit.rank, hit.row, hit.key) for hit in hits
        ]
        assert [hit["score"] for hit in answer["hits"]] == pytest.approx([hit.score for hit in hits], abs=2e-6)
    assert len(post(served.url, {"queries": ["a"] * 256, "k": 999})["answers"]) == 256


def test_a_connection_goes_on_after_a_post(connection: http.client.HTTPConnection) -> None:
    for _ in range(2):
        connection.request(
            "POST", "/search", b'{"queries": ["a"]}', {"Content-Type": "application/json; charset=utf-8"}
        )
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert len(json.loads(answer.read())["answers"]) == 1
        connection.request("GET", "/image/0")
        assert connection.getresponse().read()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        ([], "the body must be a JSON object"),
        ({}, "lacks 'queries'"),
        ({"queries": "a"}, "'queries' must be a list"),
        ({"queries": []}, "'queries' must have 1 to 256 texts"),
        ({"queries": ["a"] * 257}, "'queries' must have 1 to 256 texts"),
        ({"queries": ["a", 1]}, "'queries', item 2 must be text"),
        ({"queries": ["a", " "]}, "a text must have 1 to 1000 characters"),
        ({"queries": ["a" * 1001]}, "a text must have 1 to 1000 characters"),
        ({"queries": ["a"], "k": 0}, "'k' must be a whole number from 1"),
        ({"queries": ["a"], "k": True}, "'k' must be a whole number"),
        ({"queries": ["a"], "exact": "yes"}, "'exact' must be true or false"),
        ({"queries": ["a"], "bbox": "1,2,3,4"}, "this index has no places"),
        ({"queries": ["a"], "bbox": "north"}, "bbox must be WEST,SOUTH,EAST,NORTH"),
        ({"queries": ["a"], "folder": "/"}, "unknown field"),
    ],
)
def test_a_body_that_is_no_list_of_texts_is_refused(
    connection: http.client.HTTPConnection, body: object, message: str
) -> None:
    status, said = refused(connection, body)
    assert status == 400
    assert message in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: text/plain\r\nContent-Length: 18", 415),
        ("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 18", 415),
        ("Content-Length: 18", 415),
        ("Content-Type: application/json\r\nContent-Type: text/plain\r\nContent-Length: 18", 415),
        ("Content-Type: application/json", 411),
        ("Content-Type: application/json\r\nTransfer-Encoding: chunked", 400),
        ("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0", 411),
        ("Content-Type: application/json\r\nContent-Length: 1048577", 413),
        ("Content-Type: application/json\r\nContent-Length: 99999999999999999", 413),
        ("Content-Type: application/json\r\nContent-Length: +18", 400),
        ("Content-Type: application/json\r\nContent-Length: 18\r\nContent-Length: 2", 400),
        ("Content-Type: application/json\r\nContent-Length: 18\r\nHost: evil.example", 400),
    ],
)
def test_other_requests_with_a_body_end_the_connection(served: SearchServer, headers: str, status: int) -> None:
    """A page of another site can send forms and text. The rest is never read as the next request."""
    inner = "GET /image/0 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer = send(
        served, f"POST /search HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n\r\n" + '{"queries": ["a"]}' + inner
    )
    assert int(answer.split()[1]) == status
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in answer
    assert b"hits" not in answer


def test_a_foreign_host_and_other_paths_get_nothing(served: SearchServer) -> None:
    rest = 'Content-Type: application/json\r\nContent-Length: 18\r\n\r\n{"queries": ["a"]}'
    assert b" 421 " in send(served, f"POST /search HTTP/1.1\r\nHost: evil.example\r\n{rest}")[:20]
    for path in ("/", "/image/0", "/search/", "/docs", "//search"):
        assert b" 501 " in send(served, f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{rest}")[:20]
    assert b" 501 " in send(served, "OPTIONS /search HTTP/1.1\r\nHost: localhost\r\n\r\n")[:20]


def send(served: SearchServer, text: str) -> bytes:
    """Sends bytes as they are, and returns everything until the server closes."""
    with socket.create_connection(served.server_address[:2], timeout=10) as connection:
        connection.sendall(text.encode())
        found = b""
        while piece := connection.recv(65536):
            found += piece
        return found


def test_a_body_that_trickles_is_given_up(served: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (server, guarded_requests):
        monkeypatch.setattr(module, "HEAD_SECONDS", 0.5)
    started = time.monotonic()
    answer = send(
        served,
        "POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
    )
    assert b" 408 " in answer[:20]
    assert b"Connection: close" in answer
    assert time.monotonic() - started < 8
    assert post(served.url, {"queries": ["a"]})["answers"]


def test_lists_that_wait_are_limited_and_single_searches_go_on(
    served: SearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    by_texts = Searcher.by_texts

    def waiting(*args: Any) -> Any:
        assert go_on.wait(60)
        return by_texts(*args)

    monkeypatch.setattr(Searcher, "by_texts", waiting)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(len(post(served.url, {"queries": ["a", "b"]})["answers"])))
        for _ in range(MOST_WAITING)
    ]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while served._waiting < MOST_WAITING and time.monotonic() < deadline:
            time.sleep(0.01)
        connection = http.client.HTTPConnection(*served.server_address[:2], timeout=30)
        status, said = refused(connection, {"queries": ["a"]})
        assert (status, said) == (503, "too many lists of queries wait: ask again later")
        assert get(served.url, "text=river&k=1")["hits"]
    finally:
        go_on.set()
        for thread in threads:
            thread.join(60)
    assert answers == [2] * MOST_WAITING
    assert post(served.url, {"queries": ["a"]})["answers"]


def test_places_limit_all_texts(placed_searcher: Searcher) -> None:
    with serving(placed_searcher) as placed:
        found = post(placed.url, {"queries": ["a river", "a road"], "scene": "fiji.tif", "bbox": None, "k": 99})
    for answer, text in zip(found["answers"], ("a river", "a road"), strict=True):
        assert {hit["place"]["scene"] for hit in answer["hits"]} == {"fiji.tif"}
        assert [hit["score"] for hit in answer["hits"]] == sorted(
            (hit["score"] for hit in answer["hits"]), reverse=True
        )
        alone = [hit.key for hit in placed_searcher.by_text(text, 99) if hit.place["scene"] == "fiji.tif"]
        assert [hit["key"] for hit in answer["hits"]] == alone


def test_the_server_says_which_search_it_was(served: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    index = served.searcher.index
    monkeypatch.setattr(index, "cells", make_cells(index.embeddings, None, "", 1.0))
    said = {"search": "approximate", "recall_at_10": 1.0}
    assert said.items() <= get(served.url, "text=river").items()
    assert said.items() <= get(served.url, "image=1&format=geojson").items()
    assert said.items() <= post(served.url, {"queries": ["river"]}).items()
    for exact in (get(served.url, "text=river&exact=true"), post(served.url, {"queries": ["river"], "exact": True})):
        assert exact["search"] == "exact"
        assert "recall_at_10" not in exact
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get(served.url, "text=river&exact=1")


def test_the_description_has_the_route(served: SearchServer) -> None:
    with urllib.request.urlopen(f"{served.url}openapi.json") as answer:
        route = json.load(answer)["paths"]["/search"]["post"]
    schema = route["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"queries", "k", "exact", "bbox", "time", "scene"}
    assert {"200", "400", "408", "411", "413", "415", "421", "503"} <= set(route["responses"])
    with urllib.request.urlopen(f"{served.url}docs") as answer:
        page = answer.read().decode()
    assert "POST /search" in page
    assert "the Content-Type is not application/json" in page
