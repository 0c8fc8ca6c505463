"""Trackers beside TensorBoard: Weights & Biases and MLflow get the configuration and the metrics of a run.

    python -m pretrain ... --run.monitor.trackers '[wandb, mlflow]'

    metrics.jsonl {"step": 8, "train/loss": 3.21} -> queue -> thread -> wandb, mlflow

Each tracker has a thread of its own, so a server that is slow or gone delays no step, and an error of a tracker ends
that tracker and not the run. The trackers read their own variables: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI ...
Without an address or a key they write into the run directory.

accelerate has trackers with one interface too, but they need its PartialState, which would choose the device and the
process group that DeepSpeed has chosen.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from priorclip.common.files import write_text
from priorclip.common.output import get_logger

logger = get_logger(__name__)

PROJECT = "priorclip"
IDS = "trackers.json"  # in the run directory: the id of the run in each tracker, so that a resumed run continues it
WAITING = 1000  # records that wait for a tracker; more are left out
CLOSE_SECONDS = 60.0  # how long the end of a run waits for a tracker
MAX_PARAMETERS, MAX_LETTERS = 100, 500  # of one call of MLflow


class Tracker(Protocol):
    """What a tracker does. Every method may take long and may raise anything."""

    def start(self, known: str | None, config: Mapping[str, Any]) -> str:
        """Opens the run that has the id ``known``, or a new one with this flat configuration. Returns its id."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def finish(self, finished: bool) -> None: ...


class WandbTracker:
    """Weights & Biases. Without WANDB_MODE and a key it writes offline; ``wandb sync`` uploads that later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, known: str | None, config: Mapping[str, Any]) -> str:
        import wandb

        netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        has_key = "WANDB_API_KEY" in os.environ or netrc.is_file()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.folder.name,
            id=known,
            resume="allow" if known else None,
            dir=str(self.folder),
            config=dict(config),
            mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self.run.define_metric("*", step_metric="step")  # wandb's own step cannot go back after a resume
        return self.run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def finish(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MlflowTracker:
    """MLflow. Without MLFLOW_TRACKING_URI it writes to ``mlflow/`` in the run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, known: str | None, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI")
        if address is None:
            # MLflow asks for this before it writes files; its other local store needs a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (self.folder / "mlflow").resolve().as_uri()
        self.client = MlflowClient(tracking_uri=address)
        if known is not None:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = self.client.create_run(number, run_name=self.folder.name).info.run_id
        parameters = [Param(key, str(value)[:MAX_LETTERS]) for key, value in config.items()]
        for first in range(0, len(parameters), MAX_PARAMETERS):
            self.client.log_batch(self.id, params=parameters[first : first + MAX_PARAMETERS])
        return self.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def finish(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, tuple[str, type[WandbTracker] | type[MlflowTracker]]] = {
    "wandb": ("wandb", WandbTracker),
    "mlflow": ("mlflow", MlflowTracker),
}


class TrackerThread:
    """Runs a tracker in a thread. No method raises or waits, except ``close``, which waits a limited time."""

    def __init__(self, name: str, tracker: Tracker, folder: Path, is_resumed: bool) -> None:
        self.name, self.tracker, self.folder, self.is_resumed = name, tracker, folder, is_resumed
        self.waiting: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        self.lost, self.failed = 0, False
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def describe(self, config: Mapping[str, Any]) -> None:
        """Gives the flat configuration. The tracker starts with it."""
        self._put("start", config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._put("log", step, values)

    def close(self, finished: bool) -> None:
        """Waits until the tracker has what it was given, for a limited time."""
        self._put("finish", finished)
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            logger.error("tracker %s: it did not finish in %.0f s, and is left behind", self.name, CLOSE_SECONDS)
        elif self.lost and not self.failed:
            logger.error("tracker %s: %d records are missing there, because it was too slow", self.name, self.lost)

    def _put(self, what: str, *values: Any) -> None:
        try:
            self.waiting.put_nowait((what, values))
        except queue.Full:
            self.lost += 1

    def _work(self) -> None:
        try:
            while True:
                what, values = self.waiting.get(timeout=None)
                if what == "start":
                    self._start(*values)
                elif what == "log":
                    self.tracker.log(*values)
                else:
                    self.tracker.finish(*values)
                    return
        except BaseException as error:
            self.failed = True
            logger.error(
                "tracker %s failed (%s: %s). The run continues without it", self.name, type(error).__name__, error
            )

    def _start(self, config: Mapping[str, Any]) -> None:
        ids = read_ids(self.folder)
        found = self.tracker.start(ids.get(self.name) if self.is_resumed else None, config)
        with LOCK:
            write_text(self.folder / IDS, json.dumps(read_ids(self.folder) | {self.name: found}))


LOCK = threading.Lock()  # two trackers write the same file of ids


def read_ids(folder: Path) -> dict[str, str]:
    """Returns the ids of the run in its trackers; none if the file is missing or damaged."""
    try:
        found = json.loads((folder / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def open_trackers(names: Sequence[str], folder: Path, writes: bool, is_resumed: bool) -> list[TrackerThread]:
    """Opens the trackers on the rank that writes.

    Raises:
        ValueError: the library of a tracker is not installed; raised on every rank
    """
    for name in names:
        if find_spec(TRACKERS[name][0]) is None:
            raise ValueError(
                f"run.monitor.trackers: {name} is not installed: pip install 'priorclip-pretraining[{name}]', or remove"
                " it from the list"
            )
    chosen = dict.fromkeys(names) if writes else ()
    return [TrackerThread(name, TRACKERS[name][1](folder), folder, is_resumed) for name in chosen]


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers among the metrics of a step; lists and texts are for metrics.jsonl only."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"run": {"seed": 0}}`` -> ``{"run.seed": 0}``; a list stays one value."""
    if not isinstance(config, dict):
        return {prefix: config}
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
