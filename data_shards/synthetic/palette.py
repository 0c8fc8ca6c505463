"""The colours that captions name, and the grounds on which each is visible.

RGB in 0..255, in sunlight, before haze and sensor. The colours are so different that the palette entry nearest to an
object's mean colour is the one in its caption (tested).
"""

from __future__ import annotations

from collections.abc import Sequence

from priorclip.data_shards.synthetic.dice import Rng, between, pick

Rgb = tuple[float, float, float]

PAINT: dict[str, Rgb] = {
    "white": (238, 238, 234),
    "grey": (132, 134, 137),
    "black": (38, 38, 42),
    "red": (188, 42, 38),
    "orange": (232, 128, 34),
    "yellow": (238, 204, 48),
    "green": (44, 142, 76),
    "blue": (38, 88, 190),
    "brown": (122, 76, 46),
    "purple": (118, 62, 150),
}

# Grounds on which an object of this colour is hard to see.
MELTS: dict[str, frozenset[str]] = {
    "grass": frozenset({"green"}),
    "dry grass": frozenset({"yellow", "brown"}),
    "soil": frozenset({"brown", "orange"}),
    "sand": frozenset({"yellow", "white"}),
    "concrete": frozenset({"grey", "white"}),
    "asphalt": frozenset({"grey", "black"}),
    "water": frozenset({"green", "blue", "black"}),
    "forest": frozenset({"green", "black"}),
    "desert": frozenset({"orange", "yellow", "brown"}),
}


def paint(rng: Rng, name: str, spread: float = 8.0) -> Rgb:
    """Returns the named colour with a small random change."""
    shift = between(rng, -spread, spread)
    red, green, blue = PAINT[name]
    return red + shift, green + shift, blue + shift


def colour_on(rng: Rng, ground: str, names: Sequence[str]) -> str:
    """Returns one of the colour names that stands out from the ground."""
    return pick(rng, [name for name in names if name not in MELTS.get(ground, frozenset())])


def shade(colour: Rgb, factor: float) -> Rgb:
    """Returns the colour lighter (factor above 1) or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def blend(one: Rgb, other: Rgb, share: float) -> Rgb:
    """Returns the mix of two colours with the given share of the second."""
    return (
        one[0] + (other[0] - one[0]) * share,
        one[1] + (other[1] - one[1]) * share,
        one[2] + (other[2] - one[2]) * share,
    )
