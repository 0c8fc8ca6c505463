"""A notebook as Markdown: its texts, its code, and the outputs that it was stored with.

tutorial.ipynb    ->    text, ```python code ```, ```text output ```, ![](tutorial-10-0.jpg)
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

PICTURES = {"image/jpeg": "jpg", "image/png": "png"}


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by name."""
    pictures: dict[str, bytes] = {}
    blocks = []
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "markdown":
            blocks.append(cell.source)
            continue
        blocks.append(code(cell.source))
        for place, output in enumerate(cell.outputs):
            if output.output_type == "stream":
                blocks.append(f"```text\n{output.text.rstrip()}\n```")
            for suffix, data in pictures_of(output):
                name = f"{path.stem}-{number}-{place}.{suffix}"
                pictures[name] = data
                blocks.append(f"![output of the code above]({name})")
    return "\n\n".join(blocks) + "\n", pictures


def code(source: str) -> str:
    first, _, rest = source.partition("\n")
    return f"```bash\n{rest}\n```" if first == "%%bash" else f"```python\n{source}\n```"


def pictures_of(output: Any) -> Iterator[tuple[str, bytes]]:
    for kind, suffix in PICTURES.items():
        if kind in output.get("data", {}):
            yield suffix, base64.b64decode(output.data[kind])
