"""Turns a drawing list into pixels.

    areas (analytic edges) -> marks -> shadows and bodies of each level (OVERSAMPLE times finer) -> averaged down

Order and number of random draws do not depend on the size, so that one scene at two sizes is the same scene. Only the
sensor (see `camera`) adds noise per pixel, as the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from priorclip.data_shards.synthetic.dice import Rng
from priorclip.data_shards.synthetic.ground import texture
from priorclip.data_shards.synthetic.noise_tiles import patch
from priorclip.data_shards.synthetic.sketch import Grid, Picture, Plane, Shape, Sketch, Texture

OVERSAMPLE = 3
Ink = int | tuple[int, int, int]
SHADOW = (16, 20, 34)
SHADOW_DEPTH = 0.58  # share of the light that a shadow removes


def grid_of(sketch: Sketch, size: int) -> Grid:
    """Returns the scene's coordinates at each pixel of a picture of this size."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5).astype(np.float32)
    cos, sin = np.float32(math.cos(sketch.turn)), np.float32(math.sin(sketch.turn))
    x, y = axis[None, :], axis[:, None]
    return Grid(size, x * cos + y * sin, y * cos - x * sin, (math.cos(sketch.sun), math.sin(sketch.sun)))


def cover_ground(
    sketch: Sketch, grid: Grid, rng: Rng, texture: Callable[[str | Texture, Grid, Rng], Picture] = texture
) -> Picture:
    """Returns ground and areas, ``(n, n, bands)`` in 0..255, in the bands that ``texture`` gives."""
    picture = texture(sketch.ground, grid, rng)
    for area in sketch.areas:
        if area.material is None:
            continue
        cover = _cover(area.distance(grid), area.rough, area.soft, grid, rng) * np.float32(area.opacity)
        material = texture(area.material, grid, rng)
        material -= picture
        material *= cover[..., None]
        picture += material
    return picture


def _part_of_ground(sketch: Sketch, grid: Grid, parts: Sequence[str], rng: Rng) -> Plane:
    """Returns the share of each pixel's ground that belongs to the parts; ``rng`` as that which drew the ground."""
    texture(sketch.ground, grid, rng)  # makes the draws that the edges of the areas come after
    share = np.full((grid.size, grid.size), sketch.ground_part in parts, np.float32)
    for area in sketch.areas:
        cover = _cover(area.distance(grid), area.rough, area.soft, grid, rng) * np.float32(area.opacity)
        if area.material is not None:
            texture(area.material, grid, rng)
        share += ((area.part in parts) - share) * cover
    return share


def _cover(distance: Plane, rough: float, soft: float, grid: Grid, rng: Rng) -> Plane:
    if rough:
        distance = distance + rough * patch("broad", grid.size, rng) + 0.10 * rough * patch("mottle", grid.size, rng)
    edge = max(soft, 1.0 / grid.size)
    return np.clip(0.5 - distance / edge, 0, 1).astype(np.float32)


def _to_pixels(sketch: Sketch, shapes: Sequence[Shape], scale: float) -> Iterable[tuple[Shape, list[float]]]:
    """Yields each shape with its points as flat pixel coordinates ``[x0, y0, x1, y1, ...]``."""
    if not shapes:
        return
    points = np.array([point for shape in shapes for point in shape.points], np.float64)
    cos, sin = math.cos(sketch.turn), math.sin(sketch.turn)
    pixels = (points @ np.array(((cos, sin), (-sin, cos))) + 0.5) * scale - 0.5
    flat, start = pixels.ravel().tolist(), 0
    for shape in shapes:
        end = start + 2 * len(shape.points)
        yield shape, flat[start:end]
        start = end


def _draw(pen: ImageDraw.ImageDraw, shape: Shape, at: list[float], radius: float, colour: object) -> None:
    if shape.radius:
        x, y = at
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)  # type: ignore[arg-type]
    else:
        pen.polygon(at, fill=colour)  # type: ignore[arg-type]


