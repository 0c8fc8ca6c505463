"""Serves a search page for an index: the standard library's HTTP server, one HTML page, no external resources.

    GET /                           the page; /?text=river and /?image=12 are its bookmarks
    GET /search?text=river&k=24     {"query", "hits": [{"rank", "score", "row", "key", "label", "where"}]}
    GET /search?image=12&k=24       the same, by an image of the index
    GET /image/12?side=320          the centred square of image 12 as a JPEG; without side the whole image
    GET /belief/12?side=320         the square under the belief map, which shows where the scene prior looks

The server only reads. A request names an image by its row and never by a path. guarded_requests.py says which requests
it answers.
"""

from __future__ import annotations

import html
import io
import json
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from priorclip.common.output import get_logger
from priorclip.common.safe_paths import UnsafePath
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.images.decode import open_image, upright_rgb
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.retrieval.guarded_requests import GuardedHandler, RefusedRequest, allowed_names
from priorclip.retrieval.places import Within
from priorclip.retrieval.search import Searcher

log = get_logger(__name__)

HITS, MOST_HITS = 24, 200
LONGEST_TEXT = 1000
MOST_PIXELS_A_SIDE = 1024
BELIEF_SIDE = 320
JPEG_QUALITY = 88
BROWSER_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
WAITING_CONNECTIONS = 1024  # that connect at the same moment; the kernel drops the others
POLICY = {
    "default-src": "'none'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "style-src": "'unsafe-inline'",
    "script-src": "'unsafe-inline'",
    "base-uri": "'none'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class BadRequest(ValueError):
    """A request for something that does not exist or is not allowed."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


class SearchServer(ThreadingHTTPServer):
    """Serves one Searcher, with a thread for each connection.

    The server joins the threads at the end, because Python aborts if a thread ends inside torch. An idle connection of
    a browser would keep its thread, so the server first closes open connections for reading.
    """

    daemon_threads = False
    request_queue_size = WAITING_CONNECTIONS

    def __init__(self, address: tuple[str, int], searcher: Searcher, names: Sequence[str] = ()) -> None:
        self.searcher = searcher
        self.names = allowed_names(address[0], names)
        self.page = render_page(searcher)
        self._open: set[Any] = set()
        self._warned = False
        super().__init__(address, RequestHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect before their answer."""
        if isinstance(sys.exception(), ConnectionError):
            log.debug("%s disconnected", client_address)
        else:
            log.exception("a request of %s failed", client_address)

    def warn_of_place(self, error: UnsafePath) -> None:
        """Logs the first image that the server may not read."""
        if not self._warned:
            log.warning("%s. No such image is shown", error)
        self._warned = True

    def server_close(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        super().server_close()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"


class RequestHandler(GuardedHandler):
    """One connection."""

    server: SearchServer
    server_version = "retrieval"
    sys_version = ""

    @property
    def names(self) -> frozenset[str]:  # type: ignore[override]
        return self.server.names

    def do_GET(self) -> None:
        try:
            self.check_request()
            self.reply(HTTPStatus.OK, *self.answer())
        except (BadRequest, RefusedRequest) as error:
            self.fail(error.status, str(error))
        except UnsafePath as error:
            self.server.warn_of_place(error)
            self.fail(HTTPStatus.FORBIDDEN, "the index names a file that it may not show: see the server's log")
        except (BadSample, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            log.warning("%s: %s", self.path, error)
            self.fail(HTTPStatus.GONE, "this image cannot be read from its place in the index: make the index again")
        except Exception:
            log.exception("%s failed", self.path)
            self.fail(HTTPStatus.INTERNAL_SERVER_ERROR, "the search failed: see the server's log")

    do_HEAD = do_GET

    def answer(self) -> tuple[str, bytes, bool]:
        """Returns (content type, body, may be cached) for the path. Raises BadRequest."""
        try:
            url = urlsplit(self.path)
        except ValueError as error:
            raise BadRequest(f"the address is malformed: {error}") from error
        query = parse_qs(url.query, keep_blank_values=True)
        if url.path == "/":
            return "text/html; charset=utf-8", self.server.page, False
        if url.path == "/search":
            return "application/json", json.dumps(answer_search(self.server.searcher, query)).encode(), False
        if found := re.fullmatch(r"/image/(\d{1,12})", url.path, re.ASCII):
            return *answer_image(self.server.searcher, int(found[1]), query), True
        if found := re.fullmatch(r"/belief/(\d{1,12})", url.path, re.ASCII):
            return *answer_belief(self.server.searcher, int(found[1]), query), True
        raise BadRequest("not found: the page is at /", HTTPStatus.NOT_FOUND)

    def reply(self, status: HTTPStatus, kind: str, body: bytes, cached: bool = False) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}
        if self.close_connection:
            headers["Connection"] = "close"
        headers["Cache-Control"] = "private, max-age=3600" if cached else "no-store"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: HTTPStatus, message: str) -> None:
        self.reply(status, "application/json", json.dumps({"error": message}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s " + format, self.address_string(), *args)


def answer_search(searcher: Searcher, query: dict[str, list[str]]) -> dict[str, Any]:
    """Returns the answer to /search. Raises BadRequest."""
    k = max(1, parse_number(query, "k", HITS, MOST_HITS))
    try:
        within = Within.parse(*(query.get(name, [None])[0] for name in ("bbox", "time", "scene")))
        if within is not None:
            within.rows(searcher.index.columns)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    if ("text" in query) == ("image" in query):
        raise BadRequest("a search takes either text= or image=")
    if "image" in query:
        row = check_row(searcher, parse_number(query, "image", 0, len(searcher.index)))
        return {"query": {"image": row}, "hits": [asdict(hit) for hit in searcher.by_row(row, k, within)]}
    text = query["text"][0].strip()
    if not text or len(text) > LONGEST_TEXT:
        raise BadRequest(f"text must have 1 to {LONGEST_TEXT} characters")
    return {"query": {"text": text}, "hits": [asdict(hit) for hit in searcher.by_text(text, k, within)]}


def answer_image(searcher: Searcher, row: int, query: dict[str, list[str]]) -> tuple[str, bytes]:
    """Returns the answer to /image: (content type, bytes). Raises BadRequest, or BadSample or OSError."""
    side = max(1, parse_number(query, "side", 0, MOST_PIXELS_A_SIDE)) if "side" in query else None
    with searcher.image(check_row(searcher, row)) as data:
        if side is not None:
            return "image/jpeg", encode_jpeg(Image.fromarray(eval_transform(data, side).transpose(1, 2, 0)))
        with open_image(data) as image:
            if image.format in BROWSER_FORMATS:
                return BROWSER_FORMATS[image.format], data
            return "image/jpeg", encode_jpeg(upright_rgb(image))


def answer_belief(searcher: Searcher, row: int, query: dict[str, list[str]]) -> tuple[str, bytes]:
    """Returns the answer to /belief: (content type, bytes). Raises BadRequest, or BadSample or OSError."""
    if not searcher.encoder.model.has_belief:
        raise BadRequest("this model has no scene prior, so it has no belief map", HTTPStatus.NOT_FOUND)
    side = max(1, parse_number(query, "side", BELIEF_SIDE, MOST_PIXELS_A_SIDE))
    return "image/jpeg", encode_jpeg(searcher.belief(check_row(searcher, row), side))


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def parse_number(query: dict[str, list[str]], name: str, default: int, most: int) -> int:
    """Returns a whole number of the query, reduced to at most ``most``. Raises BadRequest if it is none."""
    text = query.get(name, [str(default)])[0]
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII):
        raise BadRequest(f"{name}= takes a whole number")
    return min(int(text), most)


def check_row(searcher: Searcher, row: int) -> int:
    if row >= len(searcher.index):
        raise BadRequest(
            f"the index has {len(searcher.index)} images, the last is {len(searcher.index) - 1}", HTTPStatus.NOT_FOUND
        )
    return row


def render_page(searcher: Searcher) -> bytes:
    """Returns the HTML page, filled with the facts of the index."""
    about = searcher.index.about
    belief = "" if searcher.encoder.model.has_belief else "hidden"
    facts = {
        "belief": belief,
        "count": f"{len(searcher.index):,}",
        "data": about["data"],
        "model": searcher.encoder.folder,
    }
    text = files("priorclip.retrieval").joinpath("page.html").read_text(encoding="utf-8")
    for name, value in facts.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(str(value)))
    return text.encode()


def create_server(
    searcher: Searcher, host: str = "127.0.0.1", port: int = 0, names: Sequence[str] = ()
) -> SearchServer:
    """Returns a server that listens; ``serve_forever`` answers. Port 0 takes a free port, see ``url``.

    ``names`` are further names under which browsers may ask for it.

    Raises OSError, which names the address, if it cannot listen.
    """
    try:
        return SearchServer((host, port), searcher, names)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror or error} (--port 0 takes a free port)"
        ) from error


def serve(server: SearchServer) -> None:
    """Answers until Ctrl-C."""
    try:
        log.info("%d images at %s, Ctrl-C stops the server", len(server.searcher.index), server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        server.server_close()
