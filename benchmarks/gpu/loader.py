"""The section `loader`: images/s that one core loads, by `python -m data_shards bench`, with open_clip's loader."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from priorclip.data_shards.commands import BenchConfig
from priorclip.data_shards.inspect.bench import bench


def measure_loader(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns images/s a core, ours and open_clip's if it is installed, for drawn JPEGs of one size."""
    count = settings["loader_images"]
    side = settings["image_size"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        bench(BenchConfig(output=str(output), sizes=[case["side"]], scales=[0.9], count=count, image_size=side,
                          batch=min(64, count), rounds=settings["repeats"], workers=False))  # fmt: skip
        (row,) = json.loads(output.read_text())["rows"]
    return {"images": count, "image_size": side, **row}
