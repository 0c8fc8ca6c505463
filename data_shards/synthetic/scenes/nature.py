"""River, lake, beach, forest, desert, mountain."""

from __future__ import annotations

import math

from priorclip.data_shards.synthetic.dice import Rng, between, chance, count, pick, shuffled
from priorclip.data_shards.synthetic.facts import Company, Facts, Thing
from priorclip.data_shards.synthetic.ground import canopy, dunes, mountains
from priorclip.data_shards.synthetic.objects import boulder, car, gable, ship, tree, umbrella
from priorclip.data_shards.synthetic.palette import Rgb, colour_on, paint
from priorclip.data_shards.synthetic.placement import MAIN, Room, along, extent_for, layout_for, spots
from priorclip.data_shards.synthetic.regions import band, before, beyond, blob, disc, grown, union
from priorclip.data_shards.synthetic.sketch import Sketch

TREES: dict[str, tuple[Rgb, Rgb]] = {
    "dark green": ((30, 54, 34), (52, 82, 46)),
    "light green": ((78, 112, 44), (132, 164, 74)),
    "orange": ((136, 66, 24), (212, 122, 46)),
}


def river(sketch: Sketch, rng: Rng) -> Facts:
    """A straight, curved or winding river with ships."""
    bank = pick(rng, ("grass", "dry grass", "forest", "sand", "soil"))
    sketch.ground = bank
    kind = pick(rng, ("straight", "winding"))
    half = between(rng, 0.10, 0.16)
    bend, wave = (0.0, 1.0) if kind == "straight" else (between(rng, 0.11, 0.15), between(rng, 0.75, 0.95))
    phase = between(rng, 0, 6.3)
    sketch.fill(band(0, half + 0.03, bend, wave, phase), "sand" if bank != "sand" else "soil", 0.012, 0.03)
    sketch.fill(band(0, half, bend, wave, phase), "water", 0.010, part="main")
    number, colour = count(rng, 0, 5), pick(rng, ("white", "red", "orange", "yellow"))
    length = 0.155 if number <= 3 else 0.115
    for u in along(number, Room(0, 0, 0.78, 0)) if number else []:
        v = bend * math.sin(u * 2 * math.pi / wave + phase)
        slope = math.atan(bend * 2 * math.pi / wave * math.cos(u * 2 * math.pi / wave + phase))
        ship(
            sketch,
            u,
            v + between(rng, -0.03, 0.03),
            slope + math.pi * chance(rng, 0.5),
            length,
            paint(rng, colour),
            "company",
        )
    houses, roof = count(rng, 0, 4), colour_on(rng, bank, ("red", "white", "blue", "brown"))
    side = half + 0.17 + (0.10 if kind == "winding" else 0)
    for u in along(houses, Room(0, 0, 0.5, 0)) if houses else []:
        gable(sketch, u, min(side, 0.37), 0.09, 0.07, 0, paint(rng, roof), "company")
    if bank != "forest":
        scatter_off(sketch, rng, 8, half + bend)
    company = [Company("with", Thing("ship", number, colour))] if number else []
    if houses:
        company.append(Company("near", Thing("house", houses, roof)))
    return Facts(Thing("river", 1, kind=kind), bank, company)


def scatter_off(sketch: Sketch, rng: Rng, number: int, clear: float) -> None:
    """Draws trees on the bank, away from the water and the houses."""
    for _ in range(number):
        v = -between(rng, clear + 0.07, 0.62)
        tree(sketch, between(rng, -0.6, 0.6), v, between(rng, 0.016, 0.03), rng)


def lake(sketch: Sketch, rng: Rng) -> Facts:
    """A lake with islands and boats."""
    shore = pick(rng, ("grass", "dry grass", "forest", "soil", "sand"))
    sketch.ground = shore
    kind = pick(rng, ("round", "long"))
    length, width = (0.72, 0.68) if kind == "round" else (0.86, 0.44)
    lake_shape = blob(rng, 0, 0, length, width)
    sketch.fill(grown(lake_shape, 0.02), "sand" if shore != "sand" else "grass", 0.006, 0.03)
    sketch.fill(lake_shape, "water", 0.006, part="main")
    islands, boats = count(rng, 0, 3), count(rng, 0, 4)
    rows = (-0.15, 0.15) if kind == "round" else (-0.07, 0.07)
    places = shuffled(rng, [(u, v) for u in (-0.18, 0.0, 0.18) for v in rows])
    if islands:
        isles = union([blob(rng, u, v, 0.13, 0.10, between(rng, 0, 3)) for u, v in places[:islands]])
        sketch.fill(grown(isles, 0.012), "sand", 0.008)
        sketch.fill(isles, "forest", 0.008)
    colour = pick(rng, ("white", "red", "orange", "yellow"))
    for u, v in places[islands : min(islands + boats, 6)]:
        ship(sketch, u, v, between(rng, 0, 6.3), 0.12, paint(rng, colour), "company")
    boats = min(boats, 6 - islands)
    company = [Company("with", Thing("island", islands))] if islands else []
    if boats:
        company.append(Company("with", Thing("boat", boats, colour)))
    return Facts(Thing("lake", 1, kind=kind), shore, company)


