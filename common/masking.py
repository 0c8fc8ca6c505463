"""Removes secrets from everything that a run writes, and write permission of other users from its files.

    masked("https://me:hunter2@host/a.tar?sig=9f&part=1")   ->  "https://***@host/a.tar?sig=***&part=1"
    masked("pipe:curl -u me:hunter2 https://host/a.tar")    ->  "pipe:curl -u *** https://host/a.tar"
    masked_values({"api_key": "abc", "lr": 0.1})            ->  {"api_key": "***", "lr": 0.1}

A secret is a value with the name of one (``...password``, ``...token``, ``...access_key`` ...), a string that looks
like a key of a well-known service, or a value in a place for secrets: of URLs (url_secrets.py) or commands
(command_secrets.py).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from typing import IO, Any, TextIO

from priorclip.common.command_secrets import mask_flags, mask_pipes
from priorclip.common.url_secrets import mask_urls

NAME = (
    r"(?:[\w.-]*(?:password|passwd|passphrase|secret|token|credentials?)|(?:[\w.-]*[_.-])?(?:api[_-]?key"
    r"|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|account[_-]?key|authorization|pwd|jwt|otp|pin|cookie"
    r"|bearer|sas|auth))"
)
HEADER = r"(?:proxy-)?authorization|(?:set-)?cookie"  # their values have blanks
# True, false, null and small numbers are settings and no secrets: ``instruction_token: true``.
PLAIN = r"(?:true|false|null|none|\d{1,6})(?=[\s'\",}]|$)"
VALUE = r"(?!['\"]?(?:" + PLAIN + r"|\*\*\*|--))(?:\"[^\"]*\"|'[^']*'|[^\s'\",}]+)"
PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), kept)
    for pattern, kept in (
        (rf"(?<![\w-])((?:{HEADER})['\"]?\s*[:=]\s*+['\"]?+)(?!\*\*\*|\d{{1,6}}\b)[^'\"\r\n]+", r"\1***"),
        (r"(?<![\w/@.+-])[\w.+-]+:[^\s/@:'\"{}\[\],]+@(?!sha\d)(?=[a-z\d])", "***@"),
        (r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", r"\1***"),
        (rf"(?<![\w.-])(-{{0,2}}{NAME}['\"]?\s*[=:]\s*){VALUE}", r"\1***"),
        (rf"(?<![\w.-])(--{NAME}(?:['\"],\s*|\s+)){VALUE}", r"\1***"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "***"),
        (r"(?-i:\b(?:AKIA|ASIA)[A-Z0-9]{16}\b)", "***"),
        (r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-)[\w-]{16,}", "***"),
        (r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}", "***"),
    )
)
UNFINISHED_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?!.*-----END)", re.DOTALL)
LONGEST_KEY = 1 << 16  # bytes
OWN_NAME = re.compile(NAME, re.IGNORECASE)


def masked(text: str) -> str:
    """Returns the text with ``***`` instead of each secret."""
    text = mask_flags(mask_urls(mask_pipes(text)))
    for pattern, kept in PATTERNS:
        text = pattern.sub(kept, text)
    return text


def masked_command(words: Sequence[str]) -> str:
    """Returns a command line without secrets, also if a name and its value are two words."""
    shown = [masked_option(before, word) for before, word in zip(["", *words], words, strict=False)]
    for place, word in enumerate(words[:-1]):
        following = words[place + 1]
        if word.startswith("--") and OWN_NAME.fullmatch(word[2:]) and not re.fullmatch(PLAIN, following, re.I):
            shown[place + 1] = "***"
        elif word.startswith("-"):
            before = words[place - 1] if place else ""
            if is_credential(before, word, following):
                shown[place + 1] = "***"
    return " ".join(shown)


def masked_option(before: str, word: str) -> str:
    """Returns a word without secrets; ``before`` is the one before it: ``sshpass`` makes ``-pSECRET`` one."""
    if before == "sshpass" and word.startswith("-p"):
        return mask_flags(f"{before} {word}").removeprefix(f"{before} ")
    return masked(word)


def is_credential(before: str, option: str, value: str) -> bool:
    """Tells whether the value of an option holds a credential; ``before`` is the word before the option."""
    return not mask_flags(f"{before} {option} '{value}'").endswith(f" '{value}'")


def masked_values(values: Any, name: str = "") -> Any:
    """Returns nested dictionaries and lists without secrets in keys and strings, and without values named like one.

    A mixture of corpora has its URLs as keys. If two keys are equal without their secrets, the later one gets a number.
    """
    if isinstance(values, dict):
        shown: dict[Any, Any] = {}
        for key, value in values.items():
            shown[_new_key(masked(key) if isinstance(key, str) else key, shown)] = masked_values(value, str(key))
        return shown
    if isinstance(values, list | tuple):
        return [masked_values(value, name) for value in values]
    if isinstance(values, str):
        return "***" if values and OWN_NAME.fullmatch(name) else masked(values)
    is_number = isinstance(values, int | float) and len(str(values)) > 6
    return "***" if is_number and OWN_NAME.fullmatch(name) else values


def _new_key(key: Any, known: dict[Any, Any]) -> Any:
    number = 2
    found = key
    while found in known:
        found, number = f"{key} ({number})", number + 1
    return found


def copy_masked(source: IO[bytes], sink: TextIO) -> threading.Thread:
    """Copies the output of a process line by line without secrets, in a thread that ends with the output."""

    def copy() -> None:
        pending = b""
        while chunk := source.read1(65536):  # type: ignore[attr-defined]
            *whole, pending = re.split(rb"(?<=[\n\r])", pending + chunk)
            lines = b"".join(whole)
            if len(lines) < LONGEST_KEY and UNFINISHED_KEY.search(lines):
                pending = lines + pending  # a key has several lines and is masked as one
                continue
            sink.write(masked(lines.decode(errors="replace")))
            sink.flush()
        sink.write(masked(pending.decode(errors="replace")))
        sink.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def deny_other_writers() -> None:
    """Sets the umask so that other users cannot write the files of this process and its children."""
    os.umask(os.umask(0o077) | 0o002)
