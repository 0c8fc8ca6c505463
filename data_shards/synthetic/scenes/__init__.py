"""The scene classes. Each is a function that draws into a `Sketch` and returns the `Facts` of the drawing."""

from __future__ import annotations

from collections.abc import Callable

from priorclip.data_shards.synthetic.dice import Rng
from priorclip.data_shards.synthetic.facts import Facts
from priorclip.data_shards.synthetic.scenes import nature, town, transport, works
from priorclip.data_shards.synthetic.sketch import Sketch

DRAW: dict[str, Callable[[Sketch, Rng], Facts]] = {
    "airport": transport.airport,
    "baseball field": town.baseball_field,
    "beach": nature.beach,
    "bridge": transport.bridge,
    "dense residential": town.dense_residential,
    "desert": nature.desert,
    "farmland": works.farmland,
    "forest": nature.forest,
    "golf course": town.golf_course,
    "harbour": transport.harbour,
    "industrial": works.industrial,
    "lake": nature.lake,
    "mountain": nature.mountain,
    "overpass": transport.overpass,
    "parking lot": transport.parking_lot,
    "railway station": transport.railway_station,
    "river": nature.river,
    "roundabout": transport.roundabout,
    "solar farm": works.solar_farm,
    "sparse residential": town.sparse_residential,
    "stadium": town.stadium,
    "storage tanks": works.storage_tanks,
    "tennis court": town.tennis_court,
    "wind farm": works.wind_farm,
}
SCENES: tuple[str, ...] = tuple(DRAW)
