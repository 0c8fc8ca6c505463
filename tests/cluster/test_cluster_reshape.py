"""Runs resumed on another number of ranks or in another ZeRO stage: the loss curve goes on as before."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from toy_launches import PYTHON, STOPPABLE, ToyRun, run_toys

ONE = (PYTHON, "-m", "tests.cluster.toy_runs")
# Where a run stops, and how many ranks of which stage take it up: (source, stage of the target).
ON_ONE = {"2_to_1": ("zero2", "2"), "z3_2_to_1": ("zero3", "3"), "z0_2_to_1": ("zero0", "0")}
ON_TWO = {
    "1_to_2": ("single2", "2"),
    "z3_1_to_2": ("single3", "3"),
    **{f"z{a}_to_z{b}": (f"zero{a}", f"{b}") for a in range(4) for b in range(4) if a != b},
}
ON_FOUR = {"2_to_4": ("zero2", "2"), "z3_2_to_4": ("zero3", "3"), "z1_2_to_z3_4": ("zero1", "3")}


def halfway(run: ToyRun, folder: Path) -> None:
    """The run as it was after its first epoch, six of its twelve steps."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")


def taken_up(
    parent: Path, cases: dict[str, tuple[str, str]], sources: dict[str, ToyRun], launcher: Sequence[str] | None
) -> dict[str, ToyRun]:
    for name, (source, _) in cases.items():
        halfway(sources[source], parent / name)
    return run_toys(parent, {name: ("--run.engine.zero", stage) for name, (_, stage) in cases.items()}, launcher)


@pytest.fixture(scope="module")
def reshaped(toys: dict[str, ToyRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """Three launches: runs of one process, of two ranks, of four."""
    parent = tmp_path_factory.mktemp("reshaped")
    for name, (source, _) in ON_ONE.items():
        halfway(toys[source], parent / name)
    shutil.copytree(toys["whole"].folder, parent / "batch_norm")
    options: dict[str, Sequence[str]] = {name: ("--run.engine.zero", stage) for name, (_, stage) in ON_ONE.items()}
    options |= {f"single{stage}": ("--run.engine.zero", stage) for stage in ("2", "3")}
    done = run_toys(parent, {**options, "batch_norm": STOPPABLE}, ONE)
    done |= taken_up(parent, ON_TWO, {**toys, **done}, None)
    four = (PYTHON, "-m", "cluster", "launch", "--nproc", "4", "--", "tests.cluster.toy_runs")
    return done | taken_up(parent, ON_FOUR, toys, four)


@pytest.mark.parametrize("name", [*ON_ONE, *ON_TWO, *ON_FOUR])
def test_loss_curve_goes_on(toys: dict[str, ToyRun], reshaped: dict[str, ToyRun], name: str) -> None:
    run, whole = reshaped[name], toys["zero2"]
    assert run.ended == 0
    assert f"resumed {run.folder / 'checkpoints' / 'step_00000006'}: step 6" in run.output
    assert run.losses() == pytest.approx(whole.losses(), rel=2e-6)
    assert run.records("train/lr") == pytest.approx(whole.records("train/lr"), rel=1e-9)
    for key, value in whole.weights().items():
        torch.testing.assert_close(run.weights()[key], value, rtol=1e-5, atol=1e-7)
    native = {"z0_2_to_1"}  # without ZeRO every rank has everything
    told = [line for line in run.output.splitlines() if str(run.folder / "checkpoints") in line and " has " in line]
    assert len(told) == (0 if name in native else 1)
    assert all("taken over by parameter" in line for line in told)


def test_batch_norm_statistics_are_averaged(toys: dict[str, ToyRun], reshaped: dict[str, ToyRun]) -> None:
    folder = toys["whole"].folder / "checkpoints" / "step_00000012"
    ranks = [torch.load(folder / f"buffers_rank_{rank:05d}.pt", weights_only=True) for rank in range(2)]
    weights = reshaped["batch_norm"].weights()
    for name, value in ranks[0].items():
        assert torch.equal(weights[name], (value + ranks[1][name]) / 2 if value.is_floating_point() else value), name
