"""What the server answers, as OpenAPI 3.1 for programs and as a page without scripts for people.

description()["paths"]["/search"]["get"]["parameters"][0]["name"]     "text"
"""

from __future__ import annotations

import html
from typing import Any

TEXT, NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}
HIT = {
    "type": "object",
    "required": ["rank", "score", "row", "key", "label", "where"],
    "properties": {
        "rank": {"type": "integer", "minimum": 1, "description": "1 for the best"},
        "score": {"type": "number", "minimum": -1, "maximum": 1, "description": "cosine similarity"},
        "row": {**NUMBER, "description": "row of the image in the index"},
        "key": {**TEXT, "description": "key of the sample"},
        "label": {"type": ["string", "null"], "description": "scene class"},
        "where": {**TEXT, "description": "file, or tar and row"},
        "caption": {"type": ["string", "null"], "description": "first caption of an image with a place"},
        "place": {"type": "object", "description": "scene, window, footprint (GeoJSON), gsd, acquired, if known"},
        "columns": {"type": "object", "description": "columns of a table that the pack kept"},
    },
}
QUERY = {"type": "object", "description": "what was searched for: text, or image"}
HITS = {"query": QUERY, "hits": {"type": "array", "items": HIT}}
WAY = {
    "search": {**TEXT, "enum": ["exact", "approximate"], "description": "whether all images were compared"},
    "recall_at_10": {"type": "number", "description": "share of the ten best images that an approximate search finds"},
}
FOUND = {"type": "object", "required": ["query", "hits", "search"], "properties": {**HITS, **WAY}}
ANSWERS = {"type": "array", "items": {"type": "object", "required": ["query", "hits"], "properties": HITS}}
FOUND_MANY = {"type": "object", "required": ["answers", "search"], "properties": {"answers": ANSWERS, **WAY}}
ERROR = {"type": "object", "required": ["error"], "properties": {"error": TEXT}}


def parameter(name: str, schema: dict[str, Any], text: str, where: str = "query") -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema, "description": text}


SEARCHES = [
    parameter("text", {**TEXT, "maxLength": 1000}, "what to look for; a search takes either text or image"),
    parameter("image", NUMBER, "row of an image of the index; finds similar images"),
    parameter("k", {**NUMBER, "maximum": 200, "default": 24}, "number of results"),
    parameter("bbox", TEXT, "only images that touch WEST,SOUTH,EAST,NORTH in degrees; west above east goes across "
                            "the dateline"),
    parameter("time", TEXT, "only images acquired in 2024, 2024-06, 2024-06-30, or FROM/TO of these (UTC)"),
    parameter("scene", TEXT, "only images of this scene; * and ? stand for any characters"),
    parameter("exact", {**TEXT, "enum": ["true", "false"]}, "true compares all images, also if the index has an "
                                                            "approximate part"),
    parameter("format", {**TEXT, "enum": ["json", "geojson"]}, "json by default"),
]  # fmt: skip
MANY: dict[str, Any] = {
    "type": "object",
    "required": ["queries"],
    "additionalProperties": False,
    "properties": {
        "queries": {"type": "array", "minItems": 1, "maxItems": 256, "items": {**TEXT, "maxLength": 1000},
                    "description": "texts to look for; the answers are in their order"},
        "k": {"type": "integer", "minimum": 1, "default": 24, "description": "number of results of each, at most 200"},
        "exact": {"type": "boolean", "default": False, "description": "compare all images"},
        **{each["name"]: {"type": ["string", "null"], "description": each["description"]}
           for each in SEARCHES if each["name"] in ("bbox", "time", "scene")},
    },
}  # fmt: skip
MANY_TEXT = "The images most similar to each of many texts: JSON of at most 1 MiB, with its Content-Length."
MANY_ERRORS = {
    "408": "the body took too long",
    "411": "a POST needs one Content-Length",
    "413": "the body is too large",
    "415": "the Content-Type is not application/json",
}
ROW = parameter("row", NUMBER, "row of the image in the index", "path")
TILE = [parameter(name, NUMBER, text, "path") for name, text in (
    ("z", "zoom, 0 to 24"), ("x", "column from the west"), ("y", "row from the north"))]  # fmt: skip
