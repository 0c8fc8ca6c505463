"""What `data_shards stats` says of images with a place: how many scenes, where and when, the values of each band.

    figures = raster_figures(shards, chosen)     # None if no sample has a place or is a scaled raster
    draw_rasters(figures)                        # PNG: a map of the footprints, and a histogram for each band

Values are measured ones: a pixel p of a tile whose black and white are low and high stands for
low + p / 255 * (high - low). They come from the packed JPEGs, so values outside of the range are at its ends. TIFFs
hold the values themselves, of all bands, and only their valid pixels count. Mean and deviation of these are what a
model of bands normalises by (data.statistics).
"""

from __future__ import annotations

import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.common.printable import figure_text, one_line
from priorclip.data_shards.format.place import bounds, place_of_info, polygons
from priorclip.data_shards.format.sample import BadSample, Sample
from priorclip.data_shards.images.decode import MAX_PIXELS, open_image, upright_rgb
from priorclip.data_shards.rasters.band_file import read_measured
from priorclip.data_shards.rasters.layout import TIFF
from priorclip.data_shards.shards import ShardSet

LOOK, MAP, PIXELS = 64, 5000, 300  # samples that tell whether there are rasters, that the map shows, that are decoded
BINS, EACH = 64, 1 << 14  # of a histogram; pixels of a sample that count
COLOURS = {"red": "#c0392b", "green": "#27834a", "blue": "#2a6f97", "nir": "#7d3c98"}
OTHERS = ("#444444", "#b9770e", "#117a65", "#7f8c8d", "#6e2c00", "#1f618d", "#d68fb1")


def raster_figures(shards: ShardSet, chosen: Sequence[int], seed: int = 0) -> dict[str, Any] | None:
    """Returns the figures of the samples with a place or measured values among the chosen; None if there are none.

    It draws MAP samples for places and PIXELS of them for values, so that millions take no longer.
    """
    draw = random.Random(seed)
    if not any(is_raster(each) for each in read_texts(shards, draw.sample(chosen, min(LOOK, len(chosen))))):
        return None
    drawn = sorted(draw.sample(chosen, min(MAP, len(chosen))))
    places = [place for text in read_texts(shards, drawn) if (place := known_place(text))]
    found = [place["footprint"] for place in places if "footprint" in place]
    times = sorted(place["acquired"] for place in places if "acquired" in place)
    sides = sorted(place["gsd"] for place in places if "gsd" in place)
    return {
        "samples": len(drawn),
        "places": len(places),
        "tiles": sum("window" in place for place in places),
        "scenes": dict(sorted(Counter(place["scene"] for place in places if "scene" in place).items())),
        "footprints": len(found),
        "acquired": [times[0], times[-1]] if times else None,
        "gsd": [sides[0], sides[-1]] if sides else None,
        "outlines": [[place.get("scene", ""), place["footprint"]] for place in places if "footprint" in place],
        "bands": band_figures(shards, sorted(draw.sample(drawn, min(PIXELS, len(drawn))))),
    }


def read_texts(shards: ShardSet, samples: Sequence[int]) -> list[Sample]:
    found = []
    for sample in samples:
        try:
            found.append(shards.text(sample))
        except BadSample:
            continue
    return found


def is_raster(text: Sample) -> bool:
    return isinstance(text.info.get("raster"), dict) or bool(known_place(text))


def known_place(text: Sample) -> dict[str, Any]:
    try:
        return place_of_info(text.info)
    except ValueError:
        return {}


