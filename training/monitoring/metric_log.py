"""The log of a run: ``metrics.jsonl`` (one JSON object a line), TensorBoard events and the progress.

    log.write_metrics(100, {"train/loss": 0.71, "speed/step_seconds": [0.2, 0.3], "straggler/host": "node-b"})
    log.advance(100, {"loss": 0.71})

Only rank 0 writes. Metrics have the same names everywhere: ``train/loss``, ``train/lr``, ``eval/mean_recall`` ... A
list of numbers becomes a histogram in TensorBoard; a text is in ``metrics.jsonl`` only. The Prometheus endpoint and the
trackers, if there are some, get the same metrics. tensorboard_layout.py defines the pages HPARAMS and CUSTOM SCALARS.
"""

from __future__ import annotations

import itertools
import json
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

from priorclip.common.files import write_text
from priorclip.common.output import get_logger
from priorclip.common.progress import Progress
from priorclip.training.config import MonitorConfig
from priorclip.training.monitoring.measure import RankMetrics
from priorclip.training.monitoring.prometheus import open_endpoint
from priorclip.training.monitoring.read_metrics import NAME, records
from priorclip.training.monitoring.tensorboard_layout import LAYOUT, hparams_end, hparams_start
from priorclip.training.monitoring.trackers import flat, numbers_of, open_trackers

logger = get_logger(__name__)

FLUSH_SECONDS = 20  # until TensorBoard sees what was written


class MetricLog:
    """Writes metrics by step. After a resume, it drops records after the resumed step from ``metrics.jsonl``.

    A run that starts at step 1 where another one was keeps the records of that one as ``metrics.before-1.jsonl``.

    Args:
        folder: the run directory
        total_steps: steps of the whole run
        start_step: step that the run continues from
        enabled: True on rank 0; on other ranks every method does nothing
        progress: show the progress: a bar on a terminal, a line a minute in a log
        monitor: options of the Prometheus endpoint and the trackers

    Raises:
        ValueError: the Prometheus endpoint or a tracker needs a library that is not installed
    """

    def __init__(
        self, folder: Path, total_steps: int, start_step: int, enabled: bool, progress: bool, monitor: MonitorConfig
    ) -> None:
        self.enabled = enabled
        self.folder, self.is_error_logged = folder, False
        self.endpoint = open_endpoint(monitor, folder.name, enabled)
        self.trackers = open_trackers(monitor.trackers, folder, enabled, bool(start_step))
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / NAME
        if start_step:
            kept = [record for record in records(folder) if record["step"] <= start_step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        else:
            set_records_aside(path)
        self.file = path.open("a", buffering=1)
        # TensorBoard hides earlier records from this step on: those of start_step stay.
        purge_step = start_step + 1 if start_step else 0
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=FLUSH_SECONDS)
        self.progress = Progress(total_steps, folder.name, "step", done=start_step, shown=progress, stream=sys.stdout)

    @contextmanager
    def tolerating_disk_errors(self) -> Iterator[None]:
        """A full disk loses records but does not end the run. TensorBoard's thread ends at its first error."""
        try:
            yield
        except OSError as error:
            if not self.is_error_logged:
                logger.error("%s: cannot write the metrics: %s. The run continues without them", self.folder, error)
            self.is_error_logged = True

    def describe(self, config: str, command: str) -> None:
        """Writes the run's configuration (YAML) and command for TensorBoard, and the layout of its charts."""
        if not self.enabled:
            return
        self.board.add_text("run/config", f"```yaml\n{config}\n```")
        self.board.add_text("run/command", f"```\n{command}\n```")
        self.board.add_custom_scalars(LAYOUT)
        for summary in hparams_start(yaml.safe_load(config)):
            self.board._get_file_writer().add_summary(summary)
        for tracker in self.trackers:
            tracker.describe(flat(yaml.safe_load(config)))

    def write_metrics(self, step: int, values: dict[str, Any], ranks: Sequence[RankMetrics] = ()) -> None:
        """Writes the metrics of a step. ``ranks`` are those of each rank, for the Prometheus endpoint."""
        if not self.enabled:
            return
        with self.tolerating_disk_errors():
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite_or_null(values)}) + "\n")
        with self.tolerating_disk_errors():
            for name, value in values.items():
                if isinstance(value, list):
                    self.board.add_histogram(name, np.asarray(value), step)
                elif isinstance(value, int | float) and math.isfinite(value):
                    self.board.add_scalar(name, value, step)
        if self.endpoint is not None:
            self.endpoint.update(step, values, ranks)
        for tracker in self.trackers:
            tracker.log(step, numbers_of(values))

    def write_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        if self.enabled:
            with self.tolerating_disk_errors():
                for name, image in images.items():
                    self.board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def advance(self, step: int, shown: dict[str, float]) -> None:
        """Moves the progress to a step; ``shown`` replaces the values beside it, if there are any."""
        if self.enabled:
            if shown:
                self.progress.show(shown)
            self.progress.update(step - self.progress.done)

    def close(self, finished: bool = False) -> None:
        """``finished``: the run has reached its end."""
        if self.enabled:
            self.progress.close()
            with self.tolerating_disk_errors():
                if finished:
                    self.board._get_file_writer().add_summary(hparams_end())
                self.board.close()
            with self.tolerating_disk_errors():
                self.file.close()
        if self.endpoint is not None:
            self.endpoint.close()
        for tracker in self.trackers:
            tracker.close(finished)


def set_records_aside(path: Path) -> None:
    """Renames a ``metrics.jsonl`` that is not empty to the first free ``metrics.before-N.jsonl`` beside it."""
    if not path.exists() or not path.stat().st_size:
        return
    places = (path.with_name(f"{path.stem}.before-{number}{path.suffix}") for number in itertools.count(1))
    place = next(place for place in places if not place.exists())
    path.rename(place)
    logger.warning("the run starts at step 1: the records of an earlier run in this folder are now in %s", place)


def finite_or_null(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinity by null, because JSON has neither."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
