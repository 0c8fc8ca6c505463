"""Dense and sparse residential, stadium, baseball field, tennis court, golf course."""

from __future__ import annotations

import math

from priorclip.data_shards.synthetic.dice import Rng, between, chance, count, pick, shuffled
from priorclip.data_shards.synthetic.facts import Company, Facts, Thing
from priorclip.data_shards.synthetic.ground import mown
from priorclip.data_shards.synthetic.objects import WHITE, car, court, dashes, gable, pool, stands, tree
from priorclip.data_shards.synthetic.palette import PAINT, colour_on, paint, shade
from priorclip.data_shards.synthetic.placement import MAIN, extent_for, layout_for, spots
from priorclip.data_shards.synthetic.regions import band, blob, grown, sector, union
from priorclip.data_shards.synthetic.scenes.company import neighbour
from priorclip.data_shards.synthetic.sketch import Sketch, box, line, oval, place

LAWN = ((82, 130, 60), (100, 150, 74))


def dense_residential(sketch: Sketch, rng: Rng) -> Facts:
    """Rows of houses under roofs of one colour along two or three streets."""
    ground = pick(rng, ("grass", "dry grass", "soil", "concrete"))
    sketch.ground = ground
    streets = count(rng, 2, 3)
    colour = colour_on(rng, ground, ("red", "brown", "white", "blue", "grey", "orange"))
    gap = 0.46 if streets == 2 else 0.32
    depth = 0.092 if streets == 2 else 0.074
    lines = [(i - (streets - 1) / 2) * gap for i in range(streets)]
    pools = count(rng, 0, 4)
    plots = []
    sketch.fill(union([band(v, 0.037) for v in lines]), "asphalt")
    for v in lines:
        dashes(sketch, v, (206, 206, 200), 0.04)
        for side in (-1, 1):
            for i in range(-6, 7):
                u = i * 0.112 + between(rng, -0.008, 0.008)
                row = v + side * (0.045 + depth / 2 + 0.012)
                gable(sketch, u, row, 0.088, depth * between(rng, 0.86, 1), 0.0, paint(rng, colour, 12))
                if abs(i) <= 2 and abs(v) < 0.3:
                    plots.append((u, row + side * (depth / 2 + 0.034)))
    cars, tone = count(rng, 0, 5), pick(rng, ("white", "red", "blue", "yellow"))
    slots = [(u, v) for v in lines if abs(v) < 0.3 for u in (-0.24, -0.12, 0.0, 0.12, 0.24)]
    for u, v in shuffled(rng, slots)[:cars]:
        side = pick(rng, (-1, 1))
        car(sketch, u, v + side * 0.018, math.pi * (side < 0), 0.07, paint(rng, tone), "company")
    plots = [plot for plot in plots if abs(plot[1]) < 0.36]
    for u, v in shuffled(rng, plots)[:pools]:
        pool(sketch, u, v, 0.056, 0)
    for _ in range(10):
        u, v = between(rng, -0.6, 0.6), pick(rng, lines) + pick(rng, (-1, 1)) * (0.045 + depth + 0.05)
        tree(sketch, u, v, between(rng, 0.016, 0.026), rng)
    company = [Company("along", Thing("street", streets))]
    if cars:
        company[0] = Company("along", Thing("street", streets), Thing("car", cars, tone))
    if pools:
        company.append(Company("with", Thing("pool", pools)))
    return Facts(Thing("house", 26 * streets, colour, "rows"), ground, company)


def sparse_residential(sketch: Sketch, rng: Rng) -> Facts:
    """A few detached houses with pools and trees."""
    ground = pick(rng, ("grass", "dry grass", "soil", "sand"))
    sketch.ground = ground
    number = count(rng, 1, 7)
    layout = layout_for(rng, number)
    colour = colour_on(rng, ground, ("red", "brown", "white", "blue", "grey", "orange"))
    extent = 0.25 if number <= 2 else 0.19 if number <= 4 else 0.165
    extent = extent_for(number, layout, MAIN, extent)
    pools = min(count(rng, 0, 2), number)
    places = spots(rng, number, layout, MAIN, extent)
    for i, (u, v, heading) in enumerate(places):
        length = min(0.17, extent * 0.66)
        if i < pools:
            pu, pv = place(((0, extent * 0.43),), u, v, heading)[0]
            pool(sketch, pu, pv, length * 0.46, heading)
        gable(sketch, u, v, length, length * between(rng, 0.62, 0.74), heading, paint(rng, colour))
    company = [Company("with", Thing("pool", pools))] if pools else []
    company.append(neighbour(sketch, rng, ground, ("river", "road", "trees", "field", "pond", "woods")))
    return Facts(Thing("house", number, colour, layout), ground, company)