def band_figures(shards: ShardSet, samples: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Returns for each band: type, mean, deviation and a histogram of the measured values of the samples.

    Bands of one name and several types, such as reflectance and grey levels, are kept apart.
    """
    values: defaultdict[tuple[str, str], list[NDArray[np.floating]]] = defaultdict(list)
    for sample in samples:
        try:
            entry = shards.read(sample)
            found = measured_bands(entry) if entry.image.startswith(TIFF) else scaled_bands(entry)
        except BadSample:
            continue
        for key, plane in found:
            values[key].append(plane)
    types = Counter(name for name, _ in values)
    figures = {}
    for (name, kind), parts in values.items():
        together = np.concatenate(parts)
        counts, edges = np.histogram(together, BINS)
        figures[name if types[name] == 1 else f"{name}, {kind}"] = {
            "type": kind,
            "mean": float(together.mean(dtype=np.float64)),
            "deviation": float(together.std(dtype=np.float64)),
            "edges": edges.tolist(),
            "counts": counts.tolist(),
        }
    return figures


Planes = list[tuple[tuple[str, str], NDArray[np.floating]]]  # name and type of a band, its values


def scaled_bands(entry: Sample) -> Planes:
    """Returns the measured values that the pixels of a scaled picture stand for. Raises BadSample."""
    names, ranges, kind = bands_of(entry.info.get("raster"))
    with open_image(entry.image) as image:
        pixels = thinned(np.asarray(upright_rgb(image), np.float32))
    return [
        ((name, kind), (low + pixels[..., channel] / 255 * (high - low)).ravel())
        for channel, (name, (low, high)) in enumerate(zip(names, ranges, strict=True))
    ]


def measured_bands(entry: Sample) -> Planes:
    """Returns the valid values of each band of a TIFF. Raises BadSample."""
    planes, valid, names = read_measured(entry.image, None, lambda wide, high: (0, 0, wide, high), MAX_PIXELS)
    facts = entry.info.get("raster")
    kind = str(facts.get("type", "")) if isinstance(facts, dict) else ""
    chosen = thinned(valid)
    return [((name, kind), thinned(plane)[chosen]) for name, plane in zip(names, planes, strict=True)]


def thinned(pixels: NDArray[Any]) -> NDArray[Any]:
    """Returns every n-th pixel of every n-th row, at most about EACH of them."""
    step = max(1, math.isqrt(pixels.shape[0] * pixels.shape[1] // EACH))
    return pixels[::step, ::step]


def bands_of(raster: Any) -> tuple[list[str], list[tuple[float, float]], str]:
    """Returns names, black and white, and type of the bands in "raster" of KEY.json; none if it is malformed."""
    facts: Mapping[str, Any] = raster if isinstance(raster, dict) else {}
    names, ranges = facts.get("bands", []), facts.get("range")
    if not isinstance(names, list) or not 0 < len(names) <= 3:
        return [], [], ""
    try:
        pairs = [(0.0, 255.0)] * len(names) if ranges is None else [(float(low), float(high)) for low, high in ranges]
    except (TypeError, ValueError):
        return [], [], ""
    if len(pairs) != len(names) or not np.isfinite(pairs).all():
        return [], [], ""
    return [str(name) for name in names], pairs, str(facts.get("type", ""))


def format_rasters(figures: Mapping[str, Any]) -> list[str]:
    """Returns lines for stats.txt."""
    lines = [f"places           {figures['places']} of {figures['samples']} samples, {figures['footprints']} with a "
             f"footprint; {figures['tiles']} tiles of {len(figures['scenes'])} scenes"]  # fmt: skip
    if figures["gsd"]:
        low, high = figures["gsd"]
        lines.append(
            f"ground distance  {low:g} to {high:g} m a pixel" if low != high else f"ground distance  {low:g} m"
        )
    if figures["acquired"]:
        lines.append(f"acquired         {' to '.join(dict.fromkeys(figures['acquired']))}")
    for name, band in figures["bands"].items():
        shown = f"{one_line(name)} ({one_line(band['type'])})"
        lines.append(f"band             {shown}: mean {band['mean']:.4g}, deviation {band['deviation']:.4g}")
    return lines


def draw_rasters(figures: Mapping[str, Any]) -> bytes:
    """Returns a PNG: a map of the footprints, a colour for each scene, and a histogram for each band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_map(left, figures["outlines"])
    right.set_title("Values of the bands")
    for number, (name, band) in enumerate(figures["bands"].items()):
        colour = COLOURS.get(name.split(",")[0], OTHERS[number % len(OTHERS)])
        right.stairs(band["counts"], band["edges"], color=colour, label=figure_text(name))
    right.set_xlabel("measured value")
    right.set_ylabel("pixels")
    right.grid(alpha=0.3)
    if figures["bands"]:
        right.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return buffer.getvalue()


def draw_map(axes: Any, outlines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draws the footprints in lon/lat; across the dateline the map goes on beyond 180 degrees."""
    from matplotlib import colormaps
    from matplotlib.patches import Polygon

    axes.set_title("Footprints")
    axes.set_xlabel("longitude")
    axes.set_ylabel("latitude")
    axes.grid(alpha=0.3)
    scenes = {scene: number for number, scene in enumerate(dict.fromkeys(scene for scene, _ in outlines))}
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    across = any(west > east for west, _, east, _ in (bounds(shape) for _, shape in outlines))
    for scene, shape in outlines:
        colour = colours[scenes[scene] % len(colours)]
        if shape["type"] == "Point":
            lon, lat = shape["coordinates"]
            axes.plot(lon + 360 * (across and lon <= 0), lat, ".", color=colour)
        for polygon in polygons(shape):
            ring = np.array(polygon[0], float)
            if across and ring[:, 0].max() <= 0:
                ring[:, 0] += 360
            axes.add_patch(Polygon(ring, alpha=0.35, color=colour))
    axes.autoscale_view()
    south, north = axes.get_ylim()
    axes.set_aspect(1 / max(0.05, float(np.cos(np.radians((south + north) / 2)))), adjustable="box")
    if not outlines:
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
