"""Draws things seen from above into a `Sketch`. Each function takes the place, the heading and the paint.

Sizes are in scene sides. `part` names the pixels that have the colour in the captions, and `detail(part)` the others of
the thing, such as the windows of a car.
"""

from __future__ import annotations

import math
from itertools import pairwise

from priorclip.data_shards.synthetic.dice import Rng, between, pick
from priorclip.data_shards.synthetic.palette import PAINT, Rgb, blend, shade
from priorclip.data_shards.synthetic.sketch import Point, Sketch, box, detail, line, oval, place

GLASS: Rgb = (44, 54, 66)
WHITE: Rgb = (236, 237, 235)
WATER_BLUE: Rgb = (70, 168, 196)
TRUNKS: tuple[Rgb, ...] = ((50, 78, 42), (60, 88, 46), (44, 70, 44), (72, 94, 50))


def _mirrored(side: tuple[Point, ...]) -> tuple[Point, ...]:
    """Returns an outline symmetric about its length from the points of one side."""
    return side + tuple((x, -y) for x, y in reversed(side) if y)


FUSELAGE = _mirrored(((0.5, 0), (0.46, 0.035), (0.36, 0.05), (-0.34, 0.045), (-0.5, 0.012)))
WINGS = _mirrored(((0.12, 0.04), (-0.14, 0.48), (-0.21, 0.48), (-0.08, 0.04)))
TAIL = _mirrored(((-0.36, 0.03), (-0.46, 0.19), (-0.51, 0.19), (-0.47, 0.02)))
HULL = _mirrored(((0.5, 0), (0.34, 0.5), (0.1, 0.62), (-0.44, 0.56), (-0.5, 0.42)))


def plane(sketch: Sketch, u: float, v: float, heading: float, length: float, colour: Rgb) -> None:
    """An airliner: swept wings, engines, tail."""
    wing = shade(colour, 0.90)
    sketch.body(place(WINGS, u, v, heading, length), wing, 0.035, "main")
    for x, y in ((0.06, 0.17), (0.06, -0.17), (-0.02, 0.31), (-0.02, -0.31)):
        cu, cv = place(((x, y),), u, v, heading, length)[0]
        sketch.body(box(cu, cv, 0.10 * length, 0.045 * length, heading), shade(colour, 0.62), 0, "main")
    sketch.body(place(TAIL, u, v, heading, length), wing, 0.03, "main")
    sketch.body(place(FUSELAGE, u, v, heading, length), colour, 0.035, "main")
    sketch.body(place(((0.43, 0.022), (0.46, 0), (0.43, -0.022), (0.41, 0)), u, v, heading, length), GLASS, 0, "main+")


def ship(
    sketch: Sketch,
    u: float,
    v: float,
    heading: float,
    length: float,
    colour: Rgb,
    part: str = "main",
    wake: bool = True,
) -> None:
    """A ship: hull, deck, bridge at the stern, hatches, and a wake if it moves."""
    beam = 0.30
    hull = [(x, y * beam) for x, y in HULL]
    if wake:
        foam = [(-0.45, 0.10), (-0.9, 0.18), (-0.9, -0.18), (-0.45, -0.10)]
        sketch.mark(place(foam, u, v, heading, length), (112, 138, 144))
    sketch.body(place(hull, u, v, heading, length), colour, 0.02, part)
    sketch.body(place(hull, u, v, heading, length * 0.80), shade(colour, 0.86), 0, part)
    pale = WHITE if sum(colour) < 620 else (120, 122, 126)
    cu, cv = place(((-0.30, 0),), u, v, heading, length)[0]
    sketch.body(box(cu, cv, 0.15 * length, 0.20 * length, heading), pale, 0, detail(part))
    for x in (0.0, 0.16):
        cu, cv = place(((x, 0),), u, v, heading, length)[0]
        sketch.body(box(cu, cv, 0.09 * length, 0.15 * length, heading), shade(colour, 0.66), 0, detail(part))


def car(sketch: Sketch, u: float, v: float, heading: float, length: float, colour: Rgb, part: str = "") -> None:
    """A car: body, windscreen, rear window."""
    sketch.body(box(u, v, length, length * 0.48, heading), colour, 0.010, part)
    for x, size in ((0.16, 0.13), (-0.30, 0.09)):
        cu, cv = place(((x, 0),), u, v, heading, length)[0]
        sketch.body(box(cu, cv, size * length, 0.34 * length, heading), GLASS, 0, detail(part))


