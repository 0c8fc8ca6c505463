"""URLs of remote shards without their secrets: for messages, and for names in the cache.

    https://me:secret@host/data/train-0000.tar?part=3&X-Amz-Signature=9f...
    public_url     https://host/data/train-0000.tar?...        messages, logs, quarantine.jsonl
    unsigned_url   https://host/data/train-0000.tar?part=3     names of cached files; equal for every signature

Passwords and signatures are secrets: only the request itself has them.
"""

from __future__ import annotations

import hashlib
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

SCHEMES = ("http", "https", "s3", "gs", "hf")
SIGNATURES = ("x-amz-", "x-goog-", "x-ms-")  # query fields of pre-signed URLs of AWS, Google and Azure; more below
SECRETS = {
    "awsaccesskeyid",
    "googleaccessid",
    "signature",
    "expires",
    "policy",
    "key-pair-id",
    "hdnea",
    "hdnts",
    "verify",
}
SECRETS |= {"sig", "se", "sp", "sv", "sr", "st", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv"}
SECRETS |= {"token", "access_token", "auth", "authorization", "api_key", "apikey", "key", "password"}


def is_remote(spec: str) -> bool:
    """Returns True for ``pipe:`` commands and for URLs other than file://."""
    return spec.startswith("pipe:") or ("://" in spec and not spec.startswith("file://"))


def check_scheme(url: str) -> None:
    """Raises ValueError for a scheme that is not supported."""
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise ValueError(
            f"{public_url(url)}: shards are read from {', '.join(SCHEMES)} and pipe:, not from {scheme}://"
        )


def public_url(url: str) -> str:
    """Returns the URL without user, password and query; of a ``pipe:``, only the program."""
    if url.startswith("pipe:"):
        return " ".join(url.split()[:1]) + " ..."
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, _host(parts.netloc), parts.path, "", "")) + ("?..." if parts.query else "")


def unsigned_url(url: str) -> str:
    """Returns the URL without its secrets, the same for every signature."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if not _secret(name)]
    return urlunsplit((parts.scheme, _host(parts.netloc), parts.path, urlencode(query), ""))


def url_hash(url: str) -> str:
    """Returns sixteen hex digits that name the object in the cache."""
    return hashlib.sha256(unsigned_url(url).encode()).hexdigest()[:16]


def folder_url(url: str) -> str:
    """Returns the URL of the object's folder, with its credentials and a slash at the end."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/"))


def url_in_folder(folder: str, name: str) -> str:
    """Returns the URL of a file in a folder."""
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/" + name))


def safe_file_name(url: str) -> str:
    """Returns the last part of the path, with ``_`` for characters that a file system may refuse."""
    name = url if url.startswith("pipe:") else urlsplit(url).path
    name = name.rstrip("/").split("?")[0].rsplit("/", 1)[-1]
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[-80:]


def _host(netloc: str) -> str:
    return netloc.rpartition("@")[2]


def _secret(name: str) -> bool:
    return name.lower() in SECRETS or name.lower().startswith(SIGNATURES)
