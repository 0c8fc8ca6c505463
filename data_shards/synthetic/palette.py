"""Colours that captions name, and which of them can be told from which ground.

RGB in 0..255, as sunlit and before haze and sensor. The names are far enough apart that the nearest palette entry of an
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

# What an object of that colour would melt into on that ground.
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
    """Return the named colour, a little off, as no two coats of paint are alike."""
    shift = between(rng, -spread, spread)
    red, green, blue = PAINT[name]
    return red + shift, green + shift, blue + shift


def colour_on(rng: Rng, ground: str, names: Sequence[str]) -> str:
    """Return one of the colour names that stands out from the ground."""
    return pick(rng, [name for name in names if name not in MELTS.get(ground, frozenset())])


def shade(colour: Rgb, factor: float) -> Rgb:
    """Return the colour lighter (factor above 1) or darker."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def blend(one: Rgb, other: Rgb, share: float) -> Rgb:
    """Return the mix of two colours with the given share of the second."""
    return (
        one[0] + (other[0] - one[0]) * share,
        one[1] + (other[1] - one[1]) * share,
        one[2] + (other[2] - one[2]) * share,
    )
