"""Which checkpoints are kept, how a run behaves on a full or read-only disk, and that saving does not change it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_launches import STOPPABLE, ToyRun, assert_same, root_needed, run_toys

from priorclip.cluster.faults.compare_runs import losses
from priorclip.common.checkpoint_files import find_checkpoints, find_damage
from priorclip.common.checkpoint_record import CHECKSUMS, write_record
from priorclip.training.checkpoints.files import find_best, remove_old
from priorclip.training.checkpoints.writer import Snapshot, save_file
from priorclip.training.config import CheckpointConfig, MonitorConfig
from priorclip.training.monitoring.metric_log import MetricLog
from priorclip.training.monitoring.read_metrics import last_record, records
from priorclip.training.ranks.rng_state import rng_states, set_rng_states
from priorclip.training.run_folder import recorded_speed


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run directories whose ``checkpoints`` is a file system of its own; two of these are too small."""
    root_needed("to mount file systems")
    parent = tmp_path_factory.mktemp("disks")
    points = []
    try:
        for name, size in (("full", "8k"), ("limit", "8k"), ("readonly", "8m"), ("records", "64k")):
            point = parent / name / "checkpoints"
            point.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)], check=True)
            points.append(point)
        yield parent
    finally:
        for point in points:
            subprocess.run(["umount", str(point)], check=True)


@pytest.fixture(scope="module")
def runs(toys: dict[str, ToyRun], mounted: Path) -> dict[str, ToyRun]:
    """Runs of one launch on two ranks."""
    readonly = mounted / "readonly"
    shutil.copytree(toys["whole"].folder, readonly, dirs_exist_ok=True)
    shutil.rmtree(readonly / "checkpoints" / "step_00000012")
    subprocess.run(["mount", "-o", "remount,ro", str(readonly / "checkpoints")], check=True)
    return run_toys(mounted, {
        "full": (*STOPPABLE, "--run.checkpoint.failures", "9"),
        "limit": (*STOPPABLE, "--run.checkpoint.failures", "2", "--run.checkpoint.every", "2"),
        "readonly": STOPPABLE,
        "waiting": (*STOPPABLE, "--run.checkpoint.background", "false"),
        "kept": (*STOPPABLE, "--run.checkpoint.every", "1", "--run.checkpoint.keep", "2", "--run.checkpoint.keep_every",
                 "5", "--run.checkpoint.best", "mse", "--run.checkpoint.best_is", "max"),
    })  # fmt: skip


def test_disk_that_is_full_does_not_end_the_run(toys: dict[str, ToyRun], runs: dict[str, ToyRun]) -> None:
    run = runs["full"]
    assert_same(run, toys["whole"])
    for name in ("step_00000004", "step_00000008", "step_00000012"):
        place = f"No space left on device: '{run.folder / 'checkpoints' / name}.partial-"
        said = f"the checkpoint of step {int(name[5:])} could not be written: [Errno 28] {place}"
        told = [line for line in run.output.splitlines() if "could not be written" in line]
        assert sum(said in line for line in told) == 1, told  # the message names the file
    assert "would resume from its beginning; 8 more in a row end it" in run.output
    assert list((run.folder / "checkpoints").glob("step_*")) == [], "unfinished ones are removed, to free the disk"


