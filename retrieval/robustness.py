"""Measures the mean recall of models on corrupted images and swapped captions: a table, a plot, the figures.

    python -m retrieval robustness --models soft=runs/a/export hard=runs/b/export --data test.json --images images \\
        --output runs/robustness

    OUTPUT/cells.jsonl        a line for each measurement, written at once, so that an interrupted command resumes
           robustness.json    all measurements, and the means
           robustness.md      the table
           robustness.png     a panel for each corruption, a line for each model

Models of one name, for example trainings with several seeds, are one line with mean and spread. ``captions`` swaps a
share of the captions of the test set between images, as data.caption_noise does in training. No other corruption
changes a caption, so each model encodes the texts once.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from priorclip.common.masking import masked
from priorclip.common.output import get_logger
from priorclip.common.printable import figure_text
from priorclip.common.progress import Progress
from priorclip.data_shards.stream.semantic_noise import SemanticNoise
from priorclip.model.bootstrap import bootstrap_intervals
from priorclip.model.recall import query_hits, recall_figures
from priorclip.retrieval.commands import EvaluateConfig, RobustnessConfig, TestSetConfig
from priorclip.retrieval.corruptions import CORRUPTIONS, CorruptedSource
from priorclip.retrieval.evaluate_export import write_report
from priorclip.retrieval.features import Features, LazyEncoder, encode_gallery
from priorclip.retrieval.gallery import Gallery, open_gallery, with_captions
from priorclip.retrieval.identity import data_digest

log = get_logger(__name__)

NONE, CAPTIONS = "none", "captions"
CELLS = "cells.jsonl"
KEY = ("model_digest", "test", "corruption", "severity")
Cell = dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """A corruption of the test set. ``severity`` is 1 to 5, or the percentage of swapped captions."""

    corruption: str
    severity: float

    @property
    def variant(self) -> str:
        return "" if self.corruption in (NONE, CAPTIONS) else f"{self.corruption} {self.severity}"


def measure_robustness(config: RobustnessConfig) -> dict[str, Any]:
    """Measures what an earlier run has not measured, writes the files, and returns the report.

    Returns:
        ``cells``: model, export, corruption, severity, mean_recall with its 95 % interval, and the six recalls;
        ``means``: for each model the clean mean recall, the mean over all corruptions, and their ratio in percent
    Raises:
        OSError, ValueError: bad input; the message names the file or key, and what to do
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} is a file: name a folder")
    models = parse_models(config.models)
    conditions = list(list_conditions(config))
    everything = open_gallery(config.data, config.images, config.split, config.limit)
    gallery, skipped = with_captions(everything, config.caption_field)
    known = {tuple(cell[name] for name in KEY): cell for cell in read_cells(output)}
    cells: list[Cell] = []
    output.mkdir(parents=True, exist_ok=True)
    with Progress(len(models) * len(conditions), "conditions", "condition") as progress:
        for name, export in models:
            bench = ModelTest(config, export, gallery, skipped)
            for condition in conditions:
                key = (bench.model.digest, bench.test, condition.corruption, condition.severity)
                if key not in known:
                    measured = bench.recall(condition)
                    about = dict(zip(KEY, key, strict=True))
                    known[key] = {**about, **measured}
                    append_cell(output, known[key])
                cells.append({"model": name, "export": export, **known[key]})
                progress.update()
    report = {"data": masked(config.data), "split": gallery.split, "seed": config.seed, "cells": cells}
    report["means"] = mean_recalls(cells)
    write_report(output / "robustness.json", report)
    (output / "robustness.md").write_text(robustness_table(report) + "\n", encoding="utf-8")
    draw_plot(report, output / "robustness.png")
    return report


