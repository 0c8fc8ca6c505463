"""The neighbours of the main thing, along the line v = 0.36, which all built scenes use.

company = neighbour(sketch, rng, "grass", ("river", "road", "trees"))    # draws it and returns its facts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from priorclip.data_shards.synthetic.dice import Rng, between, chance, count, pick
from priorclip.data_shards.synthetic.facts import Company, Thing
from priorclip.data_shards.synthetic.ground import field_of
from priorclip.data_shards.synthetic.objects import car, dashes, flat_roof, gable, rails, ship, train, tree, truck
from priorclip.data_shards.synthetic.palette import colour_on, paint
from priorclip.data_shards.synthetic.placement import Room, along
from priorclip.data_shards.synthetic.regions import band, beyond, blob, grown
from priorclip.data_shards.synthetic.sketch import Sketch

LINE = 0.36  # line of the neighbour
STRIP = Room(0.0, LINE, 0.58, 0.12)  # its part that is inside the picture at any turn
ROOFS = ("white", "red", "blue", "brown", "grey")
CARS = ("white", "red", "blue", "yellow", "black")


def _river(sketch: Sketch, rng: Rng, ground: str) -> Company:
    bend = between(rng, 0.012, 0.03)
    curve = {"bend": bend, "wave": between(rng, 0.8, 1.3), "phase": between(rng, 0, 6.3)}
    sketch.fill(band(LINE, 0.088, **curve), "sand" if ground != "sand" else "grass", rough=0.008, soft=0.02)
    sketch.fill(band(LINE, 0.070, **curve), "water", rough=0.008)
    number = count(rng, 0, 3)
    if not number:
        return Company("beside", Thing("river"))
    colour = pick(rng, ("white", "red", "orange"))
    for u in along(number, STRIP):
        heading = math.pi * chance(rng, 0.5) + between(rng, -0.12, 0.12)
        ship(sketch, u, LINE + between(rng, -0.01, 0.01), heading, 0.155, paint(rng, colour), "company")
    return Company("beside", Thing("river"), Thing("ship", number, colour))


def _road(sketch: Sketch, rng: Rng, ground: str) -> Company:
    sketch.fill(band(LINE, 0.068), "gravel", soft=0.01)
    sketch.fill(band(LINE, 0.058), "asphalt")
    dashes(sketch, LINE)
    number = count(rng, 0, 4)
    if not number:
        return Company("beside", Thing("road"))
    lorry = chance(rng, 0.4)
    colour = pick(rng, ("white", "red", "blue", "yellow"))
    for u in along(number, STRIP):
        lane = pick(rng, (-1, 1))
        draw, length = (truck, 0.125) if lorry else (car, 0.088)
        heading = 0.0 if lane > 0 else math.pi
        draw(sketch, u, LINE + lane * 0.029, heading, length, paint(rng, colour), "company")
    return Company("beside", Thing("road"), Thing("truck" if lorry else "car", number, colour))


def _railway(sketch: Sketch, rng: Rng, ground: str) -> Company:
    sketch.fill(band(LINE, 0.065), "gravel", soft=0.012)
    rails(sketch, LINE - 0.028)
    rails(sketch, LINE + 0.028)
    if chance(rng, 0.25):
        return Company("beside", Thing("railway"))
    colour = pick(rng, ("red", "blue", "yellow", "white", "green"))
    train(sketch, 0.0, LINE + 0.028 * pick(rng, (-1, 1)), 4, 0.0, paint(rng, colour), "company")
    return Company("beside", Thing("railway"), Thing("train", 1, colour))


def _trees(sketch: Sketch, rng: Rng, ground: str) -> Company:
    number = count(rng, 3, 8)
    for u in along(number, STRIP._replace(length=0.66)):
        tree(sketch, u, LINE + between(rng, -0.008, 0.008), between(rng, 0.033, 0.040), rng)
    return Company("beside", Thing("tree", number, None, "row"))


def _houses(sketch: Sketch, rng: Rng, ground: str) -> Company:
    number, colour = count(rng, 1, 5), colour_on(rng, ground, ROOFS)
    for u in along(number, STRIP):
        gable(sketch, u, LINE, 0.092, between(rng, 0.066, 0.078), 0.0, paint(rng, colour), "company")
    return Company("beside", Thing("house", number, colour, "row" if number > 1 else None))


def _sheds(sketch: Sketch, rng: Rng, ground: str) -> Company:
    number, colour = count(rng, 1, 3), colour_on(rng, ground, ROOFS)
    for u in along(number, STRIP):
        flat_roof(sketch, u, LINE, 0.165, 0.105, 0.0, paint(rng, colour), rng, 0.04, "company")
    return Company("beside", Thing("warehouse", number, colour))


def _field(sketch: Sketch, rng: Rng, ground: str) -> Company:
    colour = pick(rng, [name for name in ("green", "yellow", "brown") if (name, ground) not in ALIKE])
    sketch.fill(beyond(LINE - 0.09), "soil" if colour != "brown" else "grass")
    sketch.fill(beyond(LINE - 0.078), field_of(rng, colour, pick(rng, (0.0, math.pi / 2))))
    return Company("beside", Thing("field", 1, colour))


def _pond(sketch: Sketch, rng: Rng, ground: str) -> Company:
    where = blob(rng, between(rng, -0.12, 0.12), LINE, between(rng, 0.26, 0.34), 0.15)
    sketch.fill(where, "soil" if ground != "soil" else "grass", rough=0.004, soft=0.03)
    sketch.fill(grown(where, -0.014), "water", rough=0.004)
    return Company("beside", Thing("pond"))


def _woods(sketch: Sketch, rng: Rng, ground: str) -> Company:
    sketch.fill(
        beyond(LINE - 0.09, between(rng, 0.01, 0.02), between(rng, 0.5, 0.9), between(rng, 0, 6)),
        "forest",
        0.02,
    )
    return Company("beside", Thing("woods"))


ALIKE = {("green", "grass"), ("yellow", "dry grass"), ("yellow", "sand"), ("brown", "soil")}
NEIGHBOURS: dict[str, Callable[[Sketch, Rng, str], Company]] = {
    "river": _river,
    "road": _road,
    "railway": _railway,
    "trees": _trees,
    "houses": _houses,
    "sheds": _sheds,
    "field": _field,
    "pond": _pond,
    "woods": _woods,
}


def neighbour(sketch: Sketch, rng: Rng, ground: str, names: Sequence[str] = tuple(NEIGHBOURS)) -> Company:
    """Draws one of the named neighbours and return it as a fact."""
    return NEIGHBOURS[pick(rng, names)](sketch, rng, ground)
