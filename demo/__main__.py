"""Runs the whole system: shards, scene prior, stage one under ZeRO on several ranks, stage two, recall.

    python -m demo                                                      # synthetic aerial scenes
    python -m demo --source raster                                      # georeferenced scenes, found by words
    python -m demo --source ucmerced --data path/to/ucmerced             # real photographs
    python -m demo --source rsicd --data path/to/rsicd                   # the benchmark: scene prior and one training

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
from demo.raster_plan import raster_plan
from demo.reports import (
    benchmark_report,
    benchmark_summary,
    places_report,
    places_summary,
    stages_report,
    stages_summary,
)
from demo.rsicd_plan import rsicd_plan
from demo.steps import StepFailed, run_steps
from priorclip.common.command_line import run_command
from priorclip.common.options import parse
from priorclip.common.output import say

SOURCES = {  # folder, plan, report, summary
    "synthetic": ("runs/demo", synthetic_plan, stages_report, stages_summary),
    "raster": ("runs/demo-raster", raster_plan, places_report, places_summary),
    "ucmerced": ("runs/demo-ucmerced", ucmerced_plan, stages_report, stages_summary),
    "rsicd": ("runs/rsicd", rsicd_plan, benchmark_report, benchmark_summary),
}


def main() -> int:
    config = parse(DemoConfig, prog="demo")
    return run_command("demo", lambda: demo(config), (StepFailed, OSError, ValueError))


def demo(config: DemoConfig) -> None:
    """Runs all steps, then writes and prints the report."""
    own_folder, plan, report_of, summary_of = SOURCES[config.source]
    folder = Path(config.dir or own_folder)
    begun = time.time()
    steps = plan(config, folder)
    keep_previous(folder)
    run_steps(steps, folder)
    report = report_of(folder, config, time.time() - begun)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    say(summary_of(folder, report))


def keep_previous(folder: Path) -> None:
    """Moves an earlier demo to FOLDER.previous, so that this demo starts with an empty folder."""
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        say(f"an earlier {folder} is now {previous}")
    folder.mkdir(parents=True)


if __name__ == "__main__":
    sys.exit(main())
