"""Mean recall of each scene as horizontal bars, the best scene on top; a second model has a second bar.

The recalls are those of ``classes`` in the report of `retrieval evaluate`: the queries of a scene, with the whole test
set as candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from priorclip.retrieval.pictures.material import CannotDraw, Material
from priorclip.retrieval.pictures.plain import figure_file, printable
from priorclip.retrieval.recall_report import recall_report

MOST_SCENES = 400
COLOURS = ("#33658a", "#f2a65a")


class SceneBars(NamedTuple):
    """A scene, its images, and its mean recall with each model, percent."""

    scene: str
    images: int
    recalls: list[float]


def draw_scenes(material: Material, path: Path) -> dict[str, Any]:
    """Writes the picture; returns the overall ``mean_recall`` of each model and ``scenes`` in the drawn order."""
    reports = [recall_report(features, resamples=0) for features in material.features]
    bars = scene_bars(reports)
    if not bars:
        raise CannotDraw(f"no image of --data {material.config.data} has a scene, so there is no recall by scene")
    if len(bars) > MOST_SCENES:
        raise CannotDraw(f"{len(bars)} scenes do not fit in one picture; it has room for {MOST_SCENES}")
    names = [shown.name for shown in material.models]
    draw_bars(
        path, bars, [f"{name}: {each['mean_recall']:.2f} over all" for name, each in zip(names, reports, strict=True)]
    )
    overall = {name: each["mean_recall"] for name, each in zip(names, reports, strict=True)}
    return {"mean_recall": overall, "scenes": [bar._asdict() for bar in bars]}


def scene_bars(reports: Sequence[dict[str, Any]]) -> list[SceneBars]:
    """Returns the scenes by the first model's mean recall, the highest first, equal ones by name."""
    bars = [
        SceneBars(name, row["images"], [report["classes"][name]["mean_recall"] for report in reports])
        for name, row in reports[0]["classes"].items()
    ]
    return sorted(bars, key=lambda bar: (-bar.recalls[0], bar.scene))


def draw_bars(path: Path, bars: Sequence[SceneBars], models: Sequence[str]) -> None:
    """Writes the bars; ``models`` are the names in the legend."""
    places, thick = np.arange(len(bars)), 0.8 / len(models)
    with figure_file(path, 8, 1.3 + 0.22 * len(bars) * (0.5 + 0.5 * len(models))) as figure:
        axis = figure.subplots()
        for number, name in enumerate(models):
            across = places + (number - (len(models) - 1) / 2) * thick
            values = [bar.recalls[number] for bar in bars]
            axis.barh(across, values, thick, color=COLOURS[number], label=f" {printable(name, 80)}")
        axis.set_yticks(places, [bar_label(bar) for bar in bars], fontsize=7)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlabel("mean recall of the scene's images and captions, %")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        figure.legend(loc="outside upper center", fontsize=8)


def bar_label(bar: SceneBars) -> str:
    return f"{printable(bar.scene, 40) or 'no name'} ({bar.images} image{'s' * (bar.images != 1)})"
