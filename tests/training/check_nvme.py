"""Offload to NVMe on real ranks: the run equals the float64 reference, keeps its states on the disk, and resumes.

    python -m pytest tests/training/check_nvme.py --basetemp /mnt/nvme/check

Not part of the suite, because DeepSpeed first compiles its asynchronous I/O, which takes minutes. The folder must be on
a disk, because tmpfs has no direct I/O.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_training_loop import reference
from toy_launches import ToyRun, assert_same, run_toys

from priorclip.training.engine.build import settings_file
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

HIDDEN = 100_000


@pytest.fixture(scope="module")
def nvme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, nvme: Path) -> dict[str, ToyRun]:
    parent = tmp_path_factory.mktemp("runs")
    settings = json.loads(settings_file("zero3-nvme").read_text())
    # Every parameter is sharded. Those with a megabyte per rank go to the disk, here the first layer.
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    settings["zero_optimization"]["offload_param"] |= {"buffer_size": 8 * HIDDEN}
    file = parent / "small.json"
    file.write_text(json.dumps(settings))
    plain = ("--hidden", str(HIDDEN), "--run.engine.zero", str(file), "--run.engine.nvme_path", str(nvme))
    stopping = (*plain, "--dropout", "0.2", "--run.checkpoint.every", "4")
    options = {
        "plain": plain,
        "whole": stopping,
        "part": (*stopping, "--kill_at", "6"),
        "again": (*stopping, "--run.dir", str(parent / "toys" / "part")),
        "leaving": (*stopping, "--kill_at", "6"),
        "left": (*stopping, "--run.engine.zero", "3", "--run.dir", str(parent / "toys" / "leaving")),
    }
    return run_toys(parent / "toys", options)


def test_it_trains_what_one_process_would(runs: dict[str, ToyRun]) -> None:
    losses, norms, _, weights = reference(epochs=2, clip=1.0, hidden=HIDDEN)
    run = runs["plain"]
    assert run.ended == 0
    assert run.losses() == pytest.approx(losses, rel=1e-5)
    assert list(run.records("train/grad_norm").values()) == pytest.approx(norms, rel=1e-4)
    for name, value in run.weights().items():
        torch.testing.assert_close(value.double(), weights[name], rtol=1e-4, atol=1e-5)


def test_it_goes_on_as_if_it_had_not_stopped(runs: dict[str, ToyRun]) -> None:
    assert runs["part"].ended == REQUEUE_EXIT_CODE
    assert runs["again"].ended == 0
    assert_same(runs["part"], runs["whole"])


def test_its_checkpoints_are_those_of_plain_zero_3(runs: dict[str, ToyRun]) -> None:
    assert (runs["leaving"].ended, runs["left"].ended) == (REQUEUE_EXIT_CODE, 0)
    assert runs["leaving"].losses() == pytest.approx(runs["whole"].losses(), rel=1e-6)


def test_states_are_on_the_disk(runs: dict[str, ToyRun], nvme: Path) -> None:
    swapped = [path for path in nvme.rglob("*") if path.is_file()]
    assert len(swapped) > 4, "parameters, masters and moments of two ranks"
    assert all(path.stat().st_size for path in swapped)
