"""Makes text of others printable, because escape sequences in a caption, key, label or request can rule a terminal.

printable("a\\x1b[31m\\nb")      ->  "a\\\\x1b[31m\\nb": lines and tabs stay
one_line("a\\n  b\\x1b")         ->  "a b\\\\x1b"
indented("a\\nERROR forged")    ->  "a\\n    ERROR forged": no line of a message looks like the start of another one
figure_text("a $x$ b")          ->  "a \\$x\\$ b": matplotlib draws a dollar, and no formula
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")


def printable(text: str) -> str:
    """Returns the text with control, format and surrogate characters spelled out; lines and tabs stay."""
    return UNUSUAL.sub(lambda found: spelled(found[0]), text)


def spelled(letter: str) -> str:
    """Returns the letter, or its escape if it prints nothing and is no blank: ``"\\x1b"`` -> ``"\\\\x1b"``."""
    is_shown = letter.isprintable() or unicodedata.category(letter) == "Zs"
    return letter if is_shown else ascii(letter)[1:-1]


def one_line(text: str) -> str:
    """Returns the text as one printable line with single blanks."""
    return printable(" ".join(text.split()))


def figure_text(text: str, longest: int = 40) -> str:
    """Returns the text as one printable line of so many letters in which matplotlib reads no formula."""
    line = one_line(text)
    short = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return short.replace("$", r"\$")


def one_line_values(values: Any) -> Any:
    """Returns nested dictionaries and lists with each key and each string as one printable line."""
    if isinstance(values, dict):
        return {one_line_values(key): one_line_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [one_line_values(value) for value in values]
    return one_line(values) if isinstance(values, str) else values


def indented(text: str) -> str:
    """Returns the text with all lines but the first indented by four blanks or more."""
    return re.sub(r"\n(?! {4})", "\n    ", text)
