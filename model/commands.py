"""The options of `python -m model`: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from typing import Any

COMMANDS: dict[str, type[Any]] = {}
