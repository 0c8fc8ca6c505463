"""A scene as a drawing list, before the pixels exist.

Scene functions write into a `Sketch`: materials over areas, marks on the ground, and bodies that stand there and cast
shadows. All lengths are in scene units: the side of the picture is 1 and the origin is its centre. `u` and `v` are
the scene's own axes, which may have any angle in the picture. `render` turns the list into pixels of any size.

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

DETAIL = "+"  # end of the name of a part that belongs to a thing and has another colour than captions say

Picture = NDArray[np.floating[Any]]
Point = tuple[float, float]


@dataclass(frozen=True)
class Grid:
    """The scene's coordinates at each pixel centre.

    Args:
        size: pixels along one side, n
        u: first scene axis, ``(n, n)``, in scene sides
        v: second scene axis, ``(n, n)``
        sun: unit vector of the direction of shadows, in picture axes (right, down)
    """

    size: int
    u: Plane
    v: Plane
    sun: Point


Distance = Callable[[Grid], Plane]  # signed, in scene sides: negative inside
Texture = Callable[[Grid, np.random.Generator], Picture]  # (n, n, 3) in 0..255


class Area(NamedTuple):
    """A material over a region; ``rough`` frays its edge by noise, ``soft`` blurs it (both in scene sides).

    Without a material it paints nothing, and only names the part that the ground there belongs to.
    """

    distance: Distance
    material: str | Texture | None
    rough: float
    soft: float
    opacity: float
    part: str = ""


class Shape(NamedTuple):
    """A polygon of one flat colour, or a disc if ``radius`` is set."""

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
        sun: direction of shadows in picture axes, radians
        shadow_length: length of the shadow of an object of height 1
        ground: material below everything
        ground_part: the part that the ground belongs to
        marks: shapes on the ground
        shadows: outlines of shadows on the ground, for things high above it
        levels: bodies by level; shadows of the first level fall on the ground, those of the second on the first, ...
    """

    turn: float
    sun: float
    shadow_length: float = 1.0
    ground: str | Texture = "grass"
    ground_part: str = ""
    areas: list[Area] = field(default_factory=list)
    marks: list[Shape] = field(default_factory=list)
    shadows: list[Shape] = field(default_factory=list)
    levels: list[list[Shape]] = field(default_factory=lambda: [[]])

    @property
    def lee(self) -> Point:
        """The unit vector of the direction of shadows, in scene axes."""
        return math.cos(self.sun - self.turn), math.sin(self.sun - self.turn)

    def fill(
        self,
        distance: Distance,
        material: str | Texture,
        rough: float = 0.0,
        soft: float = 0.0,
        opacity: float = 1.0,
        part: str = "",
    ) -> None:
        """Covers the region with negative ``distance`` with a material."""
        self.areas.append(Area(distance, material, rough, soft, opacity, part))

    def name(self, distance: Distance, part: str) -> None:
        """Says that the region with negative ``distance`` belongs to a part, and paints nothing."""
        self.areas.append(Area(distance, None, 0.0, 0.0, 1.0, part))

    def mark(self, points: Sequence[Point], colour: Rgb, part: str = "") -> None:
        """Paints a polygon on the ground; shadows fall on it."""
        self.marks.append(Shape(points, 0.0, colour, 0.0, part))

    def mark_disc(self, u: float, v: float, radius: float, colour: Rgb, part: str = "") -> None:
        """Paints a disc on the ground."""
        self.marks.append(Shape(((u, v),), radius, colour, 0.0, part))

    def shadow(self, points: Sequence[Point]) -> None:
        """Draws a shadow of the given outline on the ground."""
        self.shadows.append(Shape(points, 0.0, (0, 0, 0), 0.0, ""))

    def rise(self) -> None:
        """Starts a new level: later bodies stand on the existing bodies and cast shadows on them."""
        self.levels.append([])

    def body(self, points: Sequence[Point], colour: Rgb, height: float = 0.0, part: str = "") -> None:
        """Puts a polygon on the ground; it casts a shadow if ``height`` is positive."""
        self.levels[-1].append(Shape(points, 0.0, colour, height, part))

    def disc(self, u: float, v: float, radius: float, colour: Rgb, height: float = 0.0, part: str = "") -> None:
        """Puts a disc on the ground; it casts a shadow if ``height`` is positive."""
        self.levels[-1].append(Shape(((u, v),), radius, colour, height, part))


def detail(part: str) -> str:
    """ "main" -> "main+", the details of a thing; "" stays."""
    return part and part + DETAIL


def box(u: float, v: float, length: float, width: float, heading: float = 0.0) -> list[Point]:
    """Returns the corners of a rectangle along ``heading`` (radians in scene axes)."""
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
    """Returns an outline turned to ``heading``, scaled and moved to ``(u, v)``."""
    cos, sin = math.cos(heading) * scale, math.sin(heading) * scale
    return [(u + x * cos - y * sin, v + x * sin + y * cos) for x, y in outline]


def oval(u: float, v: float, length: float, width: float, heading: float = 0.0, corners: int = 28) -> list[Point]:
    """Returns an ellipse of the given axes as a polygon."""
    steps = [2 * math.pi * i / corners for i in range(corners)]
    return place([(math.cos(a) * length / 2, math.sin(a) * width / 2) for a in steps], u, v, heading)


def line(start: Point, end: Point, width: float) -> list[Point]:
    """Returns a straight line of the given width as a polygon."""
    du, dv = end[0] - start[0], end[1] - start[1]
    length = math.hypot(du, dv) or 1e-9
    return box((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, length, width, math.atan2(dv, du))
