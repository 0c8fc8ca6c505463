"""The record of a run: ``metrics.jsonl`` (one JSON object a line), TensorBoard events and the progress bar.

Only rank 0 writes. Names are the same in both: ``train/loss``, ``train/lr``, ``eval/mean_recall`` ...; a list of
numbers is a histogram in TensorBoard, a text stands in ``metrics.jsonl`` only. The same figures go to the Prometheus
endpoint, where there is one. TensorBoard's first pages, HPARAMS and CUSTOM SCALARS, are laid out by cluster.layout.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from priorclip.common.files import write_text
from priorclip.training.config import MonitorConfig
from priorclip.training.monitoring.measure import RankMetrics
from priorclip.training.monitoring.prometheus import open_endpoint
from priorclip.training.monitoring.read_metrics import NAME, records
from priorclip.training.monitoring.tensorboard_layout import LAYOUT, hparams_end, hparams_start

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 20  # until what was written is seen by a TensorBoard that looks on


class MetricLog:
    """Writes numbers by step. After a resume, records past the resumed step are dropped from ``metrics.jsonl``.

    Args:
        folder: the run directory
        total_steps: length of the progress bar
        start_step: step that the run continues from
        enabled: False on all ranks but the first, where every method does nothing
        monitor: where the Prometheus endpoint is, if there is to be one

    Raises:
        ValueError: an endpoint is wanted whose library is not installed
    """

    def __init__(
        self, folder: Path, total_steps: int, start_step: int, enabled: bool, progress: bool, monitor: MonitorConfig
    ) -> None:
        self.enabled = enabled
        self.folder, self.told = folder, False
        self.endpoint = open_endpoint(monitor, folder.name, enabled)
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / NAME
        kept = [record for record in records(folder) if record["step"] <= start_step] if start_step else []
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = path.open("a", buffering=1)
        # TensorBoard hides what was written before of the purged step and those after it: that of start_step stays.
        purged = start_step + 1 if start_step else 0
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purged, flush_secs=FLUSH_SECONDS)
        self.bar = tqdm(
            total=total_steps, initial=start_step, desc=folder.name, unit="step", disable=not progress,
            file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 15.0, dynamic_ncols=sys.stdout.isatty(),
        )  # fmt: skip

    @contextmanager
    def bearing(self) -> Iterator[None]:
        """A disk that fills up costs records, not the run; TensorBoard's thread ends at its first error for good."""
        try:
            yield
        except OSError as error:
            if not self.told:
                logger.error("%s: the record of the run cannot be written: %s. The run goes on", self.folder, error)
            self.told = True

    def describe(self, config: str, command: str) -> None:
        """The run's configuration (YAML) and command, as text and as hyperparameters, and the layout of the charts."""
        if not self.enabled:
            return
        self.board.add_text("run/config", f"```yaml\n{config}\n```")
        self.board.add_text("run/command", f"```\n{command}\n```")
        self.board.add_custom_scalars(LAYOUT)
        for summary in hparams_start(yaml.safe_load(config)):
            self.board._get_file_writer().add_summary(summary)

    def write_metrics(self, step: int, values: dict[str, Any], ranks: Sequence[RankMetrics] = ()) -> None:
        """Figures of a step; ``ranks`` are what each rank saw, for the endpoint."""
        if not self.enabled:
            return
        with self.bearing():
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain(values)}) + "\n")
        with self.bearing():
            for name, value in values.items():
                if isinstance(value, list):
                    self.board.add_histogram(name, np.asarray(value), step)
                elif isinstance(value, int | float) and math.isfinite(value):
                    self.board.add_scalar(name, value, step)
        if self.endpoint is not None:
            self.endpoint.update(step, values, ranks)

    def write_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        if self.enabled:
            with self.bearing():
                for name, image in images.items():
                    self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def advance(self, step: int, shown: dict[str, float]) -> None:
        if self.enabled:
            if shown:
                self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self, finished: bool = False) -> None:
        """``finished``: the run has reached its last step."""
        if self.enabled:
            self.bar.close()
            with self.bearing():
                if finished:
                    self.board._get_file_writer().add_summary(hparams_end())
                self.board.close()
            with self.bearing():
                self.file.close()
        if self.endpoint is not None:
            self.endpoint.close()


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such figures are written as null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
