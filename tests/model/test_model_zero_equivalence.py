"""DeepSpeed ZeRO 0 to 3, two CPU ranks with half the batch each, against plain torch with the whole batch.

Three steps of plain SGD on a tiny PriorCLIP with both losses: a gradient that is wrong by a factor, or lacks the part
that other ranks hold, shows in the weights.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import tiny

from model.build import build_model, parameter_groups
from model.config import EncoderConfig, ModelConfig
from model.losses import RetrievalLoss

WORLD, BATCH, STEPS, RATE = 2, 8, 3, 0.01
STAGES = (0, 1, 2, 3)


def config() -> ModelConfig:
    """Every part trained, the prior too; no batch normalisation and no dropout, so that halves add up to the whole."""
    prior = EncoderConfig(name="test_convnext", image_size=32, kwargs={"ls_init_value": 1.0})
    return tiny(prior=prior)


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(STEPS):
        lengths = torch.randint(3, 12, (BATCH, 1), generator=generator)
        made.append(
            {
                "images": torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=generator),
                "input_ids": torch.randint(1, 60, (BATCH, 12), generator=generator),
                "attention_mask": (torch.arange(12) < lengths).long(),
                "image_ids": torch.tensor([0, 1, 2, 0, 1, 5, 6, 0]),
                "labels": torch.tensor([3, 3, -1, 1, 1, 3, -1, -1]),
            }
        )
    return made


def loss_of(forward, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = forward(batch["images"], batch["input_ids"], batch["attention_mask"])
    return RetrievalLoss(lambda_cs=0.7, chunk=3)(outputs, batch["image_ids"], batch["labels"])[0]


def start(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(config())


def one_process() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = start().train()
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=RATE)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def two_ranks(rank: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    import deepspeed

    half = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    for stage in STAGES:
        model = start().train()
        settings = {
            "train_micro_batch_size_per_gpu": BATCH // WORLD,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 would hide a gradient of the wrong length
        }
        optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=RATE)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        losses = []
        for batch in batches():
            loss = loss_of(engine, {name: value[half] for name, value in batch.items()})
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        torch.save((losses, weights), f"{folder}/{stage}-{rank}.pt")
        engine.destroy()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    mp.spawn(two_ranks, (str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_process(runs: Path, stage: int):
    expected_losses, expected = one_process()
    ranks = [torch.load(runs / f"{stage}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
    means = [sum(pair) / WORLD for pair in zip(*(losses for losses, _ in ranks), strict=True)]
    assert means == pytest.approx(expected_losses, rel=1e-4)
    before = dict(start().named_parameters())
    for name, weight in expected.items():
        moved = (weight - before[name]).abs().max().item()
        assert moved > 0, f"{name} was not trained"
        for _, weights in ranks:
            error = (weights[name] - weight).abs().max().item()
            assert error < 1e-3 * moved + 1e-6, f"{name} moved by {moved}, wrong by {error}"
