"""Removes the secrets of URLs by their structure, because no list of the names of signatures is complete.

    mask_urls("https://me:hunter2@host/a.tar?sig=9f&part=1")   ->  "https://***@host/a.tar?sig=***&part=1"

User and password are a secret, because a token can stand in the place of either; ``ssh://git@host`` names an account
and stays. Each value of a query is a secret unless its name is in ``HARMLESS`` and the value is a plain word. The same
holds for ``;name=value`` in a path and ``#name=value`` in a fragment.
"""

from __future__ import annotations

import re

NAMES = (
    "part page offset limit start end length size width height side format ext lang index row rows count list-type "
    "delimiter prefix max-keys recursive download dl raw alt ref revision rev branch tag version versionid generation "
    "partnumber file filename name path dir split subset config dataset year month day bbox layer layers"
)
HARMLESS = frozenset(NAMES.split())
PLAIN_VALUE = re.compile(r"[\w./-]{1,64}", re.ASCII)
ACCOUNT_SCHEMES = ("ssh://", "sftp://", "git+ssh://", "rsync://", "scp://")
# A URL ends at the quote that stands before it, or at a blank. A quote may stand in a password.
URL = re.compile(
    r"""(?:(?<=')(?P<a>[a-z][a-z0-9+.-]*://)(?P<b>[^\s']*))|(?:(?<=")(?P<c>[a-z][a-z0-9+.-]*://)(?P<d>[^\s"]*))"""
    r"""|(?:(?<![a-z0-9+.-])(?P<e>[a-z][a-z0-9+.-]*://)(?P<f>[^\s"<>]*))""",
    re.IGNORECASE,
)
PAIR = re.compile(r"([?&])([^\s=&#?'\"<>()\[\]{}]+)=([^\s&#'\"]*)")
PARAMETER = re.compile(r"(;[\w.-]+=)[^;/?#]+")
NO_PORT = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*):(?!\d*\W*$)")


def mask_urls(text: str) -> str:
    """Returns the text with ``***`` for each secret in a URL, and in ``?name=value`` outside of URLs."""
    text = URL.sub(_mask_found, text)
    return PAIR.sub(lambda found: found[1] + mask_pair(f"{found[2]}={found[3]}"), text)


def mask_pair(pair: str) -> str:
    """``sig=9f`` -> ``sig=***``; ``part=1`` stays; ``dG9rZW4=``, a query without a name, -> ``***``."""
    name, equals, value = pair.partition("=")
    if is_harmless(name, value):
        return pair
    named = equals and value.strip("=")
    return f"{name}=***" if named else pair and "***"


def is_harmless(name: str, value: str) -> bool:
    """Tells whether a field of a query names a part or a format of a file, and holds a plain word."""
    return name.lower() in HARMLESS and (not value or bool(PLAIN_VALUE.fullmatch(value)))


def has_bare_password(body: str) -> bool:
    """Tells whether a ``/``, ``?`` or ``#`` of a password cuts the host short: ``me:a/b@host/x``."""
    authority = re.split(r"[/?#]", body, maxsplit=1)[0]
    return "@" not in authority and bool(NO_PORT.match(authority))


def _mask_found(found: re.Match[str]) -> str:
    scheme, body = (found["a"] or found["c"] or found["e"]), (found["b"] or found["d"] or found["f"] or "")
    return scheme + mask_body(body, scheme.lower() in ACCOUNT_SCHEMES)


def mask_body(body: str, is_account: bool = False) -> str:
    """Masks what follows ``scheme://``. With ``is_account``, a user name without a password stays."""
    if has_bare_password(body):
        _, at, body = body.rpartition("@")
        return f"***@{mask_rest(body)}" if at else "***"
    authority, rest = re.match(r"([^/?#]*)(.*)", body, re.DOTALL).groups()  # type: ignore[union-attr]
    user, at, host = authority.rpartition("@")
    if is_account and ":" not in user:
        return authority + mask_rest(rest)
    return f"***@{host}{mask_rest(rest)}" if at else authority + mask_rest(rest)


def mask_rest(rest: str) -> str:
    """Masks path, query and fragment."""
    head, mark, fragment = rest.partition("#")
    path, question, query = head.partition("?")
    masked = PARAMETER.sub(r"\1***", path)
    masked += question + mask_query(query)
    return masked + mark + (mask_query(fragment) if "=" in fragment else fragment)


def mask_query(query: str) -> str:
    """Masks the fields of a query: ``part=1&sig=9f`` -> ``part=1&sig=***``."""
    return re.sub(r"[^&;]+", lambda found: mask_pair(found[0]), query)
