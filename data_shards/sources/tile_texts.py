"""The class and the texts of a tile, from shapes on the ground or from windows in a table.

    texts = SceneTexts(shapes, min_share=0.5)     # [(shape in the scene's pixels, Note), ...]
    texts.of((0, 192, 256, 256))                  # Note("forest", ["a forest of firs"]), {"forest": 0.7, "lake": 0.3}

The rule: the class with the largest share of the tile is its label, if it covers ``min_share`` of the tile, or if
``min_share`` of one of its polygons lies in the tile. If no polygon touches the tile, it is the class with the most
points and lines. A text belongs to a tile if its polygon covers ``min_share`` of the tile, or ``min_share`` of the
polygon lies in it, or if its point or line does. Only the part of a polygon that lies in the scene counts.

A table has one window a row, in pixels of its scene. It is a polygon for the rule:

    scene,x,y,width,height,label,caption
    T33/a.tif,0,192,256,256,forest,a forest of firs
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from priorclip.common.output import get_logger
from priorclip.data_shards.rasters.vector import Layer, Note, choose_fields, in_pixels, note_of
from priorclip.data_shards.sources.table import MAX_FIELD, SEPARATORS, encoding_of

if TYPE_CHECKING:
    from priorclip.data_shards.rasters.scene import Scene

log = get_logger(__name__)

SCENE, SIDES = "scene", ("x", "y", "width", "height")
Windows = dict[str, list[tuple[Any, Note]]]  # scene -> its shapes


class SceneTexts:
    """The shapes of one scene.

    Args:
        shapes: shapely geometries in pixels of the scene, each with its note
        min_share: smallest share, see above
    """

    def __init__(self, shapes: Sequence[tuple[Any, Note]], min_share: float) -> None:
        self.shapes, self.min_share = shapes, min_share

    @cached_property
    def _tree(self) -> Any:
        import shapely

        return shapely.STRtree([shape for shape, _ in self.shapes])

    def of(self, window: tuple[int, int, int, int]) -> tuple[Note, dict[str, float]]:
        """Returns the label and the texts of a tile, and the share of each class, the largest first.

        Args:
            window: left, top, width, height in pixels
        """
        import shapely

        x, y, width, height = window
        tile = shapely.box(x, y, x + width, y + height)
        parts: defaultdict[str, list[Any]] = defaultdict(list)
        whole: set[str] = set()  # classes with a polygon that belongs to the tile
        points: Counter[str] = Counter()
        texts: list[tuple[float, int, list[str]]] = []
        for place in sorted(self._tree.query(tile, predicate="intersects").tolist()):
            shape, note = self.shapes[place]
            inside = shape.intersection(tile)
            if shape.area and not inside.area:
                continue  # they touch
            belongs = not shape.area or inside.area >= self.min_share * min(tile.area, shape.area)
            if note.label is not None and shape.area:
                parts[note.label].append(inside)
                whole |= {note.label} if belongs else set()
            elif note.label is not None:
                points[note.label] += 1
            if belongs and note.captions:
                texts.append((-inside.area, place, note.captions))
        shares = {name: shapely.union_all(found).area / tile.area for name, found in parts.items()}
        ranked = sorted(shares, key=lambda name: (-shares[name], name not in whole, name))
        first = ranked[0] if ranked else min(points, key=lambda name: (-points[name], name), default=None)
        if ranked and shares[ranked[0]] < self.min_share and ranked[0] not in whole:
            first = None
        captions = dict.fromkeys(text for _, _, found in sorted(texts) for text in found)
        return Note(first, list(captions)), {name: share for name in ranked if (share := round(shares[name], 4))}


class TextSource:
    """Where the texts of tiles come from: a vector layer, the windows of a table, or nothing.

    Args:
        layer: shapes on the ground
        windows: shapes in pixels, by scene
        min_share: smallest share, see above

    Raises ValueError if ``min_share`` is no share.
    """

    def __init__(self, layer: Layer | None = None, windows: Windows | None = None, min_share: float = 0.5) -> None:
        if not 0 < min_share <= 1:
            raise ValueError(f"--min-share must be above 0 and at most 1, not {min_share}")
        self.layer, self.windows, self.min_share = layer, windows, min_share
        self.used: set[str] = set()

    def __bool__(self) -> bool:
        return self.layer is not None or self.windows is not None

    def scene(self, name: str, scene: Scene) -> SceneTexts | None:
        """Returns the texts of a scene; None if it has none. Raises ValueError if the layer's CRS does not fit."""
        from priorclip.data_shards.rasters.georeference import coordinates

        shapes: list[tuple[Any, Note]] = []
        if self.windows is not None:
            stem = str(Path(name).with_suffix(""))
            self.used |= {each for each in (name, stem) if each in self.windows}
            shapes = [*self.windows.get(name, ()), *self.windows.get(stem, ())]
        if self.layer is not None:
            crs, transform = coordinates(scene.dataset)
            if crs is not None:
                shapes = in_pixels(self.layer, crs, transform, *scene.size)
        return SceneTexts(shapes, self.min_share) if shapes else None

    def warn_of_unused(self) -> None:
        """Logs scenes of the table that are not there."""
        missing = sorted(set(self.windows or ()) - self.used)
        if missing:
            log.warning("%d scenes of the table are not in --images, such as %s", len(missing), missing[0])


def read_windows(path: Path, label_field: str | None, caption_fields: Sequence[str] | None) -> Windows:
    """Reads a table of windows. Raises ValueError, which names the line or the missing column."""
    import shapely

    if not path.is_file():
        raise FileNotFoundError(f"--csv {path}: the file does not exist")
    csv.field_size_limit(MAX_FIELD)
    found: Windows = {}
    with open(path, newline="", encoding=encoding_of(path)) as handle:
        try:
            header = handle.readline(MAX_FIELD)
            separator = next((each for each in SEPARATORS if SCENE in names_of(header, each)), SEPARATORS[0])
            names = names_of(header, separator)
            missing = [name for name in (SCENE, *SIDES) if name not in names]
            if missing:
                raise ValueError(
                    f"--csv {path} has no column {', '.join(missing)}: the texts of tiles need {SCENE}, "
                    f"{', '.join(SIDES)} and a label or a caption; it has: {', '.join(names) or 'no header'}"
                )
            label, captions = choose_fields(f"--csv {path}", names, label_field, caption_fields)
            for row in csv.DictReader(handle, names, delimiter=separator):
                x, y, width, height = window_of(row, path)
                note = note_of(row, label, captions)
                if note.label or note.captions:
                    name = (row[SCENE] or "").strip().replace("\\", "/")
                    found.setdefault(name, []).append((shapely.box(x, y, x + width, y + height), note))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"--csv {path}: {error}") from error
    if not found:
        raise ValueError(f"--csv {path}: no row has a value in {', '.join(filter(None, (label, *captions)))}")
    return found


def names_of(header: str, separator: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]


def window_of(row: Mapping[str, Any], path: Path) -> tuple[float, float, float, float]:
    """Returns left, top, width and height of a row in pixels. Raises ValueError, which shows them."""
    try:
        x, y, width, height = (float(row[name]) for name in SIDES)
        if width > 0 and height > 0 and max(map(abs, (x, y, width, height))) < 1e9:
            return x, y, width, height
    except (TypeError, ValueError):
        pass
    shown = ", ".join(f"{name}={row.get(name)!r}" for name in (SCENE, *SIDES))
    raise ValueError(f"--csv {path}: x, y, width and height must be pixels, the sides above 0: {shown}")