def beach(sketch: Sketch, rng: Rng) -> Facts:
    """Sand between sea and land, umbrellas, boats."""
    behind = pick(rng, ("grass", "forest", "asphalt", "soil"))
    sketch.ground = "sand"
    phase, bend = between(rng, 0, 6), between(rng, 0.01, 0.035)
    sketch.fill(beyond(0.10, bend, 0.9, phase), "clay", 0.012, 0.05, 0.25)
    sketch.fill(beyond(0.13, bend, 0.9, phase), "sea", 0.012, 0.03)
    for offset, half in ((0.135, 0.010), (0.175, 0.006), (0.225, 0.004)):
        sketch.fill(band(offset, half, bend, 0.9, phase), "snow", 0.016, 0.012, 0.85)
    sketch.fill(before(-0.30), behind, 0.012)
    number = count(rng, 1, 10)
    colour = pick(rng, ("red", "blue", "green", "orange", "purple", "black"))
    layout = (
        layout_for(rng, number)
        if number <= 4
        else pick(rng, ("two rows", "scattered") if number % 2 == 0 else ("scattered",))
    )
    if layout == "grid":
        layout = "row"
    strand = Room(0, -0.09, 0.72, 0.34)
    extent = extent_for(number, layout, strand, 0.125)
    for u, v, _ in spots(rng, number, layout, strand, extent):
        umbrella(sketch, u, v, extent * 0.31, paint(rng, colour), rng)
    boats, tone = count(rng, 0, 3), pick(rng, ("white", "red", "orange"))
    for u in along(boats, Room(0, 0, 0.5, 0)) if boats else []:
        ship(sketch, u, 0.345, between(rng, -0.5, 0.5), 0.125, paint(rng, tone), "company")
    company = [Company("beside", Thing("sea"), Thing("boat", boats, tone) if boats else None)]
    company.append(Company("backed", Thing("backdrop", kind=behind)))
    return Facts(Thing("umbrella", number, colour, layout), "sand", company)


def forest(sketch: Sketch, rng: Rng) -> Facts:
    """A closed canopy of one colour with tracks, streams or clearings."""
    colour = pick(rng, tuple(TREES))
    sketch.ground, sketch.ground_part = canopy(*TREES[colour]), "main"
    clearings = count(rng, 0, 4)
    paths = ("dirt track", "stream", "road", "none")
    path = pick(rng, paths if clearings else paths[:3])
    where = between(rng, -0.05, 0.05)
    curve = (0.05, between(rng, 0.8, 1.2), between(rng, 0, 6))
    if path == "dirt track":
        sketch.fill(band(where, 0.022, *curve), "soil", 0.005)
    elif path == "stream":
        sketch.fill(band(where, 0.050, *curve), "soil", 0.010)
        sketch.fill(band(where, 0.036, *curve), "water", 0.008)
    elif path == "road":
        sketch.fill(band(where, 0.062), "grass", 0.008)
        sketch.fill(band(where, 0.042), "asphalt")
    places = shuffled(rng, [(u, v) for u in (-0.24, 0.0, 0.24) for v in (-0.27, 0.27)])
    cover = pick(rng, ("grass", "soil", "water"))
    if clearings:
        gaps = [blob(rng, u, v, between(rng, 0.16, 0.20), 0.16, between(rng, 0, 3)) for u, v in places[:clearings]]
        sketch.fill(union(gaps), cover, 0.006)
    huts = count(rng, 0, 2) if clearings and cover != "water" else 0
    huts = min(huts, clearings)
    roof = pick(rng, ("red", "white", "blue"))
    for u, v in places[:huts]:
        gable(sketch, u, v, 0.085, 0.065, between(rng, 0, 3), paint(rng, roof), "company")
    company = []
    if path != "none":
        company.append(Company("crossed", Thing(path)))
    if clearings:
        noun, kind = ("pond", None) if cover == "water" else ("clearing", {"grass": "grassy", "soil": "bare"}[cover])
        company.append(Company("with", Thing(noun, clearings, kind=kind)))
    if huts:
        company.append(Company("with", Thing("cabin", huts, roof)))
    return Facts(Thing("forest", 1, colour), None, company)


