"""Loads a tokenizer of transformers that somebody else may have made, without code of its own.

    tokenizer = open_tokenizer("runs/demo/export")          # a folder, or a hub id

    ValueError: the tokenizer 'x' cannot be loaded (RecursionError: maximum recursion depth exceeded)

transformers is imported when the function runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from priorclip.common.hub import SCHEME, reading


def open_tokenizer(source: str) -> Any:
    """Returns the tokenizer of a folder or a hub id.

    Raises:
        OSError: there is no such folder, transformers cannot find it, or the hub cannot be reached
        ValueError: it is no folder, its files are damaged, or it needs code of its own; names the source
    """
    from transformers import AutoTokenizer

    source = source.removeprefix(SCHEME)
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"the tokenizer '{source}' is a file: name its folder")
    if not folder.exists() and is_path(source):
        raise FileNotFoundError(f"the tokenizer '{source}' does not exist")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"the tokenizer '{source}' cannot be loaded ({path.name} is no regular file)")
    try:
        # A tokenizer folder may name code of its own (auto_map): without False, transformers offers to run it.
        with reading(source):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises its own, some of them beside Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the tokenizer '{source}' cannot be loaded ({reason})") from error


def is_path(source: str) -> bool:
    """Tells whether a name cannot be an id of the hub, which is ``name`` or ``owner/name``."""
    return source.startswith((".", "~", "/")) or source.count("/") > 1