def _cast(pen: ImageDraw.ImageDraw, shape: Shape, at: list[float], radius: float, dx: float, dy: float) -> None:
    """Draws the shadow of an upright body: its outline swept along ``(dx, dy)`` pixels."""
    if shape.radius:
        x, y = at
        pen.line((x, y, x + dx, y + dy), fill=255, width=max(1, round(2 * radius)))
        pen.ellipse((x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius), fill=255)
        return
    moved = [c + (dy if i & 1 else dx) for i, c in enumerate(at)]
    pen.polygon(moved, fill=255)
    if len(at) <= 12:
        for i in range(0, len(at), 2):
            j = (i + 2) % len(at)
            pen.polygon((at[i], at[i + 1], at[j], at[j + 1], moved[j], moved[j + 1], moved[i], moved[i + 1]), fill=255)
    else:  # round outlines need a copy half way to close the gap
        pen.polygon([c + (dy if i & 1 else dx) / 2 for i, c in enumerate(at)], fill=255)


def _ink(shape: Shape) -> tuple[int, int, int]:
    red, green, blue = shape.colour
    return min(255, max(0, int(red))), min(255, max(0, int(green))), min(255, max(0, int(blue)))


def render(sketch: Sketch, size: int, rng: Rng) -> Picture:
    """Returns the sunlit scene, ``(size, size, 3)`` float32 in 0..255, before the camera."""
    ground = np.clip(cover_ground(sketch, grid_of(sketch, size), rng), 0, 255).astype(np.uint8)
    return weathered(build(sketch, ground, _ink, SHADOW), rng)


def build(sketch: Sketch, ground: NDArray[np.uint8], ink: Callable[[Shape], Ink], shadow: Ink) -> Picture:
    """Returns the ground ``(n, n)`` or ``(n, n, 3)``, uint8, with marks, shadows and bodies on it, as float32.

    Args:
        sketch: the drawing list
        ground: ground and areas
        ink: gives the colour of a shape
        shadow: colour of a full shadow
    """
    scale = len(ground) * OVERSAMPLE
    canvas = Image.fromarray(ground).resize((scale, scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for shape, at in _to_pixels(sketch, sketch.marks, scale):
        _draw(pen, shape, at, shape.radius * scale, ink(shape))
    for number, level in enumerate(sketch.levels):
        laid = sketch.shadows if number == 0 else []
        if laid or any(shape.height for shape in level):
            canvas.paste(shadow, mask=_shadows(sketch, level, laid, scale))
        for shape, at in _to_pixels(sketch, level, scale):
            _draw(pen, shape, at, shape.radius * scale, ink(shape))
    return np.asarray(canvas.reduce(OVERSAMPLE), np.float32)


def weathered(picture: Picture, rng: Rng) -> Picture:
    """Returns the picture with fine noise of brightness, as no surface is even."""
    size = len(picture)
    light = 1 + 0.024 * patch("grain", size, rng) + 0.025 * patch("mottle", size, rng)
    return picture * (light if picture.ndim == 2 else light[..., None])


def _shadows(sketch: Sketch, level: Sequence[Shape], laid: Sequence[Shape], scale: int) -> Image.Image:
    mask = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(mask)
    reach = sketch.shadow_length * scale
    dx, dy = math.cos(sketch.sun) * reach, math.sin(sketch.sun) * reach
    for shape, at in _to_pixels(sketch, laid, scale):
        _draw(pen, shape, at, 0.0, 255)
    for shape, at in _to_pixels(sketch, level, scale):
        if shape.height:
            _cast(pen, shape, at, shape.radius * scale, dx * shape.height, dy * shape.height)
    return mask.point(lambda value: int(value * SHADOW_DEPTH))


def part_mask(sketch: Sketch, size: int, part: str | Sequence[str], rng: Rng | None = None) -> Plane:
    """Returns the share of each pixel that shows the named part, or parts, ``(size, size)`` in 0..1.

    Args:
        sketch: the scene
        size: side in pixels
        part: name of the part, or of several
        rng: a generator in the state of that which ``render`` took, so that areas of the ground have the same edges;
            None leaves them out and takes only marks and bodies
    """
    scale, parts = size * OVERSAMPLE, (part,) if isinstance(part, str) else part
    if rng is None:
        mask = Image.new("L", (scale, scale))
    else:
        ground = np.round(255 * _part_of_ground(sketch, grid_of(sketch, size), parts, rng)).astype(np.uint8)
        mask = Image.fromarray(ground).resize((scale, scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(mask)
    for shapes in (sketch.marks, *sketch.levels):
        for shape, at in _to_pixels(sketch, shapes, scale):
            _draw(pen, shape, at, shape.radius * scale, 255 if shape.part in parts else 0)
    return np.asarray(mask.reduce(OVERSAMPLE), np.float32) / 255
