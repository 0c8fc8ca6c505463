"""Runs the whole system: shards, scene prior, stage one under ZeRO on several ranks, stage two, recall.

    python -m demo                                                      # synthetic aerial scenes
    python -m demo --source ucmerced --data path/to/ucmerced             # real photographs

Every step is a command of the system that a user can type. The demo prints it, runs it and logs its output to
RUN/logs/STEP.log.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from demo.config import DemoConfig
from demo.plans import synthetic_plan, ucmerced_plan
from demo.steps import StepFailed, run_steps
from priorclip.common.command_line import run_command
from priorclip.common.options import parse

PLANS = {"synthetic": synthetic_plan, "ucmerced": ucmerced_plan}


def main() -> int:
    config = parse(DemoConfig, prog="demo")
    return run_command("demo", lambda: demo(config), (StepFailed, OSError, ValueError))


def demo(config: DemoConfig) -> None:
    """Runs all steps, then writes and prints the report."""
    folder = Path(config.dir or ("runs/demo" if config.source == "synthetic" else f"runs/demo-{config.source}"))
    begun = time.time()
    steps = PLANS[config.source](config, folder)
    keep_previous(folder)
    run_steps(steps, folder)
    report = collect(folder, config, time.time() - begun)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(summary(folder, report))


def keep_previous(folder: Path) -> None:
    """Moves an earlier demo to FOLDER.previous, so that this demo starts with an empty folder."""
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        print(f"an earlier {folder} is now {previous}")
    folder.mkdir(parents=True)


def collect(folder: Path, config: DemoConfig, seconds: float) -> dict:
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


def summary(folder: Path, report: dict) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
