"""The trackers of a run with the real wandb and mlflow, offline: what they get, and that a fault ends no run."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from priorclip.training.config import MonitorConfig
from priorclip.training.monitoring import trackers
from priorclip.training.monitoring.metric_log import MetricLog
from priorclip.training.monitoring.trackers import IDS, TRACKERS, open_trackers, read_ids

BLOCK = 32_768  # bytes of a block of LevelDB's log
CONFIG = "run:\n  seed: 3\n  engine: {global_batch: 32}\n"
RECORDS = [{"train/loss": 2.5, "speed/step_seconds": [0.1, 0.2], "straggler/host": "a"}, {"train/loss": 1.25}]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine of somebody who has neither an account nor a server."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def write_run(folder: Path, names: list[Any], start: int = 0, finished: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    log = MetricLog(folder, 10, start, True, False, MonitorConfig(trackers=names))
    log.describe(CONFIG, "python -m pretrain")
    for step, values in enumerate(RECORDS, start + 1):
        log.write_metrics(step, values)
    log.close(finished)


def wandb_records(file: Path) -> list[Any]:
    """The records of wandb's offline file: a log in LevelDB's format with wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, found = file.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        room = BLOCK - place % BLOCK
        if room < 7:  # a header does not cross the end of a block
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_wandb_writes_offline_what_metrics_jsonl_has(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["wandb"])
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    found = wandb_records(file)
    (run,) = [record.run for record in found if record.HasField("run")]
    assert (run.project, run.display_name) == ("priorclip", "run")
    assert run.run_id == read_ids(tmp_path / "run")["wandb"]
    assert {item.key: item.value_json for item in run.config.update}["run.engine.global_batch"] == "32"
    history = [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [(row["step"], row["train/loss"]) for row in history] == [("1", "2.5"), ("2", "1.25")]
    assert all("straggler/host" not in row for row in history)


def test_mlflow_has_the_metrics_and_a_resumed_run_continues_there(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "run"
    write_run(folder, ["mlflow"], finished=False)
    client = MlflowClient((folder / "mlflow").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("priorclip").experiment_id])
    assert run.info.status == "KILLED"
    write_run(folder, ["mlflow"], start=2)
    (run,) = client.search_runs([client.get_experiment_by_name("priorclip").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params == {"run.seed": "3", "run.engine.global_batch": "32"}
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in losses) == [(1, 2.5), (2, 1.25), (3, 2.5), (4, 1.25)]


class Broken:
    """A tracker that fails, or hangs, in one of its methods."""

    where = "start"
    hangs = False
    go_on = threading.Event()

    def __init__(self, folder: Path) -> None:
        pass

    def reach(self, place: str) -> str:
        if place == self.where:
            if self.hangs:
                self.go_on.wait()
            raise SystemExit("no server at tracker.example")
        return "id"

    def start(self, known: str | None, config: Mapping[str, Any]) -> str:
        return self.reach("start")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.reach("log")

    def finish(self, finished: bool) -> None:
        self.reach("finish")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", ("wandb", Broken))
    monkeypatch.setattr(Broken, "where", where)
    write_run(tmp_path / "run", ["wandb"])
    assert caplog.text.count("tracker wandb failed (SystemExit: no server at tracker.example)") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_hangs_delays_neither_steps_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", ("wandb", Broken))
    monkeypatch.setattr(Broken, "hangs", True)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 2)
    write_run(tmp_path / "run", ["wandb"])
    Broken.go_on.set()
    assert "tracker wandb: it did not finish" in caplog.text
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_damaged_list_of_ids_starts_a_new_run(tmp_path: Path) -> None:
    for text in ("{", "[1]", "", "[" * 100_000):
        (tmp_path / IDS).write_text(text)
        assert read_ids(tmp_path) == {}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_without_its_library_is_refused_on_every_rank(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    for writes in (True, False):
        with pytest.raises(ValueError, match=rf"pip install 'priorclip-pretraining\[{name}\]'"):
            open_trackers([name], tmp_path, writes, False)
