"""A sweep's folder with made-up runs: reports and test images that belong together, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from priorclip.experiments.experiment import Experiment, load_experiment
from priorclip.experiments.sweep_table import write_table
from priorclip.model.image_hits import FIGURES, IMAGE_FILE, ImageHits, write_image_hits

ROWS = ("closed-baseline", "closed-full", "closed-soft")
IMAGES = 30


def random_hits(rng: np.random.Generator, captions: list[int], level: float = 0.5) -> ImageHits:
    """Hits of images with any number of captions; ``level`` is the probability of a hit."""
    counts = np.array(captions)
    asks = [counts > 0 if figure.startswith("i2t") else counts for figure in FIGURES]
    sums = np.stack([rng.binomial(np.array(each, int), level).astype(float) for each in asks])
    return ImageHits([f"image-{place}" for place in range(len(counts))], ["port"] * len(counts), counts, sums)


def write_sweep(folder: Path, name: str = "made-up", seeds: int = 3, images: bool = True) -> dict[str, Any]:
    """Writes runs of three rows and their table, and returns the content of the table's JSON."""
    rng, results = np.random.default_rng(7), {}
    rows = [load_experiment(row) for row in ROWS]
    for row, level in zip(rows, (0.3, 0.4, 0.35), strict=True):
        found = {seed: random_hits(rng, [5] * IMAGES, level) for seed in range(seeds)}
        results[row.name] = {seed: write_run(folder, row, seed, hits, images) for seed, hits in found.items()}
    return write_table(name, rows, results, folder, "a note", "the command")


def write_run(folder: Path, row: Experiment, seed: int, hits: ImageHits, images: bool = True) -> dict[str, float]:
    """Writes one run and returns its figures."""
    run = folder / row.name / f"seed-{seed}" / row.steps[-1].command
    run.mkdir(parents=True)
    report = {
        "steps": 200, "epochs": 10.0, "exported_step": 60, "samples_seen": 6000, "images_per_second": 120.0,
        "evaluation": {"mean_recall": 21.5 + seed}, "test": hits.figures(),
    }  # fmt: skip
    (run / "report.json").write_text(json.dumps(report))
    if images:
        write_image_hits(run / IMAGE_FILE, hits)
    return hits.figures()