def truck(sketch: Sketch, u: float, v: float, heading: float, length: float, colour: Rgb, part: str = "") -> None:
    """A lorry: coloured trailer, pale cab."""
    cu, cv = place(((-0.10, 0),), u, v, heading, length)[0]
    sketch.body(box(cu, cv, 0.78 * length, 0.34 * length, heading), colour, 0.020, part)
    cu, cv = place(((0.40, 0),), u, v, heading, length)[0]
    sketch.body(box(cu, cv, 0.17 * length, 0.30 * length, heading), (206, 208, 210), 0.014)


def tank(sketch: Sketch, u: float, v: float, radius: float, colour: Rgb, rng: Rng) -> None:
    """A cylindrical storage tank with a rim, a shaded roof and a stair."""
    sketch.mark_disc(u, v, radius * 1.22, (128, 118, 106))
    sketch.disc(u, v, radius, shade(colour, 0.80), radius * 0.85, "main")
    sketch.disc(u, v, radius * 0.93, colour, 0, "main")
    lee_u, lee_v = sketch.lee
    sketch.disc(u - lee_u * radius * 0.10, v - lee_v * radius * 0.10, radius * 0.74, shade(colour, 1.06), 0, "main")
    sketch.disc(u, v, radius * 0.10, shade(colour, 0.7), 0, "main+")
    turn = between(rng, 0, 2 * math.pi)
    stair = [
        (u + math.cos(turn + i * 0.3) * radius * 0.97, v + math.sin(turn + i * 0.3) * radius * 0.97) for i in range(5)
    ]
    for start, end in pairwise(stair):
        sketch.body(line(start, end, radius * 0.09), shade(colour, 0.60), 0, "main+")


def gable(
    sketch: Sketch,
    u: float,
    v: float,
    length: float,
    width: float,
    heading: float,
    colour: Rgb,
    part: str = "main",
) -> None:
    """A house under a pitched roof: two slopes, with the sunny one brighter."""
    lee_u, lee_v = sketch.lee
    facing = -math.sin(heading) * lee_u + math.cos(heading) * lee_v
    near, far = shade(colour, 1.0 - 0.22 * facing), shade(colour, 1.0 + 0.22 * facing)
    height = min(length, width) * 0.42
    sketch.body(box(u, v, length, width, heading), near, height, part)
    half = place(
        ((-length / 2, -width / 2), (length / 2, -width / 2), (length / 2, 0), (-length / 2, 0)),
        u,
        v,
        heading,
    )
    sketch.body(half, far, 0, part)
    ridge = place(((-length / 2, 0), (length / 2, 0)), u, v, heading)
    sketch.body(line(ridge[0], ridge[1], width * 0.06), shade(colour, 1.12), 0, part)


def flat_roof(
    sketch: Sketch,
    u: float,
    v: float,
    length: float,
    width: float,
    heading: float,
    colour: Rgb,
    rng: Rng,
    height: float = 0.05,
    part: str = "main",
) -> None:
    """A large building under a flat roof: parapet, seams, vents."""
    sketch.body(box(u, v, length, width, heading), shade(colour, 0.74), height, part)
    sketch.body(box(u, v, length - 0.012, width - 0.012, heading), colour, 0, part)
    seams = max(2, int(length / 0.045))
    for i in range(1, seams):
        cu, cv = place(((length * (i / seams - 0.5), 0),), u, v, heading)[0]
        sketch.body(box(cu, cv, 0.004, width - 0.012, heading), shade(colour, 0.90), 0, part)
    for _ in range(2):
        x, y = between(rng, -0.32, 0.32) * length, between(rng, -0.3, 0.3) * width
        cu, cv = place(((x, y),), u, v, heading)[0]
        sketch.body(box(cu, cv, 0.022, 0.016, heading), (196, 198, 200), 0.008, detail(part))


def tree(sketch: Sketch, u: float, v: float, radius: float, rng: Rng, colour: Rgb | None = None) -> None:
    """A free-standing tree: crown, lit side, shadow."""
    dark = colour or shade(pick(rng, TRUNKS), between(rng, 0.85, 1.15))
    lee_u, lee_v = sketch.lee
    sketch.disc(u, v, radius, shade(dark, 0.86), radius * 0.9, "tree")
    shift = radius * 0.28
    sketch.disc(u - lee_u * shift, v - lee_v * shift, radius * 0.64, shade(dark, 1.22), 0, "tree")
    sketch.disc(u - lee_u * shift * 1.5, v - lee_v * shift * 1.5, radius * 0.28, shade(dark, 1.42), 0, "tree")


