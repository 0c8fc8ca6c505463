"""Parts of a run for fine-tuning, on two ranks under ZeRO 0 to 3, compared with plain torch on one process.

Moving averages, best weights, early stopping, adapters, learning rates that fall with depth.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.utils import ModelEmaV3
from torch import nn

from priorclip.model import build_model
from priorclip.model.config import EncoderConfig, LoraConfig, ModelConfig, TextConfig
from priorclip.training.config import AverageConfig, CheckpointConfig, EngineConfig, OptimizerConfig, RunConfig

STEPS, RATE, DECAY = 5, 0.1, 0.6
# A large eps, because AdamW would turn rounding errors of a zero gradient into steps.
TUNING = OptimizerConfig(
    lr=0.01, layer_decay=0.5, eps=1e-3, schedule="constant", warmup=0, weight_decay=0.1, clip_grad_norm=0.0
)
ENGINES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 2), ("bf16", 3)]
FIGURES = [5.0, 3.0, 2.0, 2.5, 2.0, 1.0]  # of six evaluations; a patience of 2 stops the run at the fifth
Facts = dict[str, Any]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def inputs() -> torch.Tensor:
    return torch.randn(STEPS, 4, 7, generator=torch.Generator().manual_seed(1))


class Stream:
    """One batch an epoch, two rows for each rank. It can be saved and loaded."""

    def __init__(self, rank: int) -> None:
        self.rank, self.epoch = rank, 0

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.epoch += 1
            yield {"rows": inputs()[self.epoch % STEPS][self.rank * 2 : self.rank * 2 + 2], "epoch": self.epoch - 1}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def two_ranks(rank: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    from priorclip.training.ranks.distributed import disable_shared_memory_op

    disable_shared_memory_op()
    for precision, stage in ENGINES:
        train_with_averages(rank, Path(folder), precision, stage)
    for name, options in {
        "whole": {"max_steps": 6},
        "halves": {"max_steps": 3},
        "other": {"max_steps": 3},
    }.items():
        whole_run(rank, Path(folder), name, "2", **options)
    whole_run(rank, Path(folder), "halves", "2", max_steps=6)
    whole_run(rank, Path(folder), "other", "3", max_steps=6)
    whole_run(rank, Path(folder), "patient", "2", epochs=9, patience=2, export="best", evaluate_every=1)
    whole_run(rank, Path(folder), "patient", "2", epochs=9, patience=2, export="best", evaluate_every=1)
    for stage in range(4):
        train_adapted(rank, Path(folder), stage)
    dist.destroy_process_group()


def train_with_averages(rank: int, folder: Path, precision: str, stage: int) -> None:
    import deepspeed

    from priorclip.common.checkpoint_files import rank_file
    from priorclip.training.engine.averages import Averages
    from priorclip.training.engine.build import full_state_dict

    model = network()
    settings = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    averages = Averages(engine, AverageConfig(decay=DECAY, warmup=False))
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    for batch in inputs():
        engine.backward(engine(batch[rank * 2 : rank * 2 + 2].to(kind)).float().square().mean())
        engine.step()
        averages.update()
    before = full_state_dict(engine)
    probe = inputs()[0].to(kind)
    plain = engine(probe).float().detach()
    with averages.in_place():
        averaged = engine(probe).float().detach()
    after = full_state_dict(engine)
    assert all(torch.equal(before[name], after[name]) for name in before), "in_place restores the weights"
    assert torch.equal(plain, engine(probe).float().detach())
    torch.save((averages.state_dict(), averaged, plain), f"{folder}/{precision}-{stage}-{rank}.pt")
    place = folder / f"{precision}-{stage}"
    place.mkdir(exist_ok=True)
    torch.save(averages.named(), place / rank_file("averages", rank))
    dist.barrier()
    # The averages that this and the earlier ZeRO stages wrote.
    for other in (each for each in ENGINES[: ENGINES.index((precision, stage)) + 1] if each[0] == precision):
        assert averages.load(folder / f"{precision}-{other[1]}")
        read = averages.state_dict()
        written = torch.load(f"{folder}/{precision}-{other[1]}-{rank}.pt", weights_only=True)[0]
        assert all(torch.equal(read[name], written[name]) for name in written), (other, stage)
    assert not averages.load(folder), "the folder has no averages"
    assert all(torch.equal(value, after[name]) for name, value in averages.state_dict().items())
    engine.destroy()


def whole_run(rank: int, folder: Path, name: str, zero: str, **options: Any) -> None:
    """Runs the training loop. Writes the exported weights and their report to NAME.pt."""
    from priorclip.training.engine.build import build_engine, full_state_dict
    from priorclip.training.loop import train
    from priorclip.training.progress import total_steps
    from priorclip.training.ranks.distributed import Rank
    from priorclip.training.run import Run
    from priorclip.training.run_folder import prepare_folder
    from priorclip.training.task import Task

    config = RunConfig(
        dir=f"{folder}/{name}", progress=False, average=AverageConfig(decay=DECAY),
        checkpoint=CheckpointConfig(best="mse", best_is="min", every=3, keep=1),
        optimizer=OptimizerConfig(lr=0.05, schedule="constant", warmup=0),
        engine=EngineConfig(zero=zero, global_batch=4, threads=1), **{"epochs": 6, "evaluate_every": 0, **options},
    )  # fmt: skip
    own_rank, stream = Rank(rank, 2, rank, torch.device("cpu")), Stream(rank)
    prepare_folder(config, config, own_rank)
    model = network()
    steps = total_steps(config, 1)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    engine = build_engine(model, groups, config, total_steps=steps, world_size=2)
    evaluated: dict[int, dict[str, torch.Tensor]] = {}

    def step(engine: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = engine(batch["rows"]).float().square().mean()
        return loss, {"mse": loss}

    def evaluate(engine: Any) -> dict[str, float]:
        evaluated[engine.global_steps] = full_state_dict(engine)
        return {"mse": FIGURES[engine.global_steps - 1]}

    run = Run(config, own_rank, engine, Task(model, groups, stream, step, evaluate, export=lambda *_: None))
    report = train(run)
    weights, facts = run.model_selection.export_weights()
    torch.save((weights, facts, report["steps"], evaluated), f"{folder}/{name}-{rank}.pt")
    engine.destroy()


def adapted_model() -> tuple[Any, list[dict[str, Any]], LoraConfig]:
    """A plain CLIP with adapters in both towers and its optimizer groups."""
    from priorclip.model import parameter_groups
    from priorclip.model.lora import adapt

    torch.manual_seed(0)
    bert = {"model_type": "bert", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 8, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
    config = ModelConfig(
        kind="clip", embed_dim=8, vision=EncoderConfig(name="test_vit", image_size=32),
        text=TextConfig(config=bert, context_length=6, pooling="mean"),
    )  # fmt: skip
    model, lora = build_model(config), LoraConfig(rank=2, alpha=4)
    adapt(model, lora)
    return model, parameter_groups(model, 0.1, lr=TUNING.lr, layer_decay=TUNING.layer_decay), lora


def adapted_loss(model: Any, rows: slice) -> torch.Tensor:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))[rows]
    ids = torch.arange(1, 25).reshape(4, 6)[rows]
    found = model(images, ids, torch.ones_like(ids))
    alike = (found["image_features"] * found["text_features"]).sum(-1).mean()
    return found["attribution_scale"] * 0.01 - found["logit_scale"] * alike


def train_adapted(rank: int, folder: Path, stage: int) -> None:
    from priorclip.model.lora import merge
    from priorclip.training.engine.build import build_engine, full_state_dict

    model, groups, lora = adapted_model()
    settings = EngineConfig(zero=str(stage), global_batch=4, threads=1)
    run = RunConfig(dir=str(folder), optimizer=TUNING, engine=settings)
    engine = build_engine(model, groups, run, total_steps=3, world_size=2)
    for _ in range(3):
        engine.backward(adapted_loss(engine, slice(rank * 2, rank * 2 + 2)))
        engine.step()
    weights = full_state_dict(engine)
    torch.save((weights, merge(weights, model.config, lora)), f"{folder}/adapted-{stage}-{rank}.pt")
    engine.destroy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages")
    mp.spawn(two_ranks, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize(("precision", "stage"), ENGINES)
def test_averages_equal_those_of_one_plain_model(precision: str, stage: int, runs: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    kept = ModelEmaV3(model, decay=DECAY)
    for step, batch in enumerate(inputs()):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        kept.update(model, step=step + 1)
    tolerance = 1e-6 if precision == "fp32" else 5e-3
    for rank in range(2):
        found, averaged, plain = torch.load(runs / f"{precision}-{stage}-{rank}.pt", weights_only=True)
        for name, value in kept.module.state_dict().items():
            assert torch.allclose(found[name], value, atol=tolerance), name
            assert not torch.allclose(found[name], model.state_dict()[name], atol=1e-3), "these are the weights"
        close = tolerance if precision == "fp32" else 3e-2
        assert torch.allclose(averaged, kept.module(inputs()[0]), atol=close)
        assert not torch.equal(averaged, plain)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_run_exports_the_same_averages(rank: int, runs: Path) -> None:
    whole, facts, steps, _ = torch.load(runs / f"whole-{rank}.pt", weights_only=True)
    assert (facts["exported_step"], steps) == (6, 6)
    same = torch.load(runs / f"halves-{rank}.pt", weights_only=True)[0]
    assert all(torch.equal(same[name], value) for name, value in whole.items())
    other = torch.load(runs / f"other-{rank}.pt", weights_only=True)[0]  # from ZeRO 2 to ZeRO 3
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["whole", "other"])  # ZeRO 2 and ZeRO 3
def test_an_exported_checkpoint_equals_the_export_of_the_run(name: str, runs: Path) -> None:
    from priorclip.model.export.from_checkpoint import whole_state

    exported = torch.load(runs / f"{name}-0.pt", weights_only=True)[0]
    found = whole_state(runs / name / "checkpoints" / "step_00000006")
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[key], value) for key, value in exported.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_early_stopping_exports_the_best_weights(rank: int, runs: Path) -> None:
    """Evaluations use the averages. The run exports the weights of the third. Started again, it has nothing to do."""
    weights, facts, steps, evaluated = torch.load(runs / f"patient-{rank}.pt", weights_only=True)
    assert (steps, facts) == (5, {"exported_step": 3, "evaluation": {"mse": 2.0}})
    assert not evaluated, "the second start evaluates nothing"
    assert {path.name for path in (runs / "patient" / "checkpoints").glob("step_*")} == {
        "step_00000003", "step_00000005",
    }  # fmt: skip
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    kept = ModelEmaV3(model, decay=DECAY, use_warmup=True)
    for step in range(1, 4):
        optimizer.zero_grad()
        model(inputs()[step % STEPS]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kept.update(model, step=step)
    for name, value in kept.module.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_adapters_and_falling_rates_equal_those_of_one_plain_model(stage: int, runs: Path) -> None:
    model, groups, _ = adapted_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(groups, lr=TUNING.lr, betas=TUNING.betas, eps=TUNING.eps)
    for _ in range(3):
        optimizer.zero_grad()
        adapted_loss(model, slice(None)).backward()
        optimizer.step()
    wanted = model.state_dict()
    moved = {name for name, value in wanted.items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name and "visual" in name for name in moved), "adapters are trained"
    assert not any("base_layer" in name for name in moved), "the adapted weights are not"
    with torch.no_grad():
        loss = adapted_loss(model, slice(None))
    for rank in range(2):
        weights, merged = torch.load(runs / f"adapted-{stage}-{rank}.pt", weights_only=True)
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-6, msg=name)
        plain = build_model(model.config)
        plain.load_state_dict(merged)
        torch.testing.assert_close(adapted_loss(plain.eval(), slice(None)), loss, rtol=0, atol=1e-4)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"run\.patience and run\.export best need run\.checkpoint\.best"):
        RunConfig(dir="x", patience=2, checkpoint=CheckpointConfig(best=None))
    with pytest.raises(ValueError, match=r"run\.average\.decay must be in \[0, 1\), not 1\.5"):
        AverageConfig(decay=1.5)