def stadium(sketch: Sketch, rng: Rng) -> Facts:
    """A bowl of coloured seats around a pitch, round, oval or rectangular."""
    ground = pick(rng, ("grass", "concrete", "dry grass", "asphalt"))
    sketch.ground = ground
    shape = pick(rng, ("round", "oval", "rectangular"))
    colour = pick(rng, ("red", "blue", "yellow", "white", "orange", "green"))
    u, v, heading = between(rng, -0.04, 0.04), -0.09, 0.0
    length, width = {"round": (0.56, 0.56), "oval": (0.70, 0.50), "rectangular": (0.68, 0.50)}[shape]
    stands(sketch, u, v, length, width, heading, paint(rng, colour), 0 if shape == "rectangular" else 36)
    track = chance(rng, 0.5)
    inner_l, inner_w = length - width * 0.36, width * 0.64
    if shape == "rectangular":
        sketch.body(box(u, v, inner_l, inner_w), (176, 92, 66) if track else (78, 122, 60))
    else:
        sketch.body(oval(u, v, length * 0.66, width * 0.66), (176, 92, 66) if track else (78, 122, 60))
    pitch_l, pitch_w = (length * 0.44, width * 0.40) if shape != "rectangular" else (inner_l * 0.84, inner_w * 0.74)
    stripes = 8
    for i in range(stripes):
        x = (i + 0.5) / stripes - 0.5
        sketch.body(box(u + x * pitch_l, v, pitch_l / stripes, pitch_w), LAWN[i % 2], part="turf")
    _pitch_lines(sketch, u, v, pitch_l, pitch_w)
    company = [Company("around", Thing("pitch", kind="track" if track else None))]
    company.append(neighbour(sketch, rng, ground, ("river", "road", "railway", "trees", "houses", "pond")))
    return Facts(Thing("stand", 1, colour, kind=shape), ground, company)


def _pitch_lines(sketch: Sketch, u: float, v: float, length: float, width: float) -> None:
    for x, y, run, thick in (
        (0.0, -0.48, 0.96 * length, 0.006),
        (0.0, 0.48, 0.96 * length, 0.006),
        (-0.48, 0.0, 0.006, 0.96 * width),
        (0.48, 0.0, 0.006, 0.96 * width),
        (0.0, 0.0, 0.006, 0.96 * width),
    ):
        sketch.body(box(u + x * length, v + y * width, run, thick), WHITE)
    for i in range(12):
        a, b = i * math.pi / 6, (i + 1) * math.pi / 6
        r = width * 0.16
        sketch.body(
            line((u + r * math.cos(a), v + r * math.sin(a)), (u + r * math.cos(b), v + r * math.sin(b)), 0.005),
            WHITE,
        )


def baseball_field(sketch: Sketch, rng: Rng) -> Facts:
    """One to four diamonds of clay and lawn."""
    ground = pick(rng, ("grass", "dry grass", "concrete", "soil"))
    sketch.ground = ground
    number = count(rng, 1, 4)
    layout = layout_for(rng, number) if number != 4 else "grid"
    size = {1: 0.42, 2: 0.31, 3: 0.23, 4: 0.19}[number]
    if layout == "scattered":
        size = {2: 0.23, 3: 0.20}[number]
    facing, spread = pick(rng, (0, math.pi)), 1.05 if layout == "row" else 1.45
    size = extent_for(number, layout, MAIN, size * spread) / spread
    for u, v, heading in spots(rng, number, layout, MAIN, size * spread):
        turn = heading if layout in (None, "scattered") else facing
        home_u, home_v = place(((-size * 0.46, 0.0),), u, v, turn)[0]
        fan = [(0.0, 0.0)] + [
            (math.cos(a) * size, math.sin(a) * size) for a in (math.pi / 4 * (i / 6 - 1) for i in range(13))
        ]
        sketch.fill(sector(home_u, home_v, turn, size * 1.0), mown(LAWN[0], LAWN[1], turn, 5 / size))
        sketch.mark(place([(x * 0.62, y * 0.62) for x, y in fan], home_u, home_v, turn), (182, 112, 74), "main")
        diamond = [(0.0, 0.0), (0.27, 0.27), (0.54, 0.0), (0.27, -0.27)]
        sketch.mark(
            place([(0.06 + x * 0.82, y * 0.82) for x, y in diamond], home_u, home_v, turn, size),
            (98, 146, 72),
            "main+",
        )
        sketch.mark_disc(*place(((size * 0.29, 0),), home_u, home_v, turn)[0], size * 0.055, (182, 112, 74), "main+")
        for side in (-1, 1):
            far = place(((math.cos(math.pi / 4) * size, side * math.sin(math.pi / 4) * size),), home_u, home_v, turn)[0]
            sketch.mark(line((home_u, home_v), far, 0.007), WHITE)
        for x, y in diamond:
            cu, cv = place(((x, y),), home_u, home_v, turn, size)[0]
            sketch.mark(box(cu, cv, 0.014, 0.014, turn + math.pi / 4), WHITE, "main+")
    company = neighbour(sketch, rng, ground, ("river", "road", "trees", "houses", "pond", "railway", "woods"))
    return Facts(Thing("diamond", number, None, layout), ground, [company])


