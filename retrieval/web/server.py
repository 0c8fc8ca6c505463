"""Serves a search page for an index: Starlette's routes in uvicorn, one HTML page, no external resources.

    GET /                           the page; /?text=river and /?image=12 are its bookmarks
    GET /search?text=river&k=24     {"query", "hits": [{"rank", "score", "row", "key", "label", "where"}]}
    GET /search?image=12&k=24       the same, by an image of the index
    GET /image/12?side=320          the centred square of image 12 as a JPEG; without side the whole image
    GET /belief/12?side=320         the square under the belief map, which shows where the scene prior looks
    GET /search?...&format=geojson  the hits as a GeoJSON FeatureCollection
    POST /search                    {"queries": ["a river", "a road"], "k": 24}: {"answers": [{"query", "hits"}, ...]}
    GET /tile/14/8823/5650          the scenes of the index in this tile of a web map, as a PNG; 204 if it is empty
    GET /docs, /openapi.json        the description of all routes, for people and for programs

The server only reads. A request names an image by its row and never by a path. guarded_requests.py says which requests
it answers. One thread talks to all clients; others search, and others again read images, so that large images
delay no search. Requests with many queries have one thread for all of them, and ``MOST_WAITING`` places.
"""

from __future__ import annotations

import asyncio
import html
import json
import re
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from priorclip.common.output import get_logger
from priorclip.common.safe_paths import UnsafePath
from priorclip.data_shards.format.sample import BadSample
from priorclip.retrieval.hit_formats import format_hits
from priorclip.retrieval.search import Hit, Searcher
from priorclip.retrieval.web.answers import (
    BadRequest,
    answer_belief,
    answer_image,
    answer_search,
    answer_searches,
    find_hits,
)
from priorclip.retrieval.web.description import description, description_page
from priorclip.retrieval.web.guarded_requests import HEAD_SECONDS, IDLE_SECONDS, Guard, GuardedProtocol, allowed_names
from priorclip.retrieval.web.scene_tiles import DEEPEST, SceneTiles

log = get_logger(__name__)

