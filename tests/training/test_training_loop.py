"""DeepSpeed on two ranks against a plain loop over the whole batch: ZeRO stages, precision, clipping, weight decay."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from toy_launches import ToyRun, assert_same
from toy_run import SAMPLES, ToyStream, toy_model

from priorclip.common.checkpoint_files import find_checkpoints, find_damage
from priorclip.training.ranks.preemption import REQUEUE_EXIT_CODE

LR, DECAY, BATCH = 5e-4, 0.2, 16


def reference(
    epochs: int, clip: float, lr: float = LR, order: Sequence[int | None] | None = None, hidden: int = 32
) -> tuple[list[float], list[float], list[float], dict[str, torch.Tensor]]:
    """(losses, gradient norms, learning rates, weights) of one float64 process on the global batch, without DeepSpeed.

    ``order`` has the number of the batch of each step, None for a skipped step.
    """
    model = toy_model(dropout=0.0, batch_norm=False, hidden=hidden).double()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    total = epochs * (SAMPLES // BATCH)
    warmup = math.ceil(0.1 * total)
    losses, norms, rates = [], [], []
    batches = list(islice(ToyStream(BATCH, rank=0, world_size=1), 2 * total))
    for step, number in enumerate(range(total) if order is None else order):
        if number is None:
            continue
        batch = batches[number]
        done = (step - warmup) / (total - warmup)
        rate = lr * ((step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.nn.functional.mse_loss(model(batch["inputs"].double()), batch["targets"].double())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        for parameter in model.parameters():
            if clip and norm > clip:
                parameter.grad *= clip / norm
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
        rates.append(rate)
    return losses, norms, rates, model.state_dict()


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
def test_stage_trains_what_one_process_would(toys: dict[str, ToyRun], stage: str) -> None:
    losses, norms, rates, weights = reference(epochs=2, clip=1.0)
    run = toys[stage]
    assert run.losses() == pytest.approx(losses, rel=1e-5)
    assert list(run.records("train/grad_norm").values()) == pytest.approx(norms, rel=1e-4)
    # The record of step n has the learning rate of step n + 1.
    assert list(run.records("train/lr").values())[:-1] == pytest.approx(rates[1:], rel=1e-9)
    assert max(norms) > 1.0 > min(norms), "only some steps are clipped"
    for name, value in run.weights().items():
        torch.testing.assert_close(value.double(), weights[name], rtol=1e-4, atol=1e-6)


def test_stages_differ_by_rounding_only(toys: dict[str, ToyRun]) -> None:
    traces = [toys[f"zero{stage}"].losses() for stage in range(4)]
    for trace in traces[1:]:
        assert trace == pytest.approx(traces[0], rel=1e-6)
    reported = [
        json.loads((toys[f"zero{stage}"].folder / "report.json").read_text())["zero_stage"] for stage in range(4)
    ]
    assert reported == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload"])
def test_resumed_run_with_offload_equals_the_uninterrupted_one(toys: dict[str, ToyRun], name: str) -> None:
    assert toys[f"{name}-part"].ended == REQUEUE_EXIT_CODE
    assert toys[f"{name}-again"].ended == 0
    assert_same(toys[f"{name}-part"], toys[f"{name}-whole"])


def test_clipping_changes_the_run(toys: dict[str, ToyRun]) -> None:
    losses, _, _, weights = reference(epochs=2, clip=0.0)
    assert toys["unclipped"].losses() == pytest.approx(losses, rel=1e-5)
    assert toys["unclipped"].losses() != pytest.approx(toys["zero2"].losses(), rel=1e-6)
    for name, value in toys["unclipped"].weights().items():
        torch.testing.assert_close(value.double(), weights[name], rtol=1e-4, atol=1e-6)


def test_gradient_accumulation_gives_the_same_weights(toys: dict[str, ToyRun]) -> None:
    whole, micro = toys["zero2"].weights(), toys["micro"].weights()
    for name, value in whole.items():
        torch.testing.assert_close(micro[name], value, rtol=1e-5, atol=1e-7)
    assert toys["micro"].losses() == pytest.approx(toys["zero2"].losses(), rel=1e-6)


def test_bf16_learns(toys: dict[str, ToyRun]) -> None:
    losses = toys["bf16"].losses()
    exact, _, _, _ = reference(epochs=8, clip=1.0, lr=5e-3)
    assert losses == pytest.approx(exact, rel=0.1)
    assert losses != pytest.approx(exact, rel=1e-5), "this is not bf16"
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert all(value.dtype == torch.float32 for value in toys["bf16"].weights().values()), "masters are float32"


def test_nan_loss_ends_the_run_before_a_checkpoint(toys: dict[str, ToyRun]) -> None:
    run = toys["nan"]
    assert str(run.ended).startswith("step 8: the loss is nan")
    assert "run.optimizer.lr" in str(run.ended)
    checkpoints = find_checkpoints(run.folder / "checkpoints")
    assert [path.name for path in checkpoints] == ["step_00000006", "step_00000004"]
    assert find_damage(checkpoints[0]) is None
