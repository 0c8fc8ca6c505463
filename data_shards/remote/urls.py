"""URLs of remote shards without their secrets: for messages, and for names in the cache.

    https://me:secret@host/data/train-0000.tar?part=3&X-Amz-Signature=9f...
    public_url     https://host/data/train-0000.tar?...        messages, logs, quarantine.jsonl
    unsigned_url   https://host/data/train-0000.tar?part=3     names of cached files; equal for every signature

Passwords and signatures are secrets: only the request itself has them. A field of a query that is neither a known
signature nor known as harmless may tell two files apart, so ``unsigned_url`` shows the first digits of its hash.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from priorclip.common.command_secrets import mask_pipe
from priorclip.common.url_secrets import PARAMETER, has_bare_password, is_harmless, mask_body

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
    """Raises ValueError for a scheme that is not supported, and for a password that cuts the host short."""
    scheme, _, body = url.partition("://")
    if has_bare_password(body):
        shown = f"{scheme}://{mask_body(body)}"
        raise ValueError(f"{shown}: write / as %2F, ? as %3F, # as %23 and @ as %40 in a user name or password")
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise ValueError(
            f"{public_url(url)}: shards are read from {', '.join(SCHEMES)} and pipe:, not from {scheme}://"
        )


def public_url(url: str) -> str:
    """Returns the URL without user, password and query; of a ``pipe:``, only the program."""
    if url.startswith("pipe:"):
        return " ".join(mask_pipe(url).split()[:1]) + " ..."
    parts = urlsplit(url)
    path = PARAMETER.sub(r"\1***", parts.path)
    return urlunsplit((parts.scheme, _host(parts.netloc), path, "", "")) + ("?..." if parts.query else "")


def unsigned_url(url: str) -> str:
    """Returns the URL without its secrets, the same for every signature."""
    parts = urlsplit(url)
    query = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if not _secret(name)]
    shown = urlencode([(name, value if is_harmless(name, value) else _short_hash(value)) for name, value in query])
    path = PARAMETER.sub(lambda found: f"{found[1]}{_short_hash(found[0])}", parts.path)
    if parts.query and "=" not in parts.query:
        shown = _short_hash(parts.query)
    return urlunsplit((parts.scheme, _host(parts.netloc), path, shown, ""))


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


def safe_file_name(command: str) -> str:
    """Returns the tar that a ``pipe:`` command names, for its copy, or "shard": other words may be secrets."""
    found = re.findall(r"[\w.-]+\.tar(?:\.\w+)?(?![\w.-])", mask_pipe(command), re.ASCII)
    return found[-1][-80:] if found else "shard"


def _host(netloc: str) -> str:
    return netloc.rpartition("@")[2]


def _short_hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:8]


def _secret(name: str) -> bool:
    return name.lower() in SECRETS or name.lower().startswith(SIGNATURES)