WAITING_CONNECTIONS = 1024  # that connect at the same moment; the kernel drops the others
MOST_CONNECTIONS = 8192  # that are open at the same time; others get 503
SEARCH_THREADS, IMAGE_THREADS = 4, 8
MOST_WAITING = 16  # requests with many queries that are read, wait or are answered; others get 503
POLICY = {
    "default-src": "'none'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "style-src": "'unsafe-inline' 'self'",
    "script-src": "'unsafe-inline' 'self'",
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
HTML, JSON, GEOJSON = "text/html; charset=utf-8", "application/json", "application/geo+json"
SCRIPT = "text/javascript; charset=utf-8"
MAP = (
    '<link rel="stylesheet" href="/leaflet.css">\n<script src="/leaflet.js"></script>\n'
    '<script src="/map.js"></script>\n'
)
Answer = tuple[str, bytes]  # content type, body


class SearchServer:
    """Serves one Searcher on a socket that listens.

    ``server_close`` joins the threads, because Python aborts if a thread ends inside torch.

    Raises:
        OSError: it cannot listen on the address
    """

    def __init__(
        self, address: tuple[str, int], searcher: Searcher, names: Sequence[str] = (), tiles: SceneTiles | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.create_server(address, family=family, backlog=WAITING_CONNECTIONS)
        self.searcher = searcher
        self.names = allowed_names(address[0], names)
        self.page = render_page(searcher, tiles is not None)
        self.tiles = tiles
        self._warned = False
        self._searches = ThreadPoolExecutor(SEARCH_THREADS, "search")
        self._images = ThreadPoolExecutor(IMAGE_THREADS, "image")
        self._many = ThreadPoolExecutor(1, "queries")
        self._waiting = 0  # requests with many queries; only the thread that talks to the clients changes it
        self._ended = threading.Event()
        self._ended.set()
        config = uvicorn.Config(
            Guard(Router(self._routes()), self.names, HEADERS),
            http=GuardedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            headers=[("Server", "retrieval")],
            backlog=WAITING_CONNECTIONS,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=int(IDLE_SECONDS),
            access_log=False,
            log_config=None,
            log_level="error",
        )
        self._server = uvicorn.Server(config)

    @property
    def server_address(self) -> tuple[str, int]:
        return self.socket.getsockname()[:2]

    @property
    def url(self) -> str:
        host, port = self.server_address
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    @property
    def _open(self) -> set[Any]:
        """The connections that are open."""
        return self._server.server_state.connections

    def serve_forever(self) -> None:
        """Answers until ``shutdown``, or in the main thread until Ctrl-C, which raises KeyboardInterrupt.

        Requests that are in work are still answered then.
        """
        self._ended.clear()
        try:
            self._server.run(sockets=[self.socket])
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """Ends ``serve_forever`` in another thread, and waits for it."""
        self._server.should_exit = True
        self._ended.wait()

    def server_close(self) -> None:
        self.socket.close()
        self._searches.shutdown()
        self._images.shutdown()
        self._many.shutdown()

    def warn_of_place(self, error: UnsafePath) -> None:
        """Logs the first image that the server may not read."""
        if not self._warned:
            log.warning("%s. No such image is shown", error)
        self._warned = True

    def _routes(self) -> list[Route]:
        searcher, searches, images = self.searcher, self._searches, self._images
        by_row = {"image": answer_image, "belief": answer_belief}

        def search(query: dict[str, list[str]]) -> Answer:
            if query.get("format", ["json"])[0] == "geojson":
                return GEOJSON, format_found(find_hits(searcher, query)).encode()
            return JSON, json.dumps(answer_search(searcher, query)).encode()

        def of_row(name: str) -> Route:
            async def answer(request: Request) -> Response:
                row, query = request.path_params["row"], words(request)
                if not (row.isascii() and row.isdigit() and len(row) <= 12):
                    return await missing(request)
                return await self._reply(request, images, lambda: by_row[name](searcher, int(row), query), cached=True)

            return Route(f"/{name}/{{row}}", answer)

        async def found(request: Request) -> Response:
            query = words(request)
            return await self._reply(request, searches, lambda: search(query))

        async def found_many(request: Request) -> Response:
            if self._waiting >= MOST_WAITING:
                answer = failure(HTTPStatus.SERVICE_UNAVAILABLE, "too many lists of queries wait: ask again later")
                return closing(answer)  # the body is not read
            self._waiting += 1
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    body = await request.body()
                many = partial(answer_searches, searcher, body)
                return await self._reply(request, self._many, lambda: (JSON, json.dumps(many()).encode()))
            except TimeoutError:
                return closing(failure(HTTPStatus.REQUEST_TIMEOUT, "the body took too long"))
            finally:
                self._waiting -= 1

        async def tile(request: Request) -> Response:
            found = request.path_params["z"], request.path_params["x"], request.path_params["y"]
            if self.tiles is None or not all(re.fullmatch(r"\d{1,8}", each, re.ASCII) for each in found):
                return await missing(request)
            z, x, y = map(int, found)
            if z > DEEPEST or max(x, y) >= 2**z:
                return await missing(request)
            tiles = self.tiles
            return await self._reply(request, images, lambda: ("image/png", tiles.draw(z, x, y) or b""), cached=True)

        return [
            Route("/", fixed(HTML, self.page)),
            Route("/search", found, methods=["GET"]),
            Route("/search", found_many, methods=["POST"]),
            of_row("image"),
            of_row("belief"),
            Route("/tile/{z}/{x}/{y}", tile),
            Route("/leaflet.js", fixed(SCRIPT, packaged("leaflet", "leaflet.js"), cached=True)),
            Route("/leaflet.css", fixed("text/css; charset=utf-8", packaged("leaflet", "leaflet.css"), cached=True)),
            Route("/map.js", fixed(SCRIPT, packaged("map.js"))),
            Route("/openapi.json", fixed(JSON, json.dumps(description()).encode())),
            Route("/docs", fixed(HTML, description_page())),
            Route("/{path:path}", missing),
        ]

    async def _reply(
        self, request: Request, pool: ThreadPoolExecutor, work: Callable[[], Answer], cached: bool = False
    ) -> Response:
        """Does the work in a thread of the pool, and returns its answer, or the error that tells the client why not."""
        try:
            return response(HTTPStatus.OK, *await asyncio.get_running_loop().run_in_executor(pool, work), cached)
        except BadRequest as error:
            return failure(error.status, str(error))
        except UnsafePath as error:
            self.warn_of_place(error)
            return failure(HTTPStatus.FORBIDDEN, "the index names a file that it may not show: see the server's log")
        except (BadSample, OSError) as error:
            log.warning("%s: %s", request.url.path, error)
            return failure(
                HTTPStatus.GONE, "this image cannot be read from its place in the index: make the index again"
            )
        except Exception:
            log.exception("%s failed", request.url.path)
            return failure(HTTPStatus.INTERNAL_SERVER_ERROR, "the search failed: see the server's log")


def words(request: Request) -> dict[str, list[str]]:
    """Returns the values of each name in the query."""
    return parse_qs(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)


def packaged(*names: str) -> bytes:
    """Returns a file of this package."""
    return files("priorclip.retrieval.web").joinpath(*names).read_bytes()


def response(status: HTTPStatus, kind: str, body: bytes, cached: bool = False) -> Response:
    status = status if body else HTTPStatus.NO_CONTENT
    kept = "private, max-age=3600" if cached else "no-store"
    return Response(body, status, {"Content-Type": kind, **HEADERS, "Cache-Control": kept})


def closing(answer: Response) -> Response:
    """Lets the connection end after an answer, because the rest of the request was not read."""
    answer.headers["Connection"] = "close"
    return answer


def format_found(found: tuple[dict[str, Any], list[Hit], dict[str, Any]]) -> str:
    """Returns what ``find_hits`` found as GeoJSON."""
    _, hits, way = found
    return format_hits(hits, "geojson", way)


def failure(status: HTTPStatus, message: str) -> Response:
    return response(status, JSON, json.dumps({"error": message}).encode())


def fixed(kind: str, body: bytes, cached: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """Returns an endpoint that always gives the same answer."""

    async def answer(request: Request) -> Response:
        return response(HTTPStatus.OK, kind, body, cached)

    return answer


async def missing(request: Request) -> Response:
    return failure(HTTPStatus.NOT_FOUND, "not found: the page is at /, the routes are at /docs")


def render_page(searcher: Searcher, has_tiles: bool = False) -> bytes:
    """Returns the HTML page, filled with the facts of the index. An index without places has no map."""
    about = searcher.index.about
    belief = "" if searcher.encoder.model.has_belief else "hidden"
    facts = {
        "belief": belief,
        "count": f"{len(searcher.index):,}",
        "data": about["data"],
        "model": searcher.encoder.folder,
    }
    text = packaged("page.html").decode()
    text = text.replace("{{map}}", MAP if searcher.index.columns is not None else "")
    text = text.replace('<div id="map">', '<div id="map" data-tiles>') if has_tiles else text
    for name, value in facts.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(str(value)))
    return text.encode()


def create_server(
    searcher: Searcher,
    host: str = "127.0.0.1",
    port: int = 0,
    names: Sequence[str] = (),
    tiles: SceneTiles | None = None,
) -> SearchServer:
    """Returns a server that listens; ``serve_forever`` answers. Port 0 takes a free port, see ``url``.

    ``names`` are further names under which browsers may ask for it. ``tiles`` are the scenes on the map.

    Raises OSError, which names the address, if it cannot listen.
    """
    try:
        return SearchServer((host, port), searcher, names, tiles)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror or error} (--port 0 takes a free port)"
        ) from error


def serve(server: SearchServer) -> None:
    """Answers until Ctrl-C."""
    allow_connections()
    try:
        log.info("%d images at %s, Ctrl-C stops the server", len(server.searcher.index), server.url)
        server.serve_forever()
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        server.server_close()


def allow_connections() -> None:
    """Lets this process open as many files as MOST_CONNECTIONS need, or as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, 2 * MOST_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
