"""Reads YAML that somebody else may have written: plain values, without names that stand for other values.

    settings = read_yaml(path, 1 << 20)                    # of a regular file of at most 1 MiB

    ValueError: run/config.yaml, line 7: the alias '*a' is refused because aliases can ask for more memory than there is

Twenty lines of aliases to aliases ask for gigabytes. Our own files have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from priorclip.common.untrusted_json import read_regular

# What PyYAML raises for a value that does not have the form of its tag, and for deep nesting.
DAMAGE = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


class PlainLoader(yaml.SafeLoader):
    """Builds plain values only, and refuses an alias."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ValueError(
                f"line {event.start_mark.line + 1}: the alias '*{event.anchor}' is refused because aliases can ask for "
                "more memory than there is"
            )
        return super().compose_node(parent, index)


def read_yaml(path: Path, most: int) -> Any:
    """Returns the content of a YAML file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read
        ValueError: it is no regular file, too large, no YAML, or has an alias; names the file
    """
    data = read_regular(path, most)
    try:
        return yaml.load(data, PlainLoader)
    except (*DAMAGE, yaml.YAMLError) as error:
        raise ValueError(f"{path}, {' '.join(str(error).split())}") from error
