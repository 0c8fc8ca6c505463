"""Removes secrets from everything that a run writes, and write permission of other users from its files.

    masked("https://me:hunter2@host/a.tar?sig=9f&part=1")   ->  "https://me:***@host/a.tar?sig=***&part=1"
    masked_values({"api_key": "abc", "lr": 0.1})            ->  {"api_key": "***", "lr": 0.1}

A secret is a value with the name of one (``...password``, ``...token``, ``...access_key`` ...), the password or the
signature in a URL, or a string that looks like a key of a well-known service.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Sequence
from typing import IO, Any, TextIO

NAME = (
    r"(?:[\w.-]*[_.-])?(?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|secret[_-]?key|private[_-]?key|account[_-]?key|credentials?|authorization)"
)
QUERY = r"X-Amz-(?:Signature|Credential|Security-Token)|sig|signature|key|AWSAccessKeyId"
# True, false, null and small numbers are settings and no secrets: ``instruction_token: true``.
PLAIN = r"(?:true|false|null|none|\d{1,6})(?=[\s'\",}]|$)"
VALUE = r"(?!['\"]?(?:" + PLAIN + r"|\*\*\*|--))(?:\"[^\"]*\"|'[^']*'|[^\s'\",}]+)"
PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), kept)
    for pattern, kept in (
        (r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*):[^\s/@'\"]+@", r"\1:***@"),
        (rf"([?&](?:{QUERY}|{NAME})=)[^&\s#'\"]+", r"\1***"),
        (r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", r"\1***"),
        (rf"(?<![\w-])(-{{0,2}}{NAME}['\"]?\s*[=:]\s*)(?!Bearer|Basic){VALUE}", r"\1***"),
        (rf"(?<![\w-])(--{NAME}(?:['\"],\s*|\s+)){VALUE}", r"\1***"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "***"),
        (r"(?-i:\b(?:AKIA|ASIA)[A-Z0-9]{16}\b)", "***"),
        (r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-)[\w-]{16,}", "***"),
        (r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}", "***"),
    )
)
OWN_NAME = re.compile(NAME, re.IGNORECASE)


def masked(text: str) -> str:
    """Returns the text with ``***`` instead of each secret."""
    for pattern, kept in PATTERNS:
        text = pattern.sub(kept, text)
    return text


def masked_command(words: Sequence[str]) -> str:
    """Returns a command line without secrets, also if a name and its value are two words."""
    shown = [masked(word) for word in words]
    for place, word in enumerate(words[:-1]):
        if word.startswith("--") and OWN_NAME.fullmatch(word[2:]) and not re.fullmatch(PLAIN, words[place + 1], re.I):
            shown[place + 1] = "***"
    return " ".join(shown)


def masked_values(values: Any, name: str = "") -> Any:
    """Returns nested dictionaries and lists without secrets in strings and without strings named like a secret."""
    if isinstance(values, dict):
        return {key: masked_values(value, str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [masked_values(value, name) for value in values]
    if isinstance(values, str):
        return "***" if values and OWN_NAME.fullmatch(name) else masked(values)
    return values


class MaskedFormatter(logging.Formatter):
    """Formats log records and their tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def copy_masked(source: IO[bytes], sink: TextIO) -> threading.Thread:
    """Copies the output of a process line by line without secrets, in a thread that ends with the output."""

    def copy() -> None:
        pending = b""
        while chunk := source.read1(65536):  # type: ignore[attr-defined]
            *whole, pending = re.split(rb"(?<=[\n\r])", pending + chunk)
            sink.write(masked(b"".join(whole).decode(errors="replace")))
            sink.flush()
        sink.write(masked(pending.decode(errors="replace")))
        sink.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def deny_other_writers() -> None:
    """Sets the umask so that other users cannot write the files of this process and its children."""
    os.umask(os.umask(0o077) | 0o002)
