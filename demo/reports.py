"""The report of a demo, from the reports of its steps, and its last words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from demo.config import DemoConfig
from demo.raster_plan import WANTED
from demo.steps import StepFailed

Report = dict[str, Any]
SEEN = 0.25  # share of a tile that must be a place of the class, so that the tile shows it
ENOUGH = 0.7  # share of the ten best tiles


def stages_report(folder: Path, config: DemoConfig, seconds: float) -> Report:
    """Returns the demo's report, from the reports of its steps. Copies the stage-two model to FOLDER/export."""
    pretrain = read(folder / "stage-one" / "report.json")
    one, two = (read(folder / stage / "recall.json") for stage in ("stage-one", "stage-two"))
    shutil.copytree(folder / "stage-two" / "export", folder / "export")
    return {
        **common_report(folder, config, two, seconds),
        "stage_one": recalls(one),
        "stage_two": recalls(two),
        "pretrain": {
            name: pretrain[name] for name in ("images_per_second", "world_size", "zero_stage", "steps", "global_batch")
        },
    }


def benchmark_report(folder: Path, config: DemoConfig, seconds: float) -> Report:
    """Returns the report of a benchmark's best row. Copies its model to FOLDER/export."""
    tuned, test = read(folder / "tuned" / "report.json"), read(folder / "recall.json")
    shutil.copytree(folder / "tuned" / "export", folder / "export")
    return {
        **common_report(folder, config, test, seconds),
        "test": recalls(test),
        "intervals": test["intervals"],
        "validation": tuned["evaluation"],
        "steps": tuned["steps"],
    }


def common_report(folder: Path, config: DemoConfig, recall: Report, seconds: float) -> Report:
    """Returns what every report has, from the recall on the test images and the report of the prior."""
    return {
        "source": config.source,
        "seed": config.seed,
        "images": recall["images"],
        "captions": recall["captions"],
        "chance": recall["chance"],
        "prior": read(folder / "prior" / "report.json")["evaluation"],
        "seconds": round(seconds, 1),
    }


def read(path: Path) -> Report:
    return json.loads(path.read_text())


def recalls(report: Report) -> dict[str, float]:
    return {name: report[name] for name in report["chance"]}


def recall_table(report: Report, images: str, rows: dict[str, str]) -> list[str]:
    """Returns the lines of a table of recalls.

    Args:
        images: what the images are, for the title
        rows: key in the report of each row, by the row's name
    """
    names = list(report["chance"])
    return [
        "",
        f"Recall in percent on {report['images']} {images}, {report['captions']} captions",
        " " * 17 + "".join(f"{name.replace('_', ' '):>13}" for name in names),
        *(f"{title:<17}" + "".join(f"{report[key][name]:13.1f}" for name in names) for title, key in rows.items()),
    ]


def stages_summary(folder: Path, report: Report) -> str:
    """Returns the last output of the demo: the table, the paths of the results, and commands to try next."""
    rows = {"chance": "chance", "after stage one": "stage_one", "after stage two": "stage_two"}
    stage, python = report["pretrain"], ".venv/bin/python -m"
    lines = [
        *recall_table(report, "unseen images", rows),
        "",
        f"stage 1: {stage['images_per_second']:.0f} images/s; {stage['world_size']} ranks, ZeRO-{stage['zero_stage']}",
        f"scene prior: {report['prior']['accuracy']:.1f} % accuracy",
        f"total time: {report['seconds']:.0f} s",
        "",
        f"report       {folder / 'report.json'}",
        f"model        {folder / 'export'}",
        f"TensorBoard  .venv/bin/tensorboard --logdir {folder}",
        "",
        "Try next:",
        f"  {python} retrieval index --model {folder / 'export'} --data {folder / 'shards' / 'test'}"
        f" --output {folder / 'index'}",
        f'  {python} retrieval search --index {folder / "index"} --text "white storage tanks beside a river"',
        f"  hard belief instead of soft:   {python} pretrain --config {folder / 'stage-one' / 'config.yaml'}"
        " --model.belief.mode hard --model.belief.k 4 --run.dir runs/hard",
        "  real photographs:              make demo SOURCE=ucmerced DATA=path/to/ucmerced",
        "  your own images and a cluster: README.md",
    ]
    return "\n".join(lines)


def benchmark_summary(folder: Path, report: Report) -> str:
    """Returns the last output of a benchmark's run: its recall beside chance, and the paths of the results."""
    low, high = report["intervals"]["mean_recall"]
    lines = [
        *recall_table(report, "test images", {"chance": "chance", "test": "test"}),
        "",
        f"mean recall {report['test']['mean_recall']:.2f}, 95 % interval over images {low:.1f} to {high:.1f}",
        f"scene prior: {report['prior']['accuracy']:.1f} % accuracy on the validation images",
        f"total time: {report['seconds']:.0f} s",
        "",
        f"report       {folder / 'report.json'}",
        f"model        {folder / 'export'}",
    ]
    return "\n".join(lines)


def places_report(folder: Path, config: DemoConfig, seconds: float) -> Report:
    """Returns the report of the search for places: which of the ten best tiles show what was drawn there.

    Raises StepFailed if fewer than ENOUGH of them do.
    """
    places = read(folder / "scenes" / "places.geojson")["features"]
    hits = read(folder / "found.geojson")["features"]
    shares = [share_of(hit, places, WANTED) for hit in hits]
    right = sum(share >= SEEN for share in shares)
    named = sum(place["properties"]["label"] == WANTED for place in places)
    if right < ENOUGH * len(hits):
        raise StepFailed(f"only {right} of the {len(hits)} best tiles show {WANTED}: see {folder / 'found.geojson'}")
    return {
        "source": config.source,
        "seed": config.seed,
        "query": WANTED,
        "places": len(places),
        "places_of_it": named,
        "tiles": read(folder / "tiles" / "manifest.json")["samples"],
        "precision_at_10": right / len(hits),
        "chance": named / len(places),
        "shares": [round(share, 3) for share in shares],
        "seconds": round(seconds, 1),
    }


def share_of(hit: dict[str, Any], places: list[dict[str, Any]], label: str) -> float:
    """Returns the share of a hit's footprint that is a place of this class, both GeoJSON features in lon/lat."""
    from shapely.geometry import shape

    tile = shape(hit["geometry"])
    wanted = (shape(place["geometry"]) for place in places if place["properties"]["label"] == label)
    return float(sum(tile.intersection(place).area for place in wanted) / tile.area)


def places_summary(folder: Path, report: Report) -> str:
    """Returns the last output of the search for places."""
    python, index = ".venv/bin/python -m", folder / "index"
    lines = [
        "",
        f"{report['query']!r}: {report['precision_at_10']:.0%} of the 10 best of {report['tiles']} tiles show it; "
        f"chance {report['chance']:.1%} ({report['places_of_it']} of {report['places']} places)",
        f"total time: {report['seconds']:.0f} s",
        "",
        f"report       {folder / 'report.json'}",
        f"answers      {folder / 'found.geojson'} (QGIS opens it, with the scenes in {folder / 'scenes'})",
        f"map          {folder / 'stats' / 'rasters.png'}",
        "",
        "Try next:",
        f'  {python} retrieval search --index {index} --text "a lake" --format geojson --output lakes.geojson',
        f'  {python} retrieval search --index {index} --text "planes" --scene scene-001.tif --time 2024-06-02',
    ]
    return "\n".join(lines)
