"""A scene as a drawing list, before there are any pixels.

Scene functions write into a `Sketch`: materials over areas, marks painted on the ground, bodies that stand on it and
cast shadows. All in scene units: the picture's side is 1, the origin its centre, `u` and `v` the scene's own axes,
which lie in the picture at any angle. `render` turns the list into pixels at any size.

    sketch.fill(band(0.3, 0.06), "water")             # a river along v = 0.3
    sketch.disc(0, 0, 0.1, (238, 238, 234), height=0.05, part="main")   # a white tank and its shadow
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.synthetic.noise_tiles import Plane
from priorclip.data_shards.synthetic.palette import Rgb

Picture = NDArray[np.floating[Any]]
Point = tuple[float, float]


@dataclass(frozen=True)
class Grid:
    """The scene's coordinates at every pixel centre.

    Args:
        size: pixels along one side, n
        u: first scene axis, ``(n, n)``, in scene sides
        v: second scene axis, ``(n, n)``
        sun: unit vector of the way shadows fall, in picture axes (right, down)
    """

    size: int
    u: Plane
    v: Plane
    sun: Point


Distance = Callable[[Grid], Plane]  # signed, in scene sides: negative inside
Texture = Callable[[Grid, np.random.Generator], Picture]  # (n, n, 3) in 0..255


class Area(NamedTuple):
    """A material over a region; ``rough`` frays its edge by noise, ``soft`` blurs it (both in scene sides)."""

    distance: Distance
    material: str | Texture
    rough: float
    soft: float
    opacity: float


class Shape(NamedTuple):
    """A polygon, or a disc where ``radius`` is set, of one flat colour."""

    points: Sequence[Point]
    radius: float
    colour: Rgb
    height: float
    part: str


@dataclass
class Sketch:
    """The drawing list of one scene.

    Args:
        turn: angle of the scene's axes in the picture, radians
        sun: direction in which shadows fall, in picture axes, radians
        shadow_length: shadow length of an object one unit high
        ground: material under everything
        marks: what is painted on the ground
        shadows: outlines of shadows on the ground, for things too high above it to sweep their own
        levels: bodies, by what their shadows fall on: the first level's on the ground, the second's on the first...
    """

    turn: float
    sun: float
    shadow_length: float = 1.0
    ground: str | Texture = "grass"
    areas: list[Area] = field(default_factory=list)
    marks: list[Shape] = field(default_factory=list)
    shadows: list[Shape] = field(default_factory=list)
    levels: list[list[Shape]] = field(default_factory=lambda: [[]])

    @property
    def lee(self) -> Point:
        """Unit vector, in scene axes, of the way shadows fall."""
        return math.cos(self.sun - self.turn), math.sin(self.sun - self.turn)

    def fill(
        self,
        distance: Distance,
        material: str | Texture,
        rough: float = 0.0,
        soft: float = 0.0,
        opacity: float = 1.0,
    ) -> None:
        """Cover the region where ``distance`` is negative with a material."""
        self.areas.append(Area(distance, material, rough, soft, opacity))

    def mark(self, points: Sequence[Point], colour: Rgb, part: str = "") -> None:
        """Paint a polygon on the ground; shadows fall on it."""
        self.marks.append(Shape(points, 0.0, colour, 0.0, part))

    def mark_disc(self, u: float, v: float, radius: float, colour: Rgb, part: str = "") -> None:
        """Paint a disc on the ground."""
        self.marks.append(Shape(((u, v),), radius, colour, 0.0, part))

    def shadow(self, points: Sequence[Point]) -> None:
        """Lay a shadow of the given outline on the ground."""
        self.shadows.append(Shape(points, 0.0, (0, 0, 0), 0.0, ""))

    def rise(self) -> None:
        """Start a new level: what is drawn from here on stands on, and shades, what stands already."""
        self.levels.append([])

    def body(self, points: Sequence[Point], colour: Rgb, height: float = 0.0, part: str = "") -> None:
        """Stand a polygon on the ground; it casts a shadow where ``height`` is positive."""
        self.levels[-1].append(Shape(points, 0.0, colour, height, part))

    def disc(self, u: float, v: float, radius: float, colour: Rgb, height: float = 0.0, part: str = "") -> None:
        """Stand a disc on the ground; it casts a shadow where ``height`` is positive."""
        self.levels[-1].append(Shape(((u, v),), radius, colour, height, part))


def box(u: float, v: float, length: float, width: float, heading: float = 0.0) -> list[Point]:
    """Return the corners of a rectangle that lies along ``heading`` (radians in scene axes)."""
    return place(
        (
            (-length / 2, -width / 2),
            (length / 2, -width / 2),
            (length / 2, width / 2),
            (-length / 2, width / 2),
        ),
        u,
        v,
        heading,
    )


def place(outline: Sequence[Point], u: float, v: float, heading: float, scale: float = 1.0) -> list[Point]:
    """Return an outline turned to ``heading``, scaled and moved to ``(u, v)``."""
    cos, sin = math.cos(heading) * scale, math.sin(heading) * scale
    return [(u + x * cos - y * sin, v + x * sin + y * cos) for x, y in outline]


def oval(u: float, v: float, length: float, width: float, heading: float = 0.0, corners: int = 28) -> list[Point]:
    """Return an ellipse of the given axes as a polygon."""
    steps = [2 * math.pi * i / corners for i in range(corners)]
    return place([(math.cos(a) * length / 2, math.sin(a) * width / 2) for a in steps], u, v, heading)


def line(start: Point, end: Point, width: float) -> list[Point]:
    """Return a straight line of the given width as a polygon."""
    du, dv = end[0] - start[0], end[1] - start[1]
    length = math.hypot(du, dv) or 1e-9
    return box((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, length, width, math.atan2(dv, du))
