"""The answers of the search server, as functions of a searcher, a row and the words of the query.

answer_search(searcher, {"text": ["a river"], "k": ["3"]})      {"query": {"text": "a river"}, "hits": [...], ...}
answer_searches(searcher, b'{"queries": ["a river"], "k": 3}')  {"answers": [{"query": ..., "hits": [...]}], ...}
answer_image(searcher, 12, {"side": ["320"]})                   ("image/jpeg", bytes)
"""

from __future__ import annotations

import io
import re
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from PIL import Image

from priorclip.common.untrusted_json import Check, check_object, flag, list_of, null_or, parse_object, whole
from priorclip.common.untrusted_json import text as text_of
from priorclip.data_shards.images.decode import open_image, upright_rgb
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.retrieval.places import Within
from priorclip.retrieval.search import Hit, Searcher

HITS, MOST_HITS = 24, 200
LONGEST_TEXT = 1000
MOST_QUERIES = 256
FORMATS = ("json", "geojson")
LIMITS = ("bbox", "time", "scene")
SEARCHES: dict[str, Check] = {
    "queries": list_of(text_of(2 * LONGEST_TEXT)),
    "k": whole(1 << 40, 1),
    "exact": flag,
    **{name: null_or(text_of()) for name in LIMITS},
}
MOST_PIXELS_A_SIDE = 1024
BELIEF_SIDE = 320
JPEG_QUALITY = 88
BROWSER_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}


class BadRequest(ValueError):
    """A request for something that does not exist or is not allowed."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


def answer_search(searcher: Searcher, query: dict[str, list[str]]) -> dict[str, Any]:
    """Returns the answer to /search as JSON. Raises BadRequest."""
    asked, hits, way = find_hits(searcher, query)
    return {"query": asked, "hits": [asdict(hit) for hit in hits], **way}


def find_hits(searcher: Searcher, query: dict[str, list[str]]) -> tuple[dict[str, Any], list[Hit], dict[str, Any]]:
    """Returns what a query asks for, its hits, and how they were searched. Raises BadRequest."""
    if query.get("format", ["json"])[0] not in FORMATS:
        raise BadRequest(f"format= takes {' or '.join(FORMATS)}")
    k = max(1, parse_number(query, "k", HITS, MOST_HITS))
    within = parse_within(searcher, *(query.get(name, [None])[0] for name in LIMITS))
    exact = query.get("exact", ["false"])[0]
    if exact not in ("true", "false"):
        raise BadRequest("exact= takes true or false")
    way = searcher.index.way_of_search(within is not None, exact == "true")
    if ("text" in query) == ("image" in query):
        raise BadRequest("a search takes either text= or image=")
    if "image" in query:
        row = check_row(searcher, parse_number(query, "image", 0, len(searcher.index)))
        return {"image": row}, searcher.by_row(row, k, within, exact == "true"), way
    text = check_text(query["text"][0])
    return {"text": text}, searcher.by_text(text, k, within, exact == "true"), way


def answer_searches(searcher: Searcher, body: bytes) -> dict[str, Any]:
    """Returns the answers to the texts in the JSON body of a POST to /search, in their order. Raises BadRequest."""
    try:
        asked = parse_object(body, "the body")
        check_object(asked, SEARCHES, "the body", optional=set(SEARCHES) - {"queries"})
    except ValueError as error:
        raise BadRequest(str(error)) from error
    if not 1 <= len(asked["queries"]) <= MOST_QUERIES:
        raise BadRequest(f"'queries' must have 1 to {MOST_QUERIES} texts")
    texts = [check_text(text) for text in asked["queries"]]
    within = parse_within(searcher, *map(asked.get, LIMITS))
    exact = asked.get("exact", False)
    found = searcher.by_texts(texts, min(asked.get("k", HITS), MOST_HITS), within, exact)
    answers = [
        {"query": {"text": text}, "hits": [asdict(hit) for hit in hits]}
        for text, hits in zip(texts, found, strict=True)
    ]
    return {"answers": answers, **searcher.index.way_of_search(within is not None, exact)}


def check_text(text: str) -> str:
    """Returns a text to search for without blanks around it. Raises BadRequest if it is blank or too long."""
    text = text.strip()
    if not text or len(text) > LONGEST_TEXT:
        raise BadRequest(f"a text must have 1 to {LONGEST_TEXT} characters")
    return text


def parse_within(
    searcher: Searcher, bbox: str | None = None, time: str | None = None, scene: str | None = None
) -> Within | None:
    """Returns the limits of a search. Raises BadRequest if they are malformed, or the index has no places."""
    try:
        within = Within.parse(bbox, time, scene)
        if within is not None:
            within.need(searcher.index.columns)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return within


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
