"""Scene classes by their names, which data sets spell in their own ways: ``Airport`` of RSICD is ``airport`` of RSITMD.

    distinct(["Airport", "airport", "Dense Residential", "denseresidential"])    # ["Airport", "Dense Residential"]
    ids = ClassIds(["Airport", "Dense Residential"])
    ids["airport"], ids["dense_residential"], ids["pond"], ids[None]             # 0, 1, -1, -1

Two spellings of one class would be negatives of each other in the Attribution loss, and a test class of another
spelling would not be tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

UNKNOWN = -1


def normalized(name: str) -> str:
    """Letters and digits of any script, in one case; the name itself where it has none."""
    return re.sub(r"[\W_]", "", name).casefold() or name


def unique_classes(names: Iterable[str]) -> list[str]:
    """Sorted names, of several spellings of one class the first."""
    found: dict[str, str] = {}
    for name in sorted(names):
        found.setdefault(normalized(name), name)
    return list(found.values())


class ClassIds:
    """The place of a class among ``names``, by this spelling or another; -1 for none of them, and for no class."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._exact = {name: place for place, name in enumerate(self.names)}
        self._plain = {normalized(name): place for place, name in reversed(list(enumerate(self.names)))}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str | None) -> int:
        if name is None:
            return UNKNOWN
        return self._exact.get(name, self._plain.get(normalized(name), UNKNOWN))
