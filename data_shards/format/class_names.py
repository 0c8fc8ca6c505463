"""Scene classes by name. Data sets spell them differently: ``Airport`` in RSICD is ``airport`` in RSITMD.

    unique_classes(["Airport", "airport", "Dense Residential", "denseresidential"])  # ["Airport", "Dense Residential"]
    ids = ClassIds(["Airport", "Dense Residential"])
    ids["airport"], ids["dense_residential"], ids["pond"], ids[None]             # 0, 1, -1, -1

Two spellings of one class would be negatives of each other in the Attribution loss, and a test class with another
spelling would not be tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

UNKNOWN = -1


def normalized(name: str) -> str:
    """Returns the letters and digits of a name, in lower case; the name itself if it has none."""
    return re.sub(r"[\W_]", "", name).casefold() or name


def is_number(label: str) -> bool:
    """Tells whether a label is the number of a class and not its name: "a picture of a 0" says nothing."""
    return label.strip().isdigit()


def unique_classes(names: Iterable[str]) -> list[str]:
    """Returns sorted names; of several spellings of one class, the first."""
    found: dict[str, str] = {}
    for name in sorted(names):
        found.setdefault(normalized(name), name)
    return list(found.values())


class ClassIds:
    """Maps a class, in any spelling, to its index in ``names``; -1 for an unknown class and for None."""

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
