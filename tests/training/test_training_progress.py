"""Resuming with options that count otherwise: the run says so, and report, schedule and epochs are true."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from toy_launches import PYTHON, ToyRun, run_toys
from toy_run import SAMPLES

from priorclip.common.checkpoint_record import CHECKSUMS, load_record, write_record
from priorclip.common.files import sha256_of

ONE = (PYTHON, "-m", "tests.toy_runs")
BATCH, LR = 16, 5e-4
STEPS = SAMPLES // BATCH  # of an epoch
BATCHES = {"twice": "32", "half": "8", "old": "32"}
SHORTER = {"epochs": ("--run.epochs", "1"), "steps": ("--run.max_steps", "7")}
LONGER = ("--run.epochs", "4")


def forget_units(checkpoint: Path) -> None:
    """Makes it a checkpoint of version 0.1, which has neither the units nor a checksum of the record."""
    path = checkpoint / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    del state["run"]["units"]
    torch.save(state, path)
    record = load_record(checkpoint)
    write_record(checkpoint / CHECKSUMS, {**record, "sha256": {**record["sha256"], path.name: sha256_of(path)}})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """A run of two epochs, and the same command with other options in copies of its folder."""
    parent = tmp_path_factory.mktemp("units")
    whole = run_toys(parent, {"whole": ()}, ONE)["whole"]
    options = {name: ("--run.engine.global_batch", batch) for name, batch in BATCHES.items()}
    options |= {**SHORTER, "same": (), "longer": LONGER, "faster": (*LONGER, "--run.optimizer.lr", "2e-3")}
    for name in options:
        shutil.copytree(whole.folder, parent / name)
    forget_units(parent / "old" / "checkpoints" / f"step_{2 * STEPS:08d}")
    return {"whole": whole, **run_toys(parent, options, ONE)}


def report_of(run: ToyRun) -> dict[str, float]:
    return json.loads((run.folder / "report.json").read_text())


@pytest.mark.parametrize("name", BATCHES)
def test_other_global_batch_is_refused(runs: dict[str, ToyRun], name: str) -> None:
    """Twice the batch was taken for a finished run, and half of it trained three epochs for two."""
    message = f"counts steps of {BATCH} samples, and run.engine.global_batch is {BATCHES[name]}:"
    assert message in str(runs[name].ended)
    assert f"Set run.engine.global_batch {BATCH} " in str(runs[name].ended)


@pytest.mark.parametrize("name", SHORTER)
def test_run_that_would_have_ended_before_is_refused(runs: dict[str, ToyRun], name: str) -> None:
    end = {"epochs": STEPS, "steps": 7}[name]
    assert f"is of step {2 * STEPS}, and run.epochs and run.max_steps end this run at step {end}:" in str(
        runs[name].ended
    )


@pytest.mark.parametrize("name", [*BATCHES, *SHORTER])
def test_refused_run_changes_nothing(runs: dict[str, ToyRun], name: str) -> None:
    for file in ("config.yaml", "metrics.jsonl", "report.json", "weights.pt"):
        whole, left = ((runs[each].folder / file).read_bytes() for each in ("whole", name))
        assert left == whole, file


@pytest.mark.parametrize(("name", "epochs"), [("whole", 2), ("same", 2), ("longer", 4), ("faster", 4)])
def test_report_tells_what_was_trained(runs: dict[str, ToyRun], name: str, epochs: int) -> None:
    report = report_of(runs[name])
    assert (report["steps"], report["epochs"]) == (epochs * STEPS, epochs)
    assert report["samples_seen"] == epochs * STEPS * BATCH
    assert max(runs[name].records("train/loss")) == epochs * STEPS


def rate(step: int, peak: float, last_step: int) -> float:
    """The learning rate of a step, counted from 1: a cosine after a warm-up of a tenth of the run."""
    warmup = math.ceil(0.1 * last_step)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (last_step - warmup)))


@pytest.mark.parametrize(("name", "peak"), [("longer", LR), ("faster", 2e-3)])
def test_learning_rate_follows_the_options(runs: dict[str, ToyRun], name: str, peak: float) -> None:
    """From the first step after the resume on. A record has the rate of the step after it."""
    run, first, last = runs[name], 2 * STEPS + 1, 4 * STEPS
    found = run.records("train/lr")
    for step in range(first, last):
        assert found[step] == pytest.approx(rate(step + 1, peak, last), rel=1e-9, abs=1e-18), step
    said = f"the learning rate of the next step is {rate(first, peak, last):.6g}. By the options of the checkpoint"
    assert run.output.count(said) == 1
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["run"]["optimizer"]["lr"] == peak
