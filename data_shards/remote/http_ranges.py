"""Reads ranges of a remote file over HTTP, with retries.

    for data in fetch_range("https://host/a.tar", 4096, 1 << 20, version, timeout=60): ...

    refused, reset, timed out, cut short, 408, 429, 5xx   retry after 0.5, 1, 2, ... s with jitter, or after Retry-After
    cut in the middle                                     retry from the byte where it stopped
    401, 403, 404, 410 and the like                       RemoteError at once
    another size or ETag than before                      RemoteError "shard has changed"

A request with its body takes at most ``timeout`` seconds, so that a slow server cannot block the run. A server that
lets ``SILENT`` requests in a row run into this limit is not asked again for this range. The count of attempts starts
again after an attempt that brought at least ``PROGRESS`` bytes. After a host has used up all attempts, it gets one
attempt for each request until it answers. Each process, also a forked one, has its own connections.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import urllib3

from priorclip.common.output import get_logger
from priorclip.data_shards.remote.http_errors import RemoteError, Transient, at_most, describe_error
from priorclip.data_shards.remote.http_headers import (
    Version,
    keeps_credentials,
    parse_count,
    redirect_target,
    retry_seconds,
)
from priorclip.data_shards.remote.signed_request import build_request
from priorclip.data_shards.remote.urls import public_url

log = get_logger(__name__)
logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)  # its debug lines show URLs with signatures

ATTEMPTS, SILENT = 6, 3
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; doubling in between
CONNECT_TIMEOUT = 10.0
PROGRESS = 1 << 16  # bytes
PIECE = 1 << 18  # bytes read from the connection at a time
SMALL = 1 << 26  # bytes of a manifest
DRAINED = 1 << 16  # bytes; for a longer rest of a body the connection is closed
TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504, 509))
REDIRECT_KEPT = 300.0  # seconds in which the target of a redirect is requested directly
Fetched = tuple[bytes, Version] | None
NOT_CARRIED_OVER = frozenset(("authorization", "cookie"))


class _Process:
    """Connections of one process, and the state of hosts."""

    def __init__(self) -> None:
        self.pools: dict[str, urllib3.PoolManager] = {}
        self.redirects: dict[str, tuple[str, float]] = {}
        self.down: set[str] = set()
        self.jitter = random.Random()  # not the global generator, which belongs to the run

    def pool(self, address: str) -> urllib3.PoolManager:
        """Returns connections to the host, through the proxy of http_proxy, https_proxy and no_proxy."""
        parts = urlsplit(address)
        bypass = urllib.request.proxy_bypass(parts.hostname or "")
        proxy = "" if bypass else urllib.request.getproxies().get(parts.scheme, "")
        if proxy not in self.pools:
            options: dict[str, Any] = {"num_pools": 32, "maxsize": 64, "block": False, "retries": False}
            self.pools[proxy] = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
        return self.pools[proxy]


_process = _Process()


def _reset_after_fork() -> None:
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_reset_after_fork)


def fetch_version(url: str, timeout: float) -> Version:
    """Requests the first byte of a remote file to learn its size, ETag and date. Raises RemoteError."""
    return _repeated(url, lambda limit: _fetch_version(url, limit), timeout)


def _fetch_version(url: str, timeout: float) -> Version:
    response = _open(url, {"Range": "bytes=0-0"}, time.monotonic() + timeout)
    try:
        return _version(url, response)
    finally:
        _finish(response)


def fetch_file(url: str, timeout: float, known: Version | None = None, most: int = SMALL) -> Fetched:
    """Fetches a file of ``most`` bytes and its version; None if it is still ``known``. Raises RemoteError."""
    asked = {"If-None-Match": known.etag} if known and known.etag else {}
    asked = {"If-Modified-Since": known.modified} if known and known.modified and not known.etag else asked

    def attempt(limit: float) -> Fetched:
        until = time.monotonic() + limit
        response = _open(url, asked, until)
        try:
            if response.status == 304:
                return None
            data = b"".join(at_most(most, _body(response, until), public_url(url)))
            return data, Version(len(data), response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))
        finally:
            _finish(response)

    return _repeated(url, attempt, timeout)


def fetch_range(url: str, start: int, length: int, version: Version, timeout: float) -> Iterator[bytes]:
    """Yields bytes start .. start + length - 1 in pieces, each byte once. Raises RemoteError.

    If the server does not support ranges, only a request for the whole file is allowed.
    """
    if not version.ranges and (start, length) != (0, version.size):
        raise RemoteError("remote cannot be read", f"{public_url(url)}: its server does not support range requests")
    taken = since_failure = failures = 0
    while taken < length:
        try:
            until = time.monotonic() + timeout
            headers = {"Range": f"bytes={start + taken}-{start + length - 1}"} if version.ranges else {}
            response = _open(url, headers, until)
            skip = 0 if version.ranges else taken  # without ranges, the file is sent again from its start
            try:
                _check_range(url, response, version, start + taken)
                for data in _body(response, until):
                    passed, skip = data[skip:], max(0, skip - len(data))
                    passed = passed[: length - taken]
                    taken += len(passed)
                    since_failure += len(passed)
                    yield passed
                    if taken == length:
                        break
            finally:
                _finish(response)
            if taken < length:
                raise Transient(f"the body ended after {taken} of {length} bytes")
        except Transient as error:
            failures = 1 if since_failure >= PROGRESS else failures + 1
            since_failure = 0
            _pause_or_give_up(url, failures, error)
    _process.down.discard(_host(url))


def _repeated(url: str, attempt, timeout: float):
    failures = 0
    while True:
        try:
            result = attempt(timeout)
        except Transient as error:
            failures += 1
            _pause_or_give_up(url, failures, error)
        else:
            _process.down.discard(_host(url))
            return result


def _pause_or_give_up(url: str, failures: int, error: Transient) -> None:
    host = _host(url)
    most = min(SILENT, ATTEMPTS) if error.is_silence else ATTEMPTS
    if failures >= (1 if host in _process.down else most):
        _process.down.add(host)
        raise RemoteError("remote cannot be read", f"{public_url(url)}: {error} ({failures} attempts)") from None
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (failures - 1)) * _process.jitter.uniform(0.5, 1)
    pause = min(LONGEST_PAUSE, max(pause, error.pause or 0))
    log.info("%s: %s; retry in %.1f s", public_url(url), error, pause)
    time.sleep(pause)


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _open(url: str, headers: dict[str, str], until: float) -> urllib3.BaseHTTPResponse:
    """Returns a response with status 200, 206 or 304. Raises RemoteError for a final error, Transient for a retry."""
    address, own = build_request(url)
    kept, kept_until = _process.redirects.get(url, ("", 0.0))
    if kept_until > time.monotonic():
        response = _get(kept, headers, until)
        if response.status in (200, 206, 304) or response.status in TRANSIENT:
            return _check_status(url, response)
        _finish(response)  # the signature of the target may have expired: start from the URL again
    _process.redirects.pop(url, None)
    headers = {**own, **headers}
    for _ in range(6):
        response = _get(address, headers, until)
        place = response.get_redirect_location()
        if not place:
            return _check_status(url, response)
        _finish(response)
        target = redirect_target(address, str(place))
        if target is None:
            break
        if not keeps_credentials(address, target):
            headers = {name: value for name, value in headers.items() if name.lower() not in NOT_CARRIED_OVER}
        address = target
        if not set(headers) & {"Authorization"}:
            _process.redirects[url] = (address, time.monotonic() + REDIRECT_KEPT)
    raise RemoteError("remote cannot be read", f"{public_url(url)}: too many redirects, or one to no http(s) address")


def _get(address: str, headers: dict[str, str], until: float) -> urllib3.BaseHTTPResponse:
    left = max(0.1, until - time.monotonic())
    try:
        return _process.pool(address).request(
            "GET",
            address,
            headers={"Accept-Encoding": "identity", "User-Agent": "priorclip-data-shards", **headers},
            timeout=urllib3.Timeout(connect=min(left, CONNECT_TIMEOUT), read=left),
            preload_content=False,
            redirect=False,
            retries=False,
            decode_content=False,
        )
    except urllib3.exceptions.HTTPError as error:
        raise Transient(describe_error(error)) from None
    except (ValueError, OverflowError) as error:  # http.client refuses an ETag with a line break as a header
        raise Transient(f"the request cannot be sent ({type(error).__name__})") from None


def _check_status(url: str, response: urllib3.BaseHTTPResponse) -> urllib3.BaseHTTPResponse:
    status = response.status
    if status in (200, 206, 304):
        return response
    text = f"{status} {response.reason or ''}".strip()
    wait = response.headers.get("Retry-After")
    try:
        code = re.search(rb"<Code>(\w{1,40})</Code>", response.read1(4096) or b"")
    except (urllib3.exceptions.HTTPError, OSError):
        code = None
    _finish(response)
    text += f" ({code[1].decode()})" if code else ""
    if status in TRANSIENT or (code and code[1] in (b"RequestTimeout", b"SlowDown")):
        raise Transient(text, retry_seconds(wait))
    if status in (404, 410):
        raise RemoteError("shard is missing", f"{public_url(url)}: {text}")
    if status == 416:
        raise RemoteError("shard has changed", f"{public_url(url)}: {text}, the file has become shorter, or is empty")
    advice = ": check the credentials, and if the link has expired" if status in (401, 403) else ""
    raise RemoteError("remote cannot be read", f"{public_url(url)}: {text}{advice}")


def _version(url: str, response: urllib3.BaseHTTPResponse) -> Version:
    headers = response.headers
    ranges = response.status == 206
    size = headers.get("Content-Range", "").rpartition("/")[2] if ranges else headers.get("Content-Length", "")
    count = parse_count(size)
    if count is None:
        raise RemoteError("remote cannot be read", f"{public_url(url)}: its server does not send its size")
    return Version(count, headers.get("ETag", ""), headers.get("Last-Modified", ""), ranges)


def _check_range(url: str, response: urllib3.BaseHTTPResponse, version: Version, start: int) -> None:
    """Checks that the response is the requested range of the same version. Raises RemoteError or Transient."""
    if version.ranges and response.status != 206:
        raise Transient(f"status {response.status} in place of a range of the file")
    found = _version(url, response)
    if not version.same(found):
        raise RemoteError(
            "shard has changed",
            f"{public_url(url)}: {found.size} bytes {found.etag}, before {version.size} {version.etag}",
        )
    if version.ranges and not re.match(rf"bytes {start}-", response.headers.get("Content-Range", "")):
        raise Transient("the server sent another range than requested")


def _body(response: urllib3.BaseHTTPResponse, until: float) -> Iterator[bytes]:
    """Yields pieces of a body as they arrive. Raises Transient if it stops early or takes too long."""
    try:
        while data := response.read1(PIECE):
            yield data
            if time.monotonic() > until:
                raise Transient("timeout: the body comes too slowly")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Transient(describe_error(error)) from None


def _finish(response: urllib3.BaseHTTPResponse) -> None:
    """Returns the connection to the pool if little is left to read; otherwise closes it."""
    left = getattr(response, "length_remaining", None)
    try:
        if left == 0 or (left is not None and left <= DRAINED and response.status not in (200, 206)):
            response.drain_conn()  # an empty body too: before, the connection takes no other request
            response.release_conn()
            return
    except (urllib3.exceptions.HTTPError, OSError):
        pass
    response.close()
