"""Bad batches, with a NaN or far too large targets: the run learns the same as without them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_training_loop import reference
from toy_launches import ToyRun, run_toys

SKIP = ("--run.bad_steps.action", "skip")
BF16 = ("--run.engine.precision", "bf16")
BACK = ("--run.bad_steps.action", "rollback", "--run.checkpoint.every", "4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """One launch on two ranks; each run gets a bad batch."""
    nan = ("--nan_batch", "6")
    options = {}
    for stage in range(4):
        zero = ("--run.engine.zero", str(stage))
        options[f"skip{stage}"] = (*nan, *SKIP, *zero)
        options[f"back{stage}"] = (*nan, *BACK, *zero)
    options |= {
        "micro": (*nan, *SKIP, "--run.engine.micro_batch", "2"),
        "batch_norm": (*nan, *SKIP, "--batch_norm", "true"),
        "bf16": (*nan, *SKIP, "--run.engine.precision", "bf16"),
        "spike": ("--spike_batch", "9", *SKIP, "--run.bad_steps.spike", "20"),
        "spike_ends": ("--spike_batch", "9", "--run.bad_steps.spike", "20"),
        "limit": (*nan, *SKIP, "--run.bad_steps.limit", "0"),
        "no_checkpoint": ("--nan_batch", "1", *BACK),
    }
    bad_gradient = ("--bad_gradient_at", "6", "--run.checkpoint.every", "1", "--run.log_every", "10")
    for stage in (1, 2):
        options[f"gradient{stage}"] = (*bad_gradient, *SKIP, "--run.engine.zero", str(stage), *BF16)
        options[f"gradient_ends{stage}"] = (*bad_gradient, "--run.engine.zero", str(stage), *BF16)
        options[f"gradient_ends{stage}_fp32"] = (*bad_gradient, "--run.engine.zero", str(stage))
    return run_toys(tmp_path_factory.mktemp("bad"), options)


def bad_steps(run: ToyRun) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "bad_steps.jsonl").read_text().splitlines()]


def assert_same_as_reference(run: ToyRun, order: list[int | None]) -> None:
    _, _, rates, weights = reference(epochs=2, clip=1.0, order=order)
    assert run.ended == 0
    for name, value in run.weights().items():
        torch.testing.assert_close(value.double(), weights[name], rtol=1e-4, atol=1e-6)
    assert run.records("train/lr")[11] == pytest.approx(rates[-1], rel=1e-9), "the learning rate schedule counts steps"


@pytest.mark.parametrize("name", ["skip0", "skip1", "skip2", "skip3", "micro"])
def test_nan_batch_is_skipped(runs: dict[str, ToyRun], name: str) -> None:
    assert_same_as_reference(runs[name], [0, 1, 2, 3, 4, 5, None, 7, 8, 9, 10, 11])
    assert [(each["step"], each["action"], each["reason"]) for each in bad_steps(runs[name])] == [
        (7, "skip", "the loss is nan")
    ]


@pytest.mark.parametrize("stage", range(4))
def test_roll_back_past_the_batch(runs: dict[str, ToyRun], stage: int) -> None:
    """In step 7 the run goes back to step 4 and continues with the batch after the bad one."""
    run = runs[f"back{stage}"]
    assert_same_as_reference(run, [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14])
    (entry,) = bad_steps(run)
    assert (entry["step"], entry["action"], entry["back_to_step"]) == (7, "rollback", 4)
    assert entry["data"] == {"epoch": 1, "samples_seen": 16}, "the data continues after the bad batch"
    assert sorted(run.records("train/loss")) == list(range(1, 13))
    assert "step 7: the loss is nan; back to step 4" in run.output


def test_batch_norm_statistics_exclude_the_bad_batch(runs: dict[str, ToyRun]) -> None:
    weights = runs["batch_norm"].weights()
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert int(weights["1.num_batches_tracked"]) == 11


def test_bf16_skips(runs: dict[str, ToyRun]) -> None:
    assert [each["step"] for each in bad_steps(runs["bf16"])] == [7]
    assert all(math.isfinite(value) for step, value in runs["bf16"].records("train/loss").items() if step != 7)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_is_skipped_under_bf16(runs: dict[str, ToyRun], stage: int) -> None:
    """zero1.json and zero2.json turn DeepSpeed's check of each parameter off; a run with an action turns it on."""
    run = runs[f"gradient{stage}"]
    assert run.ended == 0
    (entry,) = bad_steps(run)
    assert (entry["step"], entry["action"]) == (7, "skip")
    assert "its gradient is not finite" in entry["reason"]
    assert all(bool(torch.isfinite(value).all()) for value in run.weights().values())


@pytest.mark.parametrize("name", ["gradient_ends1", "gradient_ends2", "gradient_ends1_fp32", "gradient_ends2_fp32"])
def test_without_an_action_such_a_gradient_ends_the_run_before_it_is_saved(runs: dict[str, ToyRun], name: str) -> None:
    """The loss of the step is finite, and DeepSpeed gives -1 for the norm."""
    run = runs[name]
    assert str(run.ended).startswith("step 7: the loss is 0."), run.ended
    assert "its gradient norm not finite" in str(run.ended)
    assert sorted(path.name for path in (run.folder / "checkpoints").glob("step_*"))[-1] == "step_00000006"


def test_spike_is_skipped(runs: dict[str, ToyRun]) -> None:
    assert_same_as_reference(runs["spike"], [0, 1, 2, 3, 4, 5, 6, 7, 8, None, 10, 11])
    (entry,) = bad_steps(runs["spike"])
    assert entry["step"] == 10
    assert "times the median" in entry["reason"]


def test_action_raise_and_the_limit_end_the_run(runs: dict[str, ToyRun]) -> None:
    assert str(runs["spike_ends"].ended).startswith("step 10: the loss is ")
    assert "times the median" in str(runs["spike_ends"].ended)
    assert "more than run.bad_steps.limit 0" in str(runs["limit"].ended)


def test_roll_back_without_a_checkpoint_skips(runs: dict[str, ToyRun]) -> None:
    assert_same_as_reference(runs["no_checkpoint"], [0, None, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
