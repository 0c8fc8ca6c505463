"""The facts of a picture as it was drawn, which captions put into words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MANY = 13  # captions say "many" from this number on


@dataclass(frozen=True)
class Thing:
    """Something in the scene.

    Args:
        noun: key of `vocabulary.NOUNS`
        count: exact number; captions say "many" from `MANY` on
        colour: name in `palette.PAINT` or an adjective of its kind ("dark green"), None if captions name none
        layout: name of a layout, None if captions name none
        kind: an adjective that separates it from others with the same noun ("round", "winding")
    """

    noun: str
    count: int = 1
    colour: str | None = None
    layout: str | None = None
    kind: str | None = None

    def asdict(self) -> dict[str, Any]:
        """Returns the fields that are set."""
        fields = {
            "noun": self.noun,
            "count": self.count,
            "colour": self.colour,
            "layout": self.layout,
            "kind": self.kind,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Company:
    """A thing and its relation to the main thing: ``beside`` a river, ``with`` a pond, ``around`` it, ``on`` it.

    Args:
        relation: key of `vocabulary.RELATIONS`
        thing: the neighbouring thing
        carrying: things on or along the neighbour, as ships on a river
    """

    relation: str
    thing: Thing
    carrying: Thing | None = None

    def asdict(self) -> dict[str, Any]:
        """Returns the relation, the thing and the things on it."""
        fields: dict[str, Any] = {"relation": self.relation, **self.thing.asdict()}
        if self.carrying:
            fields["carrying"] = self.carrying.asdict()
        return fields


@dataclass
class Facts:
    """The main thing, the ground under it and the other things."""

    main: Thing
    ground: str | None = None
    company: list[Company] = field(default_factory=list)

    def asdict(self, label: str) -> dict[str, Any]:
        """Returns all facts as plain JSON types."""
        return {
            "scene": label,
            "main": self.main.asdict(),
            "ground": self.ground,
            "company": [company.asdict() for company in self.company],
        }
