"""Addresses of remote shards: what they are called, what may be shown of them, what tells them apart.

    https://me:secret@host/data/train-0000.tar?part=3&X-Amz-Signature=9f...
    shown      https://host/data/train-0000.tar?...        messages, logs, quarantine.jsonl
    identity   https://host/data/train-0000.tar?part=3     names of cached files; equal for every signing of one object

Passwords and signatures are secrets: only the request itself carries them.
"""

from __future__ import annotations

import hashlib
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

SCHEMES = ("http", "https", "s3", "gs", "hf")
SIGNATURES = ("x-amz-", "x-goog-", "x-ms-")  # query fields of pre-signed URLs: AWS, Google; CloudFront, Azure below
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
    """True for URLs other than file:// and for pipe: commands."""
    return spec.startswith("pipe:") or ("://" in spec and not spec.startswith("file://"))


def check_scheme(url: str) -> None:
    """Raises ValueError for a scheme that nothing here reads."""
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise ValueError(
            f"{public_url(url)}: shards are read from {', '.join(SCHEMES)} and pipe:, not from {scheme}://"
        )


def public_url(url: str) -> str:
    """The URL as messages give it: no user, password or query; of a pipe: its program alone."""
    if url.startswith("pipe:"):
        return " ".join(url.split()[:1]) + " ..."
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, _host(parts.netloc), parts.path, "", "")) + ("?..." if parts.query else "")


def unsigned_url(url: str) -> str:
    """The URL without its secrets, the same however it was signed."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if not _secret(name)]
    return urlunsplit((parts.scheme, _host(parts.netloc), parts.path, urlencode(query), ""))


def url_hash(url: str) -> str:
    """Sixteen hex digits that name the object in the cache."""
    return hashlib.sha256(unsigned_url(url).encode()).hexdigest()[:16]


def folder_url(url: str) -> str:
    """The URL of the folder that the object lies in, with the same credentials; ends in a slash."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/"))


def url_in_folder(folder: str, name: str) -> str:
    """The URL of a file of a folder."""
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/" + name))


def safe_file_name(url: str) -> str:
    """Last part of the path, in letters that any file system takes."""
    name = url if url.startswith("pipe:") else urlsplit(url).path
    name = name.rstrip("/").split("?")[0].rsplit("/", 1)[-1]
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[-80:]


def _host(netloc: str) -> str:
    return netloc.rpartition("@")[2]


def _secret(name: str) -> bool:
    return name.lower() in SECRETS or name.lower().startswith(SIGNATURES)