def test_too_many_checkpoints_that_fail_end_the_run(runs: dict[str, ToyRun]) -> None:
    assert "2 checkpoints in a row could not be written" in str(runs["limit"].ended)
    assert "No space left on device" in str(runs["limit"].ended)
    assert max(runs["limit"].records("train/loss")) == 6, "the save at step 6 notices the second failure"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_records_that_cannot_be_written_do_not_end_the_run(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When there is room again, new records are written, and every record can be read."""
    folder = mounted / "records" / "checkpoints"
    log = MetricLog(folder, 400, 0, True, False, MonitorConfig())
    filler = folder / "filler"
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(1 << 16))
    for step in range(1, 301):
        log.write_metrics(step, {"train/loss": 0.5, "speed/step_seconds": [0.125] * 20})
    filler.unlink()
    for step in range(301, 306):
        log.write_metrics(step, {"train/loss": 0.25})
    log.close(finished=True)
    assert caplog.text.count("cannot write the metrics: [Errno 28] No space left on device") == 1
    steps = [record["step"] for record in records(folder)]
    assert steps == sorted(set(steps))
    assert steps[-5:] == [301, 302, 303, 304, 305]


def test_incomplete_record_is_skipped(tmp_path: Path) -> None:
    """All readers skip it. A resume removes it and the records after the checkpoint."""
    path = tmp_path / "metrics.jsonl"
    whole = [
        {"step": step, "time": 1.5 * step, "train/loss": 0.5, "train/images_per_second": 8.0} for step in (1, 2, 3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in whole) + '{"step": 4, "time": 6.0, "tra')
    assert records(tmp_path) == whole
    assert last_record(tmp_path) == whole[-1]
    assert recorded_speed(tmp_path) == 8.0
    assert losses(tmp_path) == {1: 0.5, 2: 0.5, 3: 0.5}
    log = MetricLog(tmp_path, 10, 2, True, False, MonitorConfig())
    log.write_metrics(3, {"train/loss": 0.25})
    log.close()
    assert losses(tmp_path) == {1: 0.5, 2: 0.5, 3: 0.25}


def test_folder_that_is_read_only(toys: dict[str, ToyRun], runs: dict[str, ToyRun]) -> None:
    run = runs["readonly"]
    assert f"resumed {run.folder / 'checkpoints' / 'step_00000008'}: step 8" in run.output
    assert "Read-only file system" in run.output
    assert_same(run, toys["whole"])
    assert [path.name for path in find_checkpoints(run.folder / "checkpoints")] == ["step_00000008", "step_00000004"]


def test_run_that_waits_for_its_checkpoints_is_the_same(toys: dict[str, ToyRun], runs: dict[str, ToyRun]) -> None:
    assert_same(runs["waiting"], toys["whole"])
    one, other = (run.folder / "checkpoints" / "step_00000008" for run in (runs["waiting"], toys["whole"]))
    assert find_damage(one) is None
    for path in one.glob("*optim_states.pt"):
        states = [torch.load(folder / path.name, weights_only=False)["optimizer_state_dict"] for folder in (one, other)]
        for mine, whole in zip(*(s["single_partition_of_fp32_groups"] for s in states), strict=True):
            assert torch.equal(mine, whole)


def test_last_ones_every_fifth_and_the_best_are_kept(runs: dict[str, ToyRun]) -> None:
    run = runs["kept"]
    figures = run.records("eval/mse")
    best = max(figures, key=lambda step: figures[step])
    wanted = sorted({11, 12, 5, 10, best})
    folder = run.folder / "checkpoints"
    assert [path.name for path in sorted(folder.glob("step_*"))] == [f"step_{step:08d}" for step in wanted]
    assert (folder / "best").read_text() == f"step_{best:08d}"
    assert (folder / "latest").read_text() == "step_00000012"


def checkpoints(folder: Path, scores: dict[int, float | None]) -> list[Path]:
    for step, value in scores.items():
        path = folder / f"step_{step:08d}"
        path.mkdir()
        evaluation = {} if value is None else {"mean_recall": value}
        write_record(path / CHECKSUMS, {"step": step, "world_size": 1, "evaluation": evaluation, "sha256": {}})
    return find_checkpoints(folder)


@pytest.mark.parametrize(("best_is", "wanted"), [("max", 20), ("min", 30)])
def test_best_is_by_the_evaluation_at_its_step(tmp_path: Path, best_is: str, wanted: int) -> None:
    there = checkpoints(tmp_path, {10: 31.0, 20: 40.5, 30: 29.0, 40: None, 50: 33.0})
    best = find_best(there, CheckpointConfig(best_is=best_is))
    assert best is not None
    assert best.name == f"step_{wanted:08d}"
    assert find_best(there, CheckpointConfig(best=None)) is None
    remove_old(there[0], CheckpointConfig(keep=1, keep_every=40, best_is=best_is))
    assert sorted(path.name for path in find_checkpoints(tmp_path)) == sorted(f"step_{s:08d}" for s in {50, 40, wanted})


def test_snapshot_is_of_its_moment_and_keeps_ties(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = OrderedDict(a=weight, tied=weight, view=weight[1:], more=[(weight * 2, {"n": 1})], text="x")
    snapshot = Snapshot()
    snapshot.begin()
    taken = snapshot.copy(state)
    weight.zero_()
    state["more"][0][1]["n"] = 2
    path = tmp_path / "state.pt"
    save_file(taken, path)
    loaded = torch.load(path, weights_only=False)
    assert torch.equal(loaded["a"], torch.arange(6.0).reshape(2, 3))
    assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    assert torch.equal(loaded["view"], torch.tensor([[3.0, 4.0, 5.0]]))
    assert loaded["more"][0][1] == {"n": 1}
    assert isinstance(taken, OrderedDict)
    again = taken["a"]
    snapshot.begin()
    assert snapshot.copy(state)["a"] is again, "host memory is used again"
    assert float(again.sum()) == 0


def test_snapshot_distinguishes_temporary_tensors() -> None:
    """DeepSpeed makes some tensors only to save them, and the next one can get the same memory."""
    snapshot = Snapshot()
    snapshot.begin()
    taken = [snapshot.copy(torch.full((1000,), float(number))) for number in range(20)]
    assert [float(each[0]) for each in taken] == list(range(20))


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draws() -> list[float]:
        python = [random.random(), random.gauss(0, 1)]
        return [*python, np.random.rand(), np.random.randn(), torch.rand(1).item(), torch.randn(1).item()]

    draws()  # the generators keep one normal number of a pair for the next call
    save_file(rng_states(), tmp_path / "states.pt")
    expected = [draws() for _ in range(400)]
    assert draws() != expected[0]
    set_rng_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [draws() for _ in range(400)] == expected


def test_checksum_is_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    value = save_file({"x": torch.randn(1000), "y": list(range(100))}, path)
    assert value == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size > 4000