def tennis_court(sketch: Sketch, rng: Rng) -> Facts:
    """Courts of one surface colour, in rows."""
    ground = pick(rng, ("grass", "dry grass", "concrete", "soil"))
    sketch.ground = ground
    number = count(rng, 1, 8)
    colour = pick(rng, ("blue", "green", "red", "purple", "orange"))
    rim = pick(rng, [name for name in ("green", "red", "blue", "grey") if name != colour])
    layout = None if number == 1 else "row" if number <= 3 else "two rows"
    size = {1: 0.36, 2: 0.26, 3: 0.24, 4: 0.24}.get(number, 0.17 if number <= 6 else 0.15)
    pitch = size * (0.78 if layout else 1.0)
    lines = [number] if layout != "two rows" else [number // 2, number - number // 2]
    apron, tone = shade(PAINT[rim], 0.82), paint(rng, colour)
    for j, run in enumerate(lines):
        v = -0.09 + (j - (len(lines) - 1) / 2) * size * 1.42
        for i in range(run):
            court(sketch, (i - (run - 1) / 2) * pitch, v, size, math.pi / 2, tone, apron)
    company = neighbour(sketch, rng, ground, ("road", "trees", "houses", "pond", "railway", "sheds"))
    return Facts(
        Thing("court", number, colour, layout),
        ground,
        [Company("rimmed", Thing("surround", 1, rim)), company],
    )


def golf_course(sketch: Sketch, rng: Rng) -> Facts:
    """Fairways between trees, with sand bunkers and ponds."""
    sketch.ground = "grass"
    sketch.fill(
        band(0, 0.44, 0.06, 1.3, between(rng, 0, 6)),
        mown((92, 142, 66), (108, 158, 78), between(rng, 0, 3)),
        0.03,
    )
    bunkers, ponds, trees = count(rng, 1, 6), count(rng, 0, 2), count(rng, 3, 9)
    places = shuffled(rng, [(u, v) for u in (-0.23, 0.0, 0.23) for v in (-0.23, 0.0, 0.23)])
    green_u, green_v = places[0]
    sketch.fill(
        blob(rng, green_u, green_v, 0.26, 0.20, between(rng, 0, 3)),
        mown((132, 186, 92), (142, 196, 100), 0.5, 30),
        0.01,
        part="main",
    )
    sketch.mark_disc(green_u, green_v, 0.008, (250, 250, 250))
    if ponds:
        waters = [blob(rng, u, v, 0.24, 0.17, between(rng, 0, 3)) for u, v in places[1 : 1 + ponds]]
        sketch.fill(union(waters), "water", 0.004)
    pits = union(
        [
            blob(rng, u, v, between(rng, 0.13, 0.17), between(rng, 0.09, 0.12), between(rng, 0, 3))
            for u, v in places[1 + ponds : 1 + ponds + bunkers]
        ]
    )
    sketch.fill(grown(pits, 0.006), "lawn", 0.004)
    sketch.fill(pits, "sand", 0.004)
    rim = [(0.45 * math.cos(a), 0.45 * math.sin(a)) for a in (i * 2 * math.pi / trees + 0.3 for i in range(trees))]
    for u, v in rim:
        tree(sketch, u, v, between(rng, 0.032, 0.044), rng)
    company = [Company("with", Thing("bunker", bunkers)), Company("with", Thing("tree", trees))]
    if chance(rng, 0.7) and len(places) > 1 + ponds + bunkers:
        roof, (u, v) = pick(rng, ("red", "white", "blue", "brown")), places[-1]
        gable(sketch, u, v, 0.15, 0.09, between(rng, 0, 3), paint(rng, roof), "company")
        company.append(Company("near", Thing("clubhouse", 1, roof)))
    if ponds:
        company.insert(1, Company("with", Thing("pond", ponds)))
    return Facts(Thing("green"), None, company)