SIDE = parameter("side", {**NUMBER, "maximum": 1024}, "side of the centred square in pixels")
ROUTES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "/": ("The search page; ?text= and ?image= are its bookmarks.", [], {"text/html": {}}),
    "/search": ("The images most similar to a text or to an image of the index, best first.", SEARCHES,
                {"application/json": {"schema": FOUND}, "application/geo+json": {}}),
    "/image/{row}": ("An image of the index, whole, or its centred square as a JPEG.", [ROW, SIDE], {"image/*": {}}),
    "/belief/{row}": ("The square under the belief map, which shows where the scene prior looks.", [ROW, SIDE],
                      {"image/jpeg": {}}),
    "/tile/{z}/{x}/{y}": ("The scenes in a tile of the usual web map; 204 if it is empty. Only with --scenes.", TILE,
                          {"image/png": {}}),
    "/leaflet.js": ("Leaflet, which draws the map of the page.", [], {"text/javascript": {}}),
    "/leaflet.css": ("Leaflet's styles.", [], {"text/css": {}}),
    "/map.js": ("The map of the page.", [], {"text/javascript": {}}),
    "/openapi.json": ("This description.", [], {"application/json": {}}),
    "/docs": ("This description for people.", [], {"text/html": {}}),
}  # fmt: skip
ERRORS = {
    "400": "the request is malformed, or has a body",
    "403": "the index names a file that it may not show",
    "404": "nothing has this address or row",
    "410": "the image cannot be read any more",
    "421": "the Host header names another server",
    "501": "the method is neither GET nor HEAD, nor POST to /search",
    "503": "too many connections are open, or too many lists of queries wait",
}


def description() -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document."""
    errors: dict[str, Any] = {code: {"description": text, "content": {"application/json": {"schema": ERROR}}}
              for code, text in ERRORS.items()}  # fmt: skip
    paths: dict[str, Any] = {}
    for path, (text, asked, content) in ROUTES.items():
        found: dict[str, Any] = {"200": {"description": "found", "content": content}}
        paths[path] = {"get": {"summary": text, "parameters": asked, "responses": {**found, **errors}}}
    more = {code: {**errors["400"], "description": text} for code, text in MANY_ERRORS.items()}
    many = {"200": {"description": "found", "content": {"application/json": {"schema": FOUND_MANY}}}, **errors, **more}
    body = {"required": True, "content": {"application/json": {"schema": MANY}}}
    paths["/search"]["post"] = {"summary": MANY_TEXT, "requestBody": body, "responses": many}
    return {"openapi": "3.1.0", "info": {"title": "Image search", "version": "1"}, "paths": paths}


def description_page() -> bytes:
    """Returns the same as an HTML page without scripts."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Image search: routes</title>"
        "<link rel=icon href=data:,>"
        "<style>:root{color-scheme:light dark}body{max-width:52rem;margin:2rem auto;padding:0 1rem;"
        "font:16px/1.5 system-ui,sans-serif}dt{font-family:monospace}</style><h1>Routes</h1>"
        '<p>All routes answer GET and HEAD. For programs: <a href="/openapi.json">openapi.json</a>.',
        f"<h2><code>POST /search</code></h2><p>{html.escape(MANY_TEXT)} Answers application/json.<dl>",
        *(f"<dt>{name}<dd>{html.escape(each['description'])}" for name, each in MANY["properties"].items()),
        "</dl>",
    ]
    for path, (text, asked, content) in ROUTES.items():
        parts.append(f"<h2><code>{html.escape(path)}</code></h2><p>{html.escape(text)} Answers {', '.join(content)}.")
        rows = "".join(f"<dt>{each['name']}<dd>{html.escape(each['description'])}" for each in asked)
        parts.append(f"<dl>{rows}</dl>" if rows else "")
    errors = "".join(f"<dt>{code}<dd>{html.escape(text)}" for code, text in sorted({**ERRORS, **MANY_ERRORS}.items()))
    return "".join([*parts, f"<h2>Errors</h2><dl>{errors}</dl>"]).encode()
