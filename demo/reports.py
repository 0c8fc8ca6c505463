"""The report of a demo, from the reports of its steps, and its last words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from demo.config import DemoConfig


def stages_report(folder: Path, config: DemoConfig, seconds: float) -> dict:
    """Returns the demo's report, from the reports of its steps. Copies the stage-two model to FOLDER/export."""
    pretrain = json.loads((folder / "stage-one" / "report.json").read_text())
    prior = json.loads((folder / "prior" / "report.json").read_text())
    one = json.loads((folder / "stage-one" / "recall.json").read_text())
    two = json.loads((folder / "stage-two" / "recall.json").read_text())
    shutil.copytree(folder / "stage-two" / "export", folder / "export")
    return {
        "source": config.source,
        "seed": config.seed,
        "images": two["images"],
        "captions": two["captions"],
        "chance": two["chance"],
        "stage_one": recalls(one),
        "stage_two": recalls(two),
        "prior": prior["evaluation"],
        "pretrain": {
            name: pretrain[name] for name in ("images_per_second", "world_size", "zero_stage", "steps", "global_batch")
        },
        "seconds": round(seconds, 1),
    }


def recalls(report: dict) -> dict[str, float]:
    return {name: report[name] for name in report["chance"]}


def stages_summary(folder: Path, report: dict) -> str:
    """Returns the last output of the demo: the table, the paths of the results, and commands to try next."""
    names = list(report["chance"])
    rows = {"chance": "chance", "after stage one": "stage_one", "after stage two": "stage_two"}
    lines = ["", f"Recall in percent on {report['images']} unseen images, {report['captions']} captions"]
    lines.append(" " * 17 + "".join(f"{name.replace('_', ' '):>13}" for name in names))
    for title, key in rows.items():
        lines.append(f"{title:<17}" + "".join(f"{report[key][name]:13.1f}" for name in names))
    stage, python = report["pretrain"], ".venv/bin/python -m"
    lines += [
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


def benchmark_report(folder: Path, config: DemoConfig, seconds: float) -> dict[str, Any]:
    """Returns the report of a benchmark's best row. Copies its model to FOLDER/export."""
    tuned = json.loads((folder / "tuned" / "report.json").read_text())
    prior = json.loads((folder / "prior" / "report.json").read_text())
    test = json.loads((folder / "recall.json").read_text())
    shutil.copytree(folder / "tuned" / "export", folder / "export")
    return {
        "source": config.source,
        "seed": config.seed,
        "images": test["images"],
        "captions": test["captions"],
        "chance": test["chance"],
        "test": recalls(test),
        "intervals": test["intervals"],
        "validation": tuned["evaluation"],
        "prior": prior["evaluation"],
        "steps": tuned["steps"],
        "seconds": round(seconds, 1),
    }


def benchmark_summary(folder: Path, report: dict[str, Any]) -> str:
    """Returns the last output of a benchmark's run: its recall beside chance, and the paths of the results."""
    names = list(report["chance"])
    low, high = report["intervals"]["mean_recall"]
    return "\n".join([
        "",
        f"Recall in percent on {report['images']} test images, {report['captions']} captions",
        " " * 17 + "".join(f"{name.replace('_', ' '):>13}" for name in names),
        *(
            f"{title:<17}" + "".join(f"{report[title][name]:13.1f}" for name in names) for title in ("chance", "test")
        ),
        "",
        f"mean recall {report['test']['mean_recall']:.2f}, 95 % interval over images {low:.1f} to {high:.1f}",
        f"scene prior: {report['prior']['accuracy']:.1f} % accuracy on the validation images",
        f"total time: {report['seconds']:.0f} s",
        "",
        f"report       {folder / 'report.json'}",
        f"model        {folder / 'export'}",
    ])  # fmt: skip