def bush(sketch: Sketch, u: float, v: float, radius: float, rng: Rng) -> None:
    """A shrub that no caption mentions: one crown and its shadow."""
    sketch.disc(u, v, radius, shade(pick(rng, TRUNKS), between(rng, 0.95, 1.3)), radius * 0.7, "bush")


def pool(sketch: Sketch, u: float, v: float, length: float, heading: float) -> None:
    """A swimming pool with a pale rim."""
    sketch.mark(box(u, v, length * 1.22, length * 0.76, heading), (222, 218, 208))
    sketch.mark(box(u, v, length, length * 0.54, heading), WATER_BLUE, "pool")


def turbine(sketch: Sketch, u: float, v: float, radius: float, turn: float, height: float) -> None:
    """A wind turbine: long shadow of the tower, shadow of the rotor, three white blades."""
    lee_u, lee_v = sketch.lee
    reach = height * sketch.shadow_length
    sketch.mark_disc(u, v, 0.020, (196, 188, 172))
    sketch.shadow(line((u, v), (u + lee_u * reach, v + lee_v * reach), 0.010))
    for i in range(3):
        angle = turn + i * 2 * math.pi / 3
        blade = ((0.0, 0.09), (0.25, 0.12), (1.0, 0.02), (1.0, -0.02), (0.0, -0.09))
        sketch.shadow(place(blade, u + lee_u * reach, v + lee_v * reach, angle, radius * 0.9))
    for i in range(3):
        angle = turn + i * 2 * math.pi / 3
        blade = ((0.0, 0.09), (0.25, 0.12), (1.0, 0.03), (1.0, -0.03), (0.0, -0.09))
        sketch.body(place(blade, u, v, angle, radius), PAINT["white"], 0, "main")
    sketch.disc(u, v, radius * 0.16, (250, 250, 250), 0, "main")


def train(sketch: Sketch, u: float, v: float, wagons: int, heading: float, colour: Rgb, part: str = "train") -> None:
    """A train of wagons along ``heading``, centred at a place."""
    pitch, length, width = 0.125, 0.116, 0.040
    for i in range(wagons):
        cu, cv = place((((i - (wagons - 1) / 2) * pitch, 0),), u, v, heading)[0]
        sketch.body(box(cu, cv, length, width, heading), shade(colour, 0.80), 0.022, part)
        sketch.body(box(cu, cv, length - 0.008, width * 0.62, heading), shade(colour, 1.04), 0, part)
        sketch.body(box(cu, cv, length * 0.16, width * 0.34, heading), shade(colour, 0.70), 0, detail(part))


def rails(sketch: Sketch, v: float, heading: float = 0.0, reach: float = 1.6) -> None:
    """Two rails on sleepers along the line at ``v``."""
    for side in (-0.011, 0.011):
        start, end = place(((-reach / 2, v + side), (reach / 2, v + side)), 0, 0, heading)
        sketch.mark(line(start, end, 0.006), (78, 68, 62))


def dashes(sketch: Sketch, v: float, colour: Rgb = WHITE, length: float = 0.05, reach: float = 1.5) -> None:
    """A dashed centre line along ``v``."""
    steps = int(reach / (2 * length))
    for i in range(steps):
        sketch.mark(box((i + 0.5 - steps / 2) * 2 * length, v, length, 0.007), colour)


def umbrella(sketch: Sketch, u: float, v: float, radius: float, colour: Rgb, rng: Rng) -> None:
    """A beach umbrella: eight panels, a towel beside it."""
    turn = between(rng, 0, math.pi)
    sketch.mark(box(u + 1.5 * radius, v + 0.3 * radius, radius * 1.5, radius * 0.6, turn), (226, 226, 220))
    sketch.disc(u, v, radius, colour, radius * 0.8, "main")
    for i in range(4):
        angle = turn + i * math.pi / 2
        wedge = ((0.0, 0.0), (0.96, 0.0), (0.68, 0.68))
        sketch.body(place(wedge, u, v, angle, radius), shade(colour, 0.82), 0, "main")


