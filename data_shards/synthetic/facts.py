"""What a picture shows, as drawn: the truth that captions put into words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MANY = 13  # from here on captions say "many"


@dataclass(frozen=True)
class Thing:
    """Something in the scene.

    Args:
        noun: key of `vocabulary.NOUNS`
        count: how many, exactly; captions say "many" from `MANY`
        colour: name in `palette.PAINT` or an adjective of its kind ("dark green"), None where captions name none
        layout: name of a layout, None where captions name none
        kind: an adjective that tells it from others of its noun ("round", "winding")
    """

    noun: str
    count: int = 1
    colour: str | None = None
    layout: str | None = None
    kind: str | None = None

    def asdict(self) -> dict[str, Any]:
        """Return the fields that are set."""
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
    """A thing and how it goes with the main one: ``beside`` a river, ``with`` a pond, ``around`` it, ``on`` it.

    Args:
        relation: key of `vocabulary.RELATIONS`
        thing: the neighbour
        carrying: things on or along the neighbour, as ships on a river
    """

    relation: str
    thing: Thing
    carrying: Thing | None = None

    def asdict(self) -> dict[str, Any]:
        """Return relation, thing and what it carries."""
        fields: dict[str, Any] = {"relation": self.relation, **self.thing.asdict()}
        if self.carrying:
            fields["carrying"] = self.carrying.asdict()
        return fields


@dataclass
class Facts:
    """The main thing, the ground under it and its company."""

    main: Thing
    ground: str | None = None
    company: list[Company] = field(default_factory=list)

    def asdict(self, label: str) -> dict[str, Any]:
        """Return all facts as plain JSON types."""
        return {
            "scene": label,
            "main": self.main.asdict(),
            "ground": self.ground,
            "company": [company.asdict() for company in self.company],
        }
