"""Airport, harbour, bridge, overpass, roundabout, parking lot, railway station."""

from __future__ import annotations

import math

from priorclip.data_shards.synthetic.dice import Rng, between, chance, count, pick, shuffled
from priorclip.data_shards.synthetic.facts import Company, Facts, Thing
from priorclip.data_shards.synthetic.objects import (
    WHITE,
    car,
    dashes,
    flat_roof,
    plane,
    rails,
    ship,
    train,
    tree,
    truck,
)
from priorclip.data_shards.synthetic.palette import colour_on, paint
from priorclip.data_shards.synthetic.placement import MAIN, Room, along, extent_for, layout_for, spots
from priorclip.data_shards.synthetic.regions import band, beyond, disc, ray, rectangle, ring, union
from priorclip.data_shards.synthetic.scenes.company import CARS, LINE, STRIP, neighbour
from priorclip.data_shards.synthetic.sketch import Sketch, box, place


def airport(sketch: Sketch, rng: Rng) -> Facts:
    """Aircraft parked on an apron, by a runway or a terminal."""
    ground = pick(rng, ("grass", "dry grass", "sand"))
    sketch.ground = ground
    number = count(rng, 1, 8)
    layout = layout_for(rng, number)
    surface = pick(rng, ("concrete", "asphalt"))
    sketch.fill(rectangle(0, -0.10, 1.6 if chance(rng, 0.5) else 0.84, 0.60), surface)
    for i in range(-3, 4):
        sketch.mark(box(i * 0.14, -0.10, 0.004, 0.58), (150, 148, 142))
    colour = colour_on(rng, surface, ("white", "blue", "red", "yellow", "orange"))
    extent = extent_for(number, layout, MAIN, {1: 0.38, 2: 0.31, 3: 0.26, 4: 0.22}.get(number, 0.19))
    length = extent / 1.16
    for u, v, heading in spots(rng, number, layout, MAIN, extent):
        plane(sketch, u, v, heading, length, paint(rng, colour))
    if chance(rng, 0.55):
        sketch.fill(band(LINE, 0.075), "asphalt")
        dashes(sketch, LINE, WHITE, 0.06)
        for side in (-1, 1):
            sketch.mark(box(0, LINE + side * 0.064, 1.6, 0.006), (226, 226, 222))
        company = Company("beside", Thing("runway"))
    else:
        roof = colour_on(rng, ground, ("white", "grey", "blue", "red"))
        sketch.fill(rectangle(0, LINE, 0.74, 0.16), "concrete")
        flat_roof(sketch, 0, LINE, 0.62, 0.10, 0, paint(rng, roof), rng, 0.05, "company")
        company = Company("beside", Thing("terminal", 1, roof))
    return Facts(Thing("plane", number, colour, layout), surface, [company])


