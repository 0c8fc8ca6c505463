"""How much semantic noise soft, hard and no belief tolerate: noise in training by the sweep, then bad images.

    python benchmarks/robustness.py --output runs/noise --seeds 7

If the folders of ``--data`` exist (docs/evidence.md makes those of ``ucmerced``), this

1. runs the studies ``experiments sweep caption-noise | prior-noise | label-noise`` (experiments/studies) in one folder,
   so that they share the runs without noise;
2. measures the models of these runs on corrupted images, each on the test images of its seed (``retrieval
   robustness``);
3. writes ``noise.png`` of the studies, ``corruptions.md``, ``.json`` and ``.png`` of the images, like a study with the
   corruptions as levels, and ``severities.png`` with one panel per corruption.

Finished parts do not run again. ``--options`` sets another recipe, which needs another ``--output``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from priorclip.experiments.study import Study, load_study
from priorclip.experiments.study_table import draw, write_study
from priorclip.retrieval.commands import CORRUPTIONS, RobustnessConfig
from priorclip.retrieval.robustness import draw_plot as draw_cells
from priorclip.retrieval.robustness import mean_recalls, measure_robustness, robustness_table

STUDIES = ("caption-noise", "prior-noise", "label-noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="ucmerced", help="a file of experiments/data, or a path")
    parser.add_argument("--output", type=Path, default=Path("runs/noise"))
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--options", default="{}", help="options of the trainings, which override all others, as in experiments sweep"
    )
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 3, 5], help="severities of the corruptions")
    parser.add_argument(
        "--features", default="runs/evidence/features", help="folder for cached features of the encoders"
    )
    options = parser.parse_args()
    study = load_study(STUDIES[0])
    for name, words in (
        (study.name, ["--levels", "[0]", "--keep", "export"]),  # the models for corrupted images
        *((name, ["--keep", "report"]) for name in STUDIES),
    ):
        sweep(name, words, options)
    tables = [json.loads((options.output / f"{name}.json").read_text()) for name in STUDIES]
    draw(tables, options.output / "noise.png")
    write_corruptions(study, [cells_of(study, seed, options) for seed in range(options.seeds)], options.output)


def sweep(name: str, words: list[str], options: argparse.Namespace) -> None:
    command = [
        sys.executable, "-m", "finetune", "sweep", name, "--data", options.data, "--output", str(options.output),
        "--seeds", str(options.seeds), "--jobs", str(options.jobs), "--options", options.options, *words,
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        sys.exit(f"{' '.join(command)} failed: see above")


def cells_of(study: Study, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the results of ``retrieval robustness`` for a seed's models on the test images of their runs."""
    runs = {label: options.output / "clean" / row / f"seed-{seed}" / "closed" for row, label in study.rows.items()}
    config = yaml.safe_load((next(iter(runs.values())) / "config.yaml").read_text())
    report = measure_robustness(
        RobustnessConfig(
            models=[f"{label}={run / 'export'}" for label, run in runs.items()],
            data=config["test"]["shards"],
            output=str(options.output / "corruptions" / f"seed-{seed}"),
            corruptions=",".join(CORRUPTIONS),
            severities=options.severities,
            bootstrap=0,
            remember=options.features,
        )
    )
    return [{**cell, "seed": seed} for cell in report["cells"]]


def write_corruptions(study: Study, cells: list[list[dict[str, Any]]], folder: Path) -> None:
    """Writes the tables of a study with the corruptions as levels: each averaged over severities, and all together."""
    everything = [cell for each in cells for cell in each]
    report = {"cells": everything, "means": mean_recalls(everything)}
    draw_cells(report, folder / "severities.png")
    levels = {"clean": ("none",), **{name: (name,) for name in CORRUPTIONS}, "all corruptions": CORRUPTIONS}
    results = {
        level: {
            row: {seed: {"mean_recall": mean_recall(each, label, names)} for seed, each in enumerate(cells)}
            for row, label in study.rows.items()
        }
        for level, names in levels.items()
    }
    severities = sorted({cell["severity"] for cell in everything} - {0})
    study = Study(
        name="corruptions", asks="what do bad images cost a model that learned from good ones?",
        axis=f"mean over severities {', '.join(map(str, severities))}", levels=[0], rows=study.rows,
        against=study.against, options={},
    )  # fmt: skip
    write_study(study, results, folder, robustness_table(report), shlex.join(["python", *sys.argv]))
    print((folder / "corruptions.md").read_text())


def mean_recall(cells: list[dict[str, Any]], label: str, corruptions: tuple[str, ...]) -> float:
    return statistics.fmean(
        cell["mean_recall"] for cell in cells if cell["model"] == label and cell["corruption"] in corruptions
    )


if __name__ == "__main__":
    main()
