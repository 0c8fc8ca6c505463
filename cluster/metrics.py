"""The record of a run: ``metrics.jsonl`` (one JSON object a line), TensorBoard events and the progress bar.

Only rank 0 writes. Names are the same in both: ``train/loss``, ``train/lr``, ``eval/mean_recall`` ...
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


class MetricLog:
    """Writes numbers by step. After a resume, records past the resumed step are dropped from ``metrics.jsonl``.

    Args:
        folder: the run directory
        total_steps: length of the progress bar
        start_step: step that the run continues from
        enabled: False on all ranks but the first, where every method does nothing
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, enabled: bool, progress: bool) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = records_before(path, start_step)
        self.file = path.open("w", buffering=1)
        for record in kept:
            self.file.write(json.dumps(record) + "\n")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
        self.bar = tqdm(
            total=total_steps, initial=start_step, desc=folder.name, unit="step", disable=not progress,
            file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 15.0, dynamic_ncols=sys.stdout.isatty(),
        )  # fmt: skip

    def text(self, name: str, value: str) -> None:
        if self.enabled:
            self.board.add_text(name, value)

    def numbers(self, step: int, values: dict[str, Any]) -> None:
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain(values)}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self.board.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: torch.Tensor) -> None:
        if self.enabled:
            self.board.add_histogram(name, values, step)

    def pictures(self, step: int, images: Mapping[str, Image.Image]) -> None:
        if self.enabled:
            for name, image in images.items():
                self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def advance(self, step: int, shown: dict[str, float]) -> None:
        if self.enabled:
            if shown:
                self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            self.board.close()
            self.file.close()


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such figures are written as null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def records_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Records of an earlier part of the run up to ``step``; a last line that a crash cut short is dropped."""
    records: list[dict[str, Any]] = []
    if step == 0 or not path.is_file():
        return records
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            records.append(record)
    return records