class ModelTest:
    """Measures one model on one test set."""

    def __init__(self, config: RobustnessConfig, export: str, gallery: Gallery, skipped: dict[str, list[str]]) -> None:
        common = {item.name: getattr(config, item.name) for item in fields(TestSetConfig)}
        self.config = EvaluateConfig(model=export, **common)
        self.seed, self.resamples = config.seed, config.bootstrap
        self.gallery, self.skipped = gallery, skipped
        self.model = LazyEncoder(self.config, config.remember)
        self.test = f"{data_digest(gallery, config.caption_field)[:16]} seed {config.seed}"
        self._clean: Features | None = None

    @property
    def clean(self) -> Features:
        if self._clean is None:
            self._clean = encode_gallery(self.config, self.gallery, self.skipped, self.model, self.config.caption_field)
        return self._clean

    def recall(self, condition: Condition) -> dict[str, Any]:
        features = self.features(condition)
        hits = query_hits(features.images, features.texts, features.owner)
        if self.resamples:
            found = bootstrap_intervals(hits, len(features.images), self.resamples, self.seed)
            return {**recall_figures(hits), "interval": list(found["mean_recall"])}
        return recall_figures(hits)

    def features(self, condition: Condition) -> Features:
        if condition.corruption == NONE:
            return self.clean
        if condition.corruption == CAPTIONS:
            return swap_captions(self.clean, condition.severity / 100, self.seed)
        self.model.encoder.require_pictures(f"--corruptions {condition.corruption}")
        source = CorruptedSource(
            self.gallery.source, condition.corruption, int(condition.severity), self.seed, self.config.max_pixels
        )
        gallery = replace(self.gallery, source=source)
        variant = f"{condition.variant} seed {self.seed}"
        images = encode_gallery(self.config, gallery, self.skipped, self.model, None, variant)
        if not torch.equal(images.samples, self.clean.samples):
            raise ValueError(f"{condition.variant} can read other images than without corruption: see the log")
        return replace(self.clean, images=images.images)


def swap_captions(features: Features, share: float, seed: int) -> Features:
    """Gives exactly ``share`` of the images the captions of another of them. No caption is lost."""
    noise = SemanticNoise(seed, len(features.images), caption_share=share)
    new_owner = torch.empty(len(features.images), dtype=torch.long)
    for image in range(len(features.images)):
        new_owner[noise.caption_source(image)] = image  # whose captions go to this image
    return replace(features, owner=new_owner[features.owner])