def chimney(sketch: Sketch, u: float, v: float, radius: float, height: float) -> None:
    """A factory stack: dark mouth, long shadow."""
    sketch.disc(u, v, radius, (214, 206, 198), height)
    sketch.disc(u, v, radius * 0.60, (58, 54, 54))


def court(sketch: Sketch, u: float, v: float, length: float, heading: float, colour: Rgb, apron: Rgb) -> None:
    """A tennis court: playing surface, lines, net."""
    width = length * 0.5
    sketch.mark(box(u, v, length * 1.36, width * 1.5, heading), apron, "apron")
    sketch.mark(box(u, v, length, width, heading), WHITE, "main+")
    sketch.mark(box(u, v, length - 0.010, width - 0.010, heading), colour, "main")
    stroke = 0.004 + 0.008 * length

    def stripe(a: tuple[float, float], b: tuple[float, float], tone: Rgb, thick: float) -> None:
        ends = place((a, b), u, v, heading)
        sketch.mark(line(ends[0], ends[1], thick), tone, "main+")

    for side in (-0.37, 0.37):
        stripe((-length / 2, side * width), (length / 2, side * width), WHITE, stroke)
    for side in (-0.27, 0.27):
        stripe((side * length, -0.37 * width), (side * length, 0.37 * width), WHITE, stroke)
    stripe((-0.27 * length, 0), (0.27 * length, 0), WHITE, stroke)
    net = place(((0.0, -0.54 * width), (0.0, 0.54 * width)), u, v, heading)
    sketch.body(line(net[0], net[1], 0.007), (60, 62, 64), 0.012, "main+")


def panel_row(sketch: Sketch, u: float, v: float, length: float, width: float, heading: float) -> None:
    """A row of solar panels: dark blue glass between pale frames."""
    glass: Rgb = (34, 48, 92)
    sketch.body(box(u, v, length, width, heading), (176, 182, 196), 0.016, "main+")
    sketch.body(box(u, v, length - 0.006, width - 0.006, heading), glass, 0, "main")
    cells = max(3, round(length / 0.05))
    for i in range(1, cells):
        cu, cv = place(((length * (i / cells - 0.5), 0),), u, v, heading)[0]
        sketch.body(box(cu, cv, 0.0025, width - 0.006, heading), (96, 108, 146), 0, "main+")
    sketch.body(box(u, v, length - 0.006, 0.0025, heading), (96, 108, 146), 0, "main+")


def boulder(sketch: Sketch, u: float, v: float, radius: float, rng: Rng, tone: Rgb = (112, 98, 86)) -> None:
    """A rock: a rough outline, its lit top."""
    outline = [
        (math.cos(a) * between(rng, 0.75, 1.05), math.sin(a) * between(rng, 0.75, 1.05))
        for a in (i * math.pi / 4 for i in range(8))
    ]
    heading = between(rng, 0, 2 * math.pi)
    lee_u, lee_v = sketch.lee
    sketch.body(place(outline, u, v, heading, radius), shade(tone, 0.8), radius * 0.8, "rock")
    top = place(outline, u - lee_u * radius * 0.18, v - lee_v * radius * 0.18, heading, radius * 0.66)
    sketch.body(top, shade(tone, 1.12), 0, "rock")


def stands(
    sketch: Sketch, u: float, v: float, length: float, width: float, heading: float, colour: Rgb, corners: int
) -> None:
    """A stadium's bowl: roof rim, tiers of coloured seats; the caller draws the pitch inside."""
    tiers = ((1.0, (206, 206, 208)), (0.93, shade(colour, 0.82)), (0.84, colour), (0.75, shade(colour, 0.9)))
    for i, (scale, tone) in enumerate(tiers):
        height = 0.09 if i == 0 else 0.0
        part = "main+" if i == 0 else "main"
        if corners:
            sketch.body(oval(u, v, length * scale, width * scale, heading, corners), tone, height, part)
        else:
            sketch.body(box(u, v, length - width * (1 - scale), width * scale, heading), tone, height, part)
    for i in range(20):
        angle = i * math.pi / 10
        inner, outer = 0.33, 0.465
        a = (math.cos(angle) * length * inner, math.sin(angle) * width * inner)
        b = (math.cos(angle) * length * outer, math.sin(angle) * width * outer)
        if corners:
            ends = place((a, b), u, v, heading)
            sketch.body(line(ends[0], ends[1], 0.005), blend(colour, (220, 220, 220), 0.5), 0, "main+")
