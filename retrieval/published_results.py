"""Compares a report with published recalls. ``published.yaml`` holds them, with the source table of each.

compare_with_published("rsitmd", report)["rows"]
# [{"method": "GeoRSCLIP-FT ViT-B/32", "mean_recall": 51.81, ...}, ...]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from priorclip.common.output import get_logger

log = get_logger(__name__)

FILE = Path(__file__).with_name("published.yaml")
NAMES = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall")
SOURCES = {
    "A": "RemoteCLIP, arXiv 2306.11029, Table II",
    "B": "RS5M and GeoRSCLIP, arXiv 2306.11300, Table II",
    "C": "README of github.com/om-ai-lab/RS5M, Experiment Result",
}


def compare_with_published(benchmark: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the published rows of a benchmark and the row of this report, sorted by mean recall.

    A row has ``method``, ``trained_on``, ``source`` (keys of ``sources``; None for this report) and seven figures.
    ``same_test`` tells whether the test sets have the same size.
    """
    about = yaml.safe_load(FILE.read_text(encoding="utf-8"))[benchmark]
    rows = [
        {"method": method, "trained_on": trained, "source": source, **dict(zip(NAMES, figures, strict=True))}
        for method, trained, *figures, source in about["rows"]
    ]
    named = {key for row in rows for key in row["source"].split(", ")}
    rows.append({"method": "this model", "trained_on": None, "source": None} | {name: report[name] for name in NAMES})
    sizes = {name: about[name] for name in ("images", "captions")}
    same = all(report[name] == size for name, size in sizes.items())
    if not same:
        log.warning(
            "--benchmark %s: its test set has %s, this one %d images and %d captions: do not compare the figures",
            benchmark, " and ".join(f"{size} {name}" for name, size in sizes.items()), report["images"],
            report["captions"],
        )  # fmt: skip
    return {
        "benchmark": benchmark,
        "same_test": same,
        "rows": sorted(rows, key=lambda row: row["mean_recall"]),
        "sources": {key: text for key, text in SOURCES.items() if key in named},
    }
