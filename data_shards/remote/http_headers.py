"""What the headers of an answer mean: the version of a file, a redirection, a pause. Any server may have written them.

keeps_credentials("https://host/a", "http://host/b")   ->  False, because a password would be sent in clear
parse_count("4096"), parse_count("²")                  ->  4096, None
"""

from __future__ import annotations

import email.utils
import re
import time
import urllib.parse
from dataclasses import dataclass
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Version:
    """Size, ETag and date of a remote file. ``ranges`` is True if the server sends parts of it."""

    size: int
    etag: str = ""
    modified: str = ""
    ranges: bool = True

    def same(self, other: Version) -> bool:
        """Returns True for the same version. An equal date is enough, as servers of one host may differ in ETags."""
        if self.size != other.size:
            return False
        return not (self.etag and other.etag) or self.etag == other.etag or bool(self.modified == other.modified != "")


def redirect_target(address: str, place: str) -> str | None:
    """Returns the address of a redirection, or None if it is no address of http(s)."""
    try:
        target = urllib.parse.urljoin(address, place)
        return target if origin(target)[0] in DEFAULT_PORTS and target.isprintable() else None
    except ValueError:
        return None


def origin(address: str) -> tuple[str, str, int]:
    """Returns scheme, host and port. Raises ValueError if the address is malformed."""
    parts = urlsplit(address)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or DEFAULT_PORTS.get(parts.scheme, 0)


def keeps_credentials(address: str, target: str) -> bool:
    """Tells whether a redirection may get the password or token: the same origin, or the same host from http to https.

    From https to http they would be sent in clear, and another port may be another server.
    """
    before, after = origin(address), origin(target)
    return before == after or (before == ("http", after[1], 80) and after == ("https", after[1], 443))


def retry_seconds(text: str | None) -> float | None:
    """Parses Retry-After, which is seconds or a date."""
    if not text:
        return None
    count = parse_count(text)
    if count is not None:
        return float(count)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError, AttributeError):
        return None


def parse_count(text: str) -> int | None:
    """Returns a whole number of a header, or None: at most 18 digits 0 to 9, where ``isdigit`` takes others too."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text, re.ASCII) else None
