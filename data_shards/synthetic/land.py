"""A large scene as a mosaic of drawn ones, with soft seams, and the list of what is where.

    land = draw_land(seed=0, first=0, size=4000, cell=250, infrared=True)
    land.image                  uint8 (4000, 4000, 3), land.infrared: float16 (4000, 4000), share of the light
    land.cells[0]               Cell((0, 0, 250, 250), "airport", [captions], {facts})

Each cell is a scene of `draw_scene`, drawn with a margin around it. Neighbours fade into each other over their margins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.data_shards.synthetic.dice import generator
from priorclip.data_shards.synthetic.infrared import render_infrared
from priorclip.data_shards.synthetic.scene import GROUND, LARGEST, draw_scene, sketch_scene
from priorclip.data_shards.synthetic.sketch import Plane

SEAM = 10  # a margin is one of so many parts of a cell's side
SMALLEST_CELL, LARGEST_LAND = 32, 10_000  # pixels
LARGEST_CELL = LARGEST * SEAM // (SEAM + 2)


@dataclass(frozen=True)
class Cell:
    """One drawn scene of a land.

    Args:
        window: left, top, width, height in pixels
        label: its class
        captions: five sentences that state its facts
        attributes: the facts
    """

    window: tuple[int, int, int, int]
    label: str
    captions: list[str]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Land:
    """A large drawn scene.

    Args:
        image: red, green, blue, uint8 (size, size, 3)
        infrared: share of near infrared that is reflected, float16 (size, size); None if it was not asked for
        cells: what is where, row by row
    """

    image: NDArray[np.uint8]
    infrared: NDArray[np.float16] | None
    cells: list[Cell]


def check_land(size: int, cell: int) -> None:
    """Raises ValueError, which names the option, for a side that cannot be drawn."""
    if not SMALLEST_CELL <= cell <= LARGEST_CELL:
        raise ValueError(f"--cell must be a side in pixels, {SMALLEST_CELL} to {LARGEST_CELL}, not {cell}")
    if not cell <= size <= LARGEST_LAND:
        raise ValueError(f"--size must be a side in pixels, from --cell ({cell}) to {LARGEST_LAND}, not {size}")
    if size % cell:
        raise ValueError(
            f"--size {size} is no multiple of --cell {cell}: take {size // cell * cell} or {-(-size // cell) * cell}"
        )


def draw_land(seed: int, first: int, size: int, cell: int, infrared: bool = False) -> Land:
    """Draws a land.

    Args:
        seed: seed of the drawn scenes
        first: index of the first of them; the others follow
        size: side in pixels, a multiple of ``cell``
        cell: side in pixels of a drawn scene without its margin
        infrared: draw near infrared too

    Raises ValueError for a side that cannot be drawn.
    """
    check_land(size, cell)
    margin, along = cell // SEAM, size // cell
    image = np.zeros((size, size, 3), np.uint8)
    heat = np.zeros((size, size), np.float16) if infrared else None
    cells = []
    for number in range(along**2):
        row, column = divmod(number, along)
        scene = draw_scene(seed, first + number, cell + 2 * margin)
        place = (row * cell - margin, column * cell - margin)
        paste(image, scene.image, place, margin)
        if heat is not None:
            _, sketch, _ = sketch_scene(seed, first + number)
            share = render_infrared(sketch, cell + 2 * margin, generator(seed, GROUND, first + number))
            paste(heat, share, place, margin)
        cells.append(Cell((column * cell, row * cell, cell, cell), scene.label, scene.fine, scene.attributes))
    return Land(image, heat, cells)


def paste(canvas: NDArray, patch: NDArray, place: tuple[int, int], margin: int) -> None:
    """Puts a square on the canvas; its upper and its left margin fade into what is there.

    Args:
        canvas: (N, N) or (N, N, bands)
        patch: square of the same bands
        place: row and column of its upper left corner; parts outside the canvas are cut off
        margin: width in pixels of the half that fades, on each side of the seam
    """
    top, left = place
    rows = slice(max(0, top), min(len(canvas), top + len(patch)))
    columns = slice(max(0, left), min(canvas.shape[1], left + patch.shape[1]))
    new = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    weight = np.minimum(
        fade(len(patch), margin, top >= 0)[rows.start - top : rows.stop - top, None],
        fade(len(patch), margin, left >= 0)[None, columns.start - left : columns.stop - left],
    )
    weight = weight if canvas.ndim == 2 else weight[..., None]
    old = canvas[rows, columns].astype(np.float32)
    mixed = old + (new.astype(np.float32) - old) * weight
    canvas[rows, columns] = np.rint(mixed) if canvas.dtype.kind == "u" else mixed


def fade(length: int, margin: int, soft: bool) -> Plane:
    """Returns weights that rise from 0 to 1 over two margins, or 1 everywhere at the canvas's own edge."""
    if not soft or not margin:
        return np.ones(length, np.float32)
    return np.clip((np.arange(length, dtype=np.float32) + 0.5) / (2 * margin), 0, 1)