def harbour(sketch: Sketch, rng: Rng) -> Facts:
    """Boats at piers that start at a quay."""
    sketch.ground = "water"
    quay = pick(rng, ("concrete", "sand", "grass"))
    sketch.fill(beyond(0.28), quay)
    sketch.mark(box(0, 0.282, 1.6, 0.014), (206, 203, 196))
    piers = count(rng, 1, 4)
    wide = 0.64 / piers
    colour = pick(rng, ("white", "red", "orange", "yellow"))
    berths = []
    for u in along(piers, Room(0, 0, 0.70, 0)):
        sketch.body(box(u, -0.03, 0.034, 0.62), pick(rng, ((176, 160, 138), (190, 188, 182))), 0.012)
        length = min(0.19, max(0.13, wide * 0.42))
        for side in (-1, 1):
            berths += [
                (u + side * (0.025 + length / 2), v, 0.0 if side > 0 else math.pi, length)
                for v in (-0.25, -0.12, 0.01, 0.14)
            ]
    if piers >= 3:  # two neighbouring piers use the same water
        berths = [berth for i, berth in enumerate(berths) if (i // 4) % 2 == 0]
    number = count(rng, 1, min(12, len(berths)))
    for u, v, heading, length in shuffled(rng, berths)[:number]:
        ship(sketch, u, v + between(rng, -0.008, 0.008), heading, length, paint(rng, colour), wake=False)
    roof = colour_on(rng, quay, ("white", "red", "blue", "brown"))
    sheds = count(rng, 1, 3)
    for u in along(sheds, STRIP):
        flat_roof(sketch, u, 0.375, 0.15, 0.095, 0, paint(rng, roof), rng, 0.035, "company")
    return Facts(
        Thing("boat", number, colour),
        None,
        [Company("moored", Thing("pier", piers)), Company("near", Thing("warehouse", sheds, roof))],
    )


def bridge(sketch: Sketch, rng: Rng) -> Facts:
    """A road or rail bridge across water."""
    bank = pick(rng, ("grass", "dry grass", "sand", "forest", "soil"))
    sketch.ground = bank
    half = between(rng, 0.19, 0.27)
    sketch.fill(band(0, half + 0.03, 0.02, 0.9, between(rng, 0, 6)), "soil" if bank != "soil" else "sand", 0.012, 0.03)
    sketch.fill(band(0, half, 0.02, 0.9, between(rng, 0, 6)), "water", 0.012)
    bridges = count(rng, 1, 2)
    colour = pick(rng, ("white", "red", "blue", "yellow"))
    vehicles = count(rng, 0, 5)
    lorry = chance(rng, 0.4)
    places = [-0.17, 0.17] if bridges == 2 else [between(rng, -0.08, 0.08)]
    deck = 0.062
    for u in places:
        sketch.fill(band(-u, deck, angle=math.pi / 2), "asphalt")
        for side in (-1, 1):
            sketch.body(box(u + side * deck, 0, 0.014, 2 * half + 0.05), (214, 212, 206), 0.045, "main")
        sketch.body(box(u, 0, 2 * deck - 0.01, 2 * half + 0.05), (104, 105, 108), 0.045, "main")
        for i in range(14):
            where = (i - 6.5) * 0.1
            sketch.body(box(u, where, 0.007, 0.05), WHITE, part="main" if abs(where) < half else "")
    slots = [
        (u + side * 0.03, v, side) for u in places for v in (-0.3, -0.18, -0.06, 0.06, 0.18, 0.3) for side in (-1, 1)
    ]
    for u, v, side in shuffled(rng, slots)[:vehicles]:
        draw, length = (truck, 0.115) if lorry else (car, 0.088)
        draw(sketch, u, v, side * math.pi / 2, length, paint(rng, colour), "company")
    boats = count(rng, 0, 2)
    tone = pick(rng, ("white", "red", "orange"))
    for i in range(boats):
        ship(
            sketch,
            (0.36, -0.36)[i],
            between(rng, -0.06, 0.06),
            math.pi * chance(rng, 0.5),
            0.15,
            paint(rng, tone),
            "company",
        )
    company = []
    if vehicles:
        company.append(Company("carrying", Thing("truck" if lorry else "car", vehicles, colour)))
    company.append(Company("over", Thing("river"), Thing("boat", boats, tone) if boats else None))
    return Facts(Thing("bridge", bridges), bank, company)


def overpass(sketch: Sketch, rng: Rng) -> Facts:
    """Two or three highways that cross on different levels."""
    ground = pick(rng, ("grass", "dry grass", "soil", "forest"))
    sketch.ground = ground
    roads = count(rng, 2, 3)
    half = 0.075
    turns = [0.0, between(rng, 1.2, 1.9)] if roads == 2 else [0.0, between(rng, 0.9, 1.2), between(rng, 1.95, 2.25)]
    ramps = roads == 2 and chance(rng, 0.6)
    offsets = [0.0 if ramps else between(rng, -0.08, 0.08) for _ in turns]
    if ramps:
        _loops(sketch, turns[1], half)
    for turn, offset in zip(turns, offsets, strict=True):
        sketch.fill(band(offset, half, angle=turn), "asphalt", part="main")
    for level, (turn, offset) in enumerate(zip(turns, offsets, strict=True)):
        _highway(sketch, turn, offset, half, level)
    number, lorry, colour = count(rng, 1, 8), chance(rng, 0.3), pick(rng, ("white", "red", "blue", "yellow"))
    sketch.rise()
    lanes = [(u, v) for u in (-0.36, -0.24, -0.12, 0.0, 0.12, 0.24, 0.36) for v in (-0.75, -0.25, 0.25, 0.75)]
    apart = [lane for i, lane in enumerate(lanes) if (i // 4 + i) % 2]
    for along_road, lane in shuffled(rng, apart)[:number]:
        u, v = place(((along_road, offsets[-1] + lane * half),), 0, 0, turns[-1])[0]
        draw, length = (truck, 0.11) if lorry else (car, 0.08)
        draw(sketch, u, v, turns[-1] + math.pi * (lane < 0), length, paint(rng, colour), "company")
    return Facts(
        Thing("highway", roads, kind="looped" if ramps else None),
        ground,
        [Company("carrying", Thing("truck" if lorry else "car", number, colour))],
    )


def _highway(sketch: Sketch, turn: float, offset: float, half: float, level: int) -> None:
    """Draws a dual carriageway along ``turn``: on the ground at level 0, otherwise on a deck with a shadow."""
    u, v = place(((0.0, offset),), 0, 0, turn)[0]
    if level:
        sketch.rise()
        sketch.body(box(u, v, 1.7, 2 * half + 0.02, turn), (196, 194, 188), 0.02 + 0.03 * level, "main")
        sketch.body(box(u, v, 1.7, 2 * half, turn), (102, 103, 106), part="main")
    pen = sketch.body if level else sketch.mark
    pen(box(u, v, 1.7, 0.014, turn), (188, 184, 170), part="main+")
    for side in (-0.5, 0.5):
        for i in range(14):
            at_u, at_v = place((((i - 6.5) * 0.11, side * half),), u, v, turn)[0]
            pen(box(at_u, at_v, 0.05, 0.006, turn), WHITE, part="main+")


def _loops(sketch: Sketch, turn: float, half: float) -> None:
    """Draws the four loop ramps of a cloverleaf, each of which touches both highways."""
    radius, lane = 0.105, 0.024
    inside, ramps = [], []
    for quarter in range(4):
        opening = turn if quarter % 2 == 0 else math.pi - turn
        bisector = turn / 2 + quarter * math.pi / 2
        away = (radius + half * 0.75) / math.sin(opening / 2)
        u, v = away * math.cos(bisector), away * math.sin(bisector)
        inside.append(disc(u, v, radius - lane))
        ramps.append(ring(u, v, radius, lane))
    sketch.fill(union(inside), "lawn", opacity=0.6)
    sketch.fill(union(ramps), "asphalt")


def roundabout(sketch: Sketch, rng: Rng) -> Facts:
    """A circular junction of three to six roads around an island."""
    ground = pick(rng, ("grass", "dry grass", "soil", "concrete"))
    sketch.ground = ground
    arms = count(rng, 3, 6)
    radius, half = between(rng, 0.19, 0.22), 0.055
    headings = [2 * math.pi * i / arms + between(rng, -0.06, 0.06) for i in range(arms)]
    arms_and_ring = [*(ray(0, 0, heading, half) for heading in headings), disc(0, 0, radius + half)]
    sketch.fill(union(arms_and_ring), "asphalt")
    sketch.name(disc(0, 0, radius + half), "main")
    island = pick(rng, [name for name in ("grass", "sand", "water") if name != ground])
    sketch.fill(disc(0, 0, radius - half + 0.012), "concrete")
    sketch.fill(disc(0, 0, radius - half), island)
    for heading in headings:
        for i in range(4):
            away = radius + half + 0.05 + i * 0.09
            sketch.mark(box(math.cos(heading) * away, math.sin(heading) * away, 0.045, 0.007, heading), WHITE)
    if island == "grass":
        tree(sketch, 0, 0, 0.045, rng)
    number, colour = count(rng, 1, 8), pick(rng, ("white", "red", "blue", "yellow"))
    slots = [
        (radius * math.cos(a), radius * math.sin(a), a + math.pi / 2) for a in (i * math.pi / 4 + 0.2 for i in range(8))
    ]
    for u, v, heading in shuffled(rng, slots)[:number]:
        car(sketch, u, v, heading, 0.085, paint(rng, colour), "company")
    for heading in headings:
        side = heading + math.pi / arms
        if ground != "concrete":
            tree(sketch, 0.42 * math.cos(side), 0.42 * math.sin(side), between(rng, 0.03, 0.045), rng)
    islands = {"grass": "green", "sand": "sandy", "water": "fountain"}
    return Facts(
        Thing("roundabout", 1),
        ground,
        [
            Company("joining", Thing("road", arms)),
            Company("carrying", Thing("car", number, colour)),
            Company("around", Thing("island", 1, kind=islands[island])),
        ],
    )


def parking_lot(sketch: Sketch, rng: Rng) -> Facts:
    """Cars of one colour between the lines of a car park."""
    ground = pick(rng, ("grass", "dry grass", "soil", "sand"))
    sketch.ground = ground
    surface = pick(rng, ("asphalt", "concrete"))
    sketch.fill(rectangle(0, -0.08, 0.80, 0.58), surface)
    rows, columns = 3, 6
    stalls = [(u, v) for v in (-0.27, -0.08, 0.11) for u in along(columns, Room(0, 0, 0.70, 0))]
    for v in (-0.27, -0.08, 0.11):
        for i in range(columns + 1):
            sketch.mark(box((i / columns - 0.5) * 0.70, v, 0.006, 0.14), WHITE)
    number = pick(rng, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 17))
    colour = colour_on(rng, surface, CARS)
    for u, v in shuffled(rng, stalls)[: min(number, rows * columns)]:
        heading = math.pi / 2 + math.pi * chance(rng, 0.5)
        car(sketch, u, v + between(rng, -0.008, 0.008), heading, 0.125, paint(rng, colour), "main")
    company = neighbour(sketch, rng, ground, ("trees", "houses", "sheds", "pond", "railway", "woods"))
    return Facts(Thing("car", number, colour), surface, [company])


def railway_station(sketch: Sketch, rng: Rng) -> Facts:
    """Parallel tracks, platforms, trains, a station roof."""
    ground = pick(rng, ("grass", "dry grass", "concrete", "soil"))
    sketch.ground = ground
    tracks = count(rng, 3, 7)
    pitch = 0.066
    low = -0.10 - (tracks - 1) / 2 * pitch
    sketch.fill(band(-0.10, (tracks / 2) * pitch + 0.02), "gravel", soft=0.012)
    for i in range(tracks):
        rails(sketch, low + i * pitch)
    trains = count(rng, 1, min(4, tracks))
    colour = pick(rng, ("red", "blue", "yellow", "white", "green", "orange"))
    for i in shuffled(rng, range(tracks))[:trains]:
        train(sketch, between(rng, -0.1, 0.1), low + i * pitch, count(rng, 3, 5), 0, paint(rng, colour), "main")
    roof = colour_on(rng, ground, ("white", "red", "blue", "brown", "grey"))
    sketch.fill(rectangle(0, 0.30, 1.6, 0.30), "concrete")
    flat_roof(sketch, 0, LINE, between(rng, 0.4, 0.56), 0.11, 0, paint(rng, roof), rng, 0.04, "company")
    return Facts(
        Thing("train", trains, colour),
        ground,
        [Company("among", Thing("track", tracks)), Company("beside", Thing("station", 1, roof))],
    )
