"""Text of a data set in a picture: captions, keys and scenes are drawn as they stand, whatever they contain.

A caption of the web can hold formulas ($), letters that no font has, control characters, or half of a surrogate pair.
None of them may stop a picture or change its layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from priorclip.common.files import file_aside

LONGEST = 300  # letters; a picture has no room for more
DPI = 110


def printable(text: str, longest: int = LONGEST) -> str:
    """Returns one line: blanks for control characters, escapes for half surrogates, and "…" for what is too long."""
    text = " ".join(text[: 2 * longest].encode("utf-8", "backslashreplace").decode().split())
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yields a figure of so many inches, and writes it as PNG at the end. Text is no formula; a box is no warning."""
    with rc_context({"text.parse_math": False, "font.family": ["DejaVu Sans"]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with file_aside(path, durable=False) as aside:
            figure.savefig(aside, format="png")