def parse_models(models: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (name, folder) pairs: ``soft=runs/a/export`` -> (soft, runs/a/export). A folder alone is its own name."""
    found = []
    for text in models:
        name, equals, export = text.partition("=")
        found.append((name, export) if equals else (text, text))
    for name, export in found:
        if not name or not export:
            raise ValueError(f"--models {name}={export} must be NAME=EXPORT, for example soft=runs/soft/export")
    return found


def list_conditions(config: RobustnessConfig) -> Iterator[Condition]:
    """Yields the clean test set, then each corruption by severity."""
    yield Condition(NONE, 0)
    for corruption in config.chosen:
        if corruption == CAPTIONS:
            yield from (Condition(CAPTIONS, percent(share)) for share in dict.fromkeys(config.caption_shares) if share)
        else:
            yield from (Condition(corruption, severity) for severity in dict.fromkeys(config.severities))


def percent(share: float) -> float:
    """0.1 -> 10, 0.125 -> 12.5."""
    value = round(100 * share, 6)
    return int(value) if value == int(value) else value


def read_cells(output: Path) -> list[Cell]:
    """Reads the cells of an earlier run, without an incomplete line of a killed run."""
    path = output / CELLS
    cells: list[Cell] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            cells.append(json.loads(line))
        except ValueError:
            log.warning("%s: a line is incomplete and is measured again", path)
    return cells


def append_cell(output: Path, cell: Cell) -> None:
    path = output / CELLS
    cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(("\n" if cut else "") + json.dumps(cell) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def mean_recalls(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Returns for each model in percent: mean recall ``clean`` and ``corrupted`` (over all images), and ``kept``."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(cell["model"] for cell in cells):
        own_cells = [cell for cell in cells if cell["model"] == name]
        clean = statistics.mean(cell["mean_recall"] for cell in own_cells if cell["corruption"] == NONE)
        corrupted = [cell["mean_recall"] for cell in own_cells if cell["corruption"] in CORRUPTIONS]
        found[name] = {"clean": clean}
        if corrupted:
            found[name] |= {"corrupted": statistics.mean(corrupted)}
            found[name] |= {"kept": 100 * statistics.mean(corrupted) / clean} if clean else {}
    return found


def recall_by_severity(cells: Sequence[Cell], model: str, corruption: str) -> dict[float, list[float]]:
    """Returns severity -> mean recalls of the models of that name. The clean test set has severity 0."""
    found: dict[float, list[float]] = {}
    for cell in cells:
        if cell["model"] == model and cell["corruption"] in (NONE, corruption):
            found.setdefault(cell["severity"], []).append(cell["mean_recall"])
    return dict(sorted(found.items()))


def robustness_table(report: dict[str, Any]) -> str:
    """Returns Markdown tables: mean recall by severity, a line for each model, with the spread of several models."""
    cells, lines = report["cells"], []
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    for corruption in dict.fromkeys(cell["corruption"] for cell in cells if cell["corruption"] != NONE):
        levels = recall_by_severity(cells, models[0], corruption)
        unit = "% swapped" if corruption == CAPTIONS else "severity"
        lines += [f"| {corruption}, {unit} | {' | '.join(map(str, levels))} |", f"|---|{'---:|' * len(levels)}"]
        for model in models:
            row = recall_by_severity(cells, model, corruption).values()
            lines.append(f"| {model} | {' | '.join(map(format_mean, row))} |")
        lines.append("")
    lines += ["| mean recall | clean | corrupted images | kept |", "|---|---:|---:|---:|"]
    for model, row in report["means"].items():
        cells_of_row = [f"{row[name]:.1f}" if name in row else "-" for name in ("clean", "corrupted")]
        kept = f"{row['kept']:.1f} %" if "kept" in row else "-"
        lines.append(f"| {model} | {' | '.join([*cells_of_row, kept])} |")
    return "\n".join(lines)


def format_mean(values: Sequence[float]) -> str:
    """Returns the mean, with the standard deviation of several values."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def draw_plot(report: dict[str, Any], path: Path) -> None:
    """Draws a panel for each corruption. Bars are the 95 % interval of one model, or the deviation of several."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = report["cells"]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    panels = list(dict.fromkeys(cell["corruption"] for cell in cells if cell["corruption"] != NONE)) or [NONE]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, corruption in zip(axes, panels):
        for model in models:
            points = recall_by_severity(cells, model, corruption)
            low, high = zip(*(error_bar(cells, model, corruption, level) for level in points), strict=True)
            middle = [statistics.mean(values) for values in points.values()]
            bars = [[m - at for m, at in zip(middle, low)], [at - m for m, at in zip(middle, high)]]
            axis.errorbar(
                list(points), middle, bars, marker="o", markersize=3, capsize=2, linewidth=1.2, label=figure_text(model)
            )
        axis.set_title(f"{corruption}, % swapped" if corruption == CAPTIONS else corruption, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[0].legend(fontsize=8)
    figure.supxlabel("severity")
    figure.supylabel("mean recall, %")
    figure.savefig(path, metadata={"Software": None})


def error_bar(cells: Sequence[Cell], model: str, corruption: str, severity: float) -> tuple[float, float]:
    mine = [
        cell
        for cell in cells
        if (cell["model"], cell["severity"]) == (model, severity) and cell["corruption"] in (NONE, corruption)
    ]
    values = [cell["mean_recall"] for cell in mine]
    if len(values) > 1:
        middle, deviation = statistics.mean(values), statistics.stdev(values)
        return middle - deviation, middle + deviation
    low, high = mine[0].get("interval", (values[0], values[0]))
    return min(low, values[0]), max(high, values[0])
