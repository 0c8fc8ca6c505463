"""Storage tanks, industrial area, solar farm, wind farm, farmland."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from priorclip.data_shards.synthetic.dice import Rng, between, chance, count, pick, shuffled
from priorclip.data_shards.synthetic.facts import Company, Facts, Thing
from priorclip.data_shards.synthetic.ground import field_of
from priorclip.data_shards.synthetic.objects import chimney, flat_roof, gable, panel_row, tank, turbine
from priorclip.data_shards.synthetic.palette import colour_on, paint
from priorclip.data_shards.synthetic.placement import MAIN, WHOLE, Room, along, extent_for, layout_for, spots
from priorclip.data_shards.synthetic.regions import disc, rectangle
from priorclip.data_shards.synthetic.scenes.company import neighbour
from priorclip.data_shards.synthetic.sketch import Distance, Grid, Plane, Sketch, box, line


def storage_tanks(sketch: Sketch, rng: Rng) -> Facts:
    """Cylindrical tanks of one colour in a yard."""
    ground = pick(rng, ("grass", "soil", "concrete", "sand"))
    sketch.ground = ground
    number = count(rng, 1, 12)
    layout = layout_for(rng, number)
    colour = colour_on(rng, ground, ("white", "grey", "red", "blue", "green", "brown"))
    radius = {1: 0.15, 2: 0.11, 3: 0.088, 4: 0.076}.get(number, 0.062 if number <= 8 else 0.050)
    radius = extent_for(number, layout, MAIN, radius * 2.5) / 2.5
    places = spots(rng, number, layout, MAIN, radius * 2.5)
    for (u, v, _), (next_u, next_v, _) in pairwise(places):
        sketch.mark(line((u, v), (next_u, next_v), 0.008), (150, 144, 136))
    for u, v, _ in places:
        tank(sketch, u, v, radius, paint(rng, colour), rng)
    return Facts(Thing("tank", number, colour, layout), ground, [neighbour(sketch, rng, ground)])


def industrial(sketch: Sketch, rng: Rng) -> Facts:
    """Factory halls of one roof colour, chimneys, lorries."""
    ground = pick(rng, ("concrete", "asphalt", "soil"))
    sketch.ground = ground
    number = count(rng, 2, 6)
    layout = "row" if number <= 3 else "two rows"
    colour = colour_on(rng, ground, ("white", "blue", "red", "brown", "green", "grey"))
    lines = [number] if layout == "row" else [number // 2, number - number // 2]
    stacks = count(rng, 0, 3)
    for j, run in enumerate(lines):
        wide, deep = 0.70 / max(lines), (0.40 if len(lines) == 1 else 0.21)
        v = MAIN.v + (j - (len(lines) - 1) / 2) * 0.27
        for i in range(run):
            size = deep * between(rng, 0.8, 1.0)
            flat_roof(sketch, (i - (run - 1) / 2) * wide, v, wide * 0.80, size, 0, paint(rng, colour), rng, 0.05)
    sketch.rise()
    stand = MAIN.v if layout == "two rows" else MAIN.v - between(rng, 0.05, 0.12)
    for i in range(stacks):
        chimney(sketch, (i - (stacks - 1) / 2) * 0.22, stand, 0.024, 0.17)
    company = [Company("with", Thing("chimney", stacks))] if stacks else []
    company.append(neighbour(sketch, rng, ground, ("river", "road", "railway", "trees", "field", "pond")))
    return Facts(Thing("factory", number, colour, layout), ground, company)


def solar_farm(sketch: Sketch, rng: Rng) -> Facts:
    """Parallel rows of solar panels."""
    ground = pick(rng, ("grass", "dry grass", "soil", "sand"))
    sketch.ground = ground
    rows = count(rng, 3, 9)
    blocks = count(rng, 1, 2)
    pitch = min(0.085, 0.54 / rows)
    for i in range(rows):
        v = MAIN.v + (i - (rows - 1) / 2) * pitch
        for u in [0.0] if blocks == 1 else [-0.19, 0.19]:
            panel_row(sketch, u, v, 0.70 if blocks == 1 else 0.32, pitch * 0.56, 0)
    company = [Company("in", Thing("block", blocks))]
    company.append(
        neighbour(sketch, rng, ground, ("river", "road", "trees", "houses", "field", "pond", "sheds", "woods"))
    )
    return Facts(Thing("panel row", rows), ground, company)


def wind_farm(sketch: Sketch, rng: Rng) -> Facts:
    """Wind turbines on open land, connected by tracks."""
    ground = pick(rng, ("grass", "dry grass", "soil", "desert"))
    sketch.ground = ground
    number = count(rng, 1, 8)
    layout = layout_for(rng, number)
    radius = {1: 0.17, 2: 0.13, 3: 0.105}.get(number, 0.085)
    radius = extent_for(number, layout, MAIN, radius * 1.9) / 1.9
    places = spots(rng, number, layout, MAIN, radius * 1.9)
    for (u, v, _), (next_u, next_v, _) in pairwise(places):
        sketch.mark(line((u, v), (next_u, next_v), 0.012), (190, 178, 152))
    turn = between(rng, 0, 2)
    for u, v, _ in places:
        turbine(sketch, u, v, radius, turn + between(rng, 0, 2), radius * 1.5)
    company = neighbour(sketch, rng, ground, ("road", "trees", "houses", "field", "pond", "woods", "river"))
    return Facts(Thing("turbine", number, None, layout), ground, [company])


def farmland(sketch: Sketch, rng: Rng) -> Facts:
    """A patchwork of fields, or circles of irrigated crop, with a farm."""
    circles = chance(rng, 0.45)
    mixed: list[Company] = []
    colour = pick(rng, ("green", "yellow", "brown"))
    other = pick(rng, [name for name in ("green", "yellow", "brown") if name != colour])
    if circles:
        ground = pick(rng, [name for name in ("soil", "dry grass", "sand") if (colour, name) not in DULL])
        sketch.ground = ground
        number = count(rng, 1, 4)
        radius = {1: 0.30, 2: 0.17, 3: 0.14, 4: 0.155}[number]
        layout = layout_for(rng, number)
        room = WHOLE._replace(v=-0.06)
        radius = extent_for(number, layout, room, radius * 2.05) / 2.05
        for u, v, heading in spots(rng, number, layout, room, radius * 2.05):
            sketch.fill(disc(u, v, radius), field_of(rng, colour, heading), part="main")
            rim = (u + radius * math.cos(heading), v + radius * math.sin(heading))
            sketch.mark(line((u, v), rim, 0.008), (206, 202, 190))
        main = Thing("circle", number, colour, layout)
    else:
        ground = None
        number, others = count(rng, 1, 5), count(rng, 1, 4)
        strips = shuffled(rng, [True] * number + [False] * others)
        main = Thing("field", number, colour, "strips" if number > 1 else None)
        mixed = [Company("with", Thing("field", others, other))]
        edges = _edges(rng, len(strips))
        sketch.ground, sketch.ground_part = field_of(rng, colour, math.pi / 2), "main"
        second = [edges[i : i + 2] for i, first in enumerate(strips) if not first]
        sketch.fill(_stripes(second), field_of(rng, other, math.pi / 2))
        for edge in edges:
            sketch.mark(box(edge, 0, 0.016, 2.0), (118, 128, 84) if colour != "green" else (150, 130, 98))
    barns, roof = count(rng, 1, 4), colour_on(rng, ground or "soil", ("red", "white", "blue", "grey"))
    sketch.fill(rectangle(0, 0.33, 0.56, 0.17, 0, 0.03), "grass" if colour != "green" else "soil", 0.01)
    for u in along(barns, Room(0, 0, 0.5, 0)):
        gable(sketch, u, 0.33, 0.095, 0.075, 0, paint(rng, roof), "company")
    return Facts(main, ground, [*mixed, Company("with", Thing("farmhouse", barns, roof))])


def _edges(rng: Rng, strips: int) -> list[float]:
    """Returns the edges of strips of uneven width across the picture."""
    widths = [between(rng, 0.75, 1.25) for _ in range(strips)]
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + width / sum(widths))
    reach = 0.98
    return [(edge - 0.5) * reach for edge in edges]


def _stripes(spans: list[list[float]]) -> Distance:
    """Returns the strips of the picture between the given values of u."""

    def distance(grid: Grid) -> Plane:
        inside = [np.abs(grid.u - (low + high) / 2) - (high - low) / 2 for low, high in spans]
        return np.minimum.reduce(inside)

    return distance


DULL = {("brown", "soil"), ("yellow", "dry grass"), ("yellow", "sand")}