SANDS: dict[str, tuple[Rgb, Rgb]] = {
    "yellow": ((226, 192, 122), (212, 174, 104)),
    "orange": ((210, 138, 78), (192, 116, 60)),
    "pale": ((230, 218, 192), (216, 200, 170)),
}


def desert(sketch: Sketch, rng: Rng) -> Facts:
    """Dunes of one colour, with rocks, palms or a track."""
    colour = pick(rng, tuple(SANDS))
    heading = between(rng, 0, math.pi)
    sketch.ground, sketch.ground_part = dunes(*SANDS[colour], heading, between(rng, 4, 9)), "main"
    rocks, oases = count(rng, 1, 8), count(rng, 0, 2)
    company = []
    if chance(rng, 0.5):
        sketch.fill(band(LANE, 0.034), "asphalt", 0.006, 0.02)
        cars, tone = count(rng, 0, 4), pick(rng, ("white", "red", "blue", "green"))
        for u in along(cars, Room(0, 0, 0.6, 0)) if cars else []:
            car(sketch, u, LANE, math.pi * chance(rng, 0.5), 0.08, paint(rng, tone), "company")
        company.append(Company("crossed", Thing("road"), Thing("car", cars, tone) if cars else None))
    places = shuffled(rng, [(u, v) for u in (-0.25, 0.0, 0.25) for v in (-0.30, -0.10, 0.10)])
    for u, v in places[:oases]:
        sketch.fill(blob(rng, u, v, 0.19, 0.15, between(rng, 0, 3)), "grass", 0.02, 0.02)
        sketch.fill(blob(rng, u, v, 0.11, 0.08, between(rng, 0, 3)), "water", 0.01)
        for i in range(4):
            angle = i * 1.57 + between(rng, -0.3, 0.3)
            tree(sketch, u + 0.085 * math.cos(angle), v + 0.07 * math.sin(angle), 0.02, rng)
    rocks = min(rocks, 9 - oases)
    for u, v in places[oases : oases + rocks]:
        boulder(
            sketch,
            u + between(rng, -0.04, 0.04),
            v + between(rng, -0.03, 0.03),
            between(rng, 0.026, 0.040),
            rng,
        )
    if rocks:
        company.append(Company("with", Thing("rock", rocks)))
    if oases:
        company.append(Company("with", Thing("oasis", oases)))
    return Facts(Thing("desert", 1, colour), None, company)


LANE = 0.28  # a road across the dunes, without rocks


def mountain(sketch: Sketch, rng: Rng) -> Facts:
    """One to four peaks, bare or snow-capped, over forest, grass or rock."""
    number = count(rng, 1, 4)
    snow = chance(rng, 0.6)
    layout = layout_for(rng, number)
    if layout == "grid":
        layout = "scattered"
    foot = pick(rng, ("grass", "forest", "rock", "dry grass"))
    tones: dict[str, Rgb] = {
        "grass": (96, 122, 66),
        "forest": (50, 74, 46),
        "rock": (104, 90, 78),
        "dry grass": (170, 152, 100),
    }
    radius = {1: 0.36, 2: 0.25, 3: 0.20, 4: 0.18}[number]
    peaks = [(u, v, radius * between(rng, 0.92, 1.08)) for u, v, _ in spots(rng, number, layout, MAIN, radius * 1.3)]
    sketch.ground = mountains(peaks, (162, 152, 142), tones[foot], 0.45 if snow else None)
    sketch.name(union([disc(*peak) for peak in peaks]), "main")
    lakes = count(rng, 0, 1)
    if lakes:
        sketch.fill(blob(rng, 0.28, 0.34, 0.16, 0.11, between(rng, 0, 3)), "water", 0.02)
    company = [Company("with", Thing("tarn", lakes))] if lakes else []
    huts, roof = count(rng, 0, 3), pick(rng, ("red", "white", "blue"))
    for u in along(huts, Room(-0.12, 0, 0.44, 0)) if huts else []:
        gable(sketch, u, 0.36, 0.085, 0.066, between(rng, -0.2, 0.2), paint(rng, roof), "company")
    if huts:
        company.append(Company("with", Thing("cabin", huts, roof)))
    return Facts(Thing("peak", number, None, layout, "snow" if snow else "bare"), foot, company)
