"""Gradient caching: micro batches give the losses, gradients and weights of the whole batch.

In float64 with plain torch, and under DeepSpeed ZeRO 0 to 3 on two ranks, with and without caching. Dropout, batch
norms and bf16 as well. The last test reads the checkpoints of these ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from priorclip.model.build import build_model, parameter_groups
from priorclip.model.config import EncoderConfig, LossConfig, ModelConfig, PAEConfig, TextConfig
from priorclip.model.export.from_checkpoint import whole_state
from priorclip.model.objective import RetrievalObjective
from priorclip.training.engine.grad_cache import backward_cached
from priorclip.training.step import micro_batch, optimize

SIZE, RATE, STEPS = 8, 0.01, 2
LOSS = LossConfig(lambda_cs=0.7, chunk=3)
BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Uses one thread, because models this small are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(dropout: float = 0.0, batch_norm: bool = False, kind: str = "priorclip", **changes: Any) -> ModelConfig:
    """A model with every part trained. It has batch norms only in the prior, if ``batch_norm`` is set."""
    prior = EncoderConfig(name="test_resnet" if batch_norm else "test_convnext", image_size=32)
    if not batch_norm:
        prior.kwargs = {"ls_init_value": 1.0}
    text = BERT | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return ModelConfig(
        kind=kind, embed_dim=16, vision=EncoderConfig(name="test_vit", image_size=64), prior=prior,
        text=TextConfig(config=text, context_length=20, pooling="mean"),
        pae=PAEConfig(spatial_layers=1, temporal_cycles=1, heads=2, dropout=dropout), **changes,
    )  # fmt: skip


def built(**changes) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config(**changes)).train()


def batches(count: int = STEPS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        lengths = torch.randint(3, 12, (SIZE, 1), generator=generator)
        made.append(
            {
                "images": torch.randint(0, 256, (SIZE, 3, 64, 64), dtype=torch.uint8, generator=generator),
                "input_ids": torch.randint(1, 60, (SIZE, 12), generator=generator),
                "attention_mask": (torch.arange(12) < lengths).long(),
                "image_ids": torch.tensor([0, 1, 2, 0, 1, 5, 6, 0]),
                "labels": torch.tensor([3, 3, -1, 1, 1, 3, -1, -1]),
                "epoch": 0,
            }
        )
    return made


def objective() -> RetrievalObjective:
    return RetrievalObjective(LOSS, torch.device("cpu"))


class PlainEngine:
    """Plain torch in place of DeepSpeed's engine. The images get the dtype of the first parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.text_features: list[torch.Tensor] = []

    def __call__(self, images, input_ids, attention_mask):
        kind = next(self.module.parameters()).dtype
        outputs = self.module(images.to(kind) / 255, input_ids, attention_mask)
        self.text_features.append(outputs["text_features"].detach())
        return outputs

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        assert not scale_wrt_gas, "gradients of micro batches are added, not averaged"
        loss.backward()


def cached(engine: PlainEngine, batch, pieces: int) -> torch.Tensor:
    gets = [partial(micro_batch, batch, piece, pieces, torch.device("cpu")) for piece in range(pieces)]
    return backward_cached(engine, gets, batch, objective(), lambda: None)[0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["priorclip", "prioritr"])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_gradient_equals_that_of_the_whole_batch(pieces: int, kind: str) -> None:
    batch = batches(1)[0]
    whole, parts = built(kind=kind).double(), built(kind=kind).double()
    loss = objective().step(PlainEngine(whole), batch)[0]
    loss.backward()
    found = cached(PlainEngine(parts), batch, pieces)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    assert gradients(whole)["logit_scale"].abs() > 1e-6
    assert gradients(whole)["attribution_scale"].abs() > 1e-6
    for name, wanted in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], wanted, rtol=1e-9, atol=1e-10, msg=name)


def test_the_sigmoid_loss_has_the_gradient_of_the_whole_batch() -> None:
    """With its bias, and with equal captions of different images, which are in different micro batches."""
    batch = batches(1)[0]
    batch["input_ids"][7] = batch["input_ids"][1]
    wanted_by = {}
    for equal in ("negative", "ignored"):
        loss = LossConfig(lambda_cs=0.7, chunk=3, kind="sigmoid", equal_captions=equal)
        sigmoid = RetrievalObjective(loss, torch.device("cpu"))
        whole, parts = (built(logit_bias_init=-3.0).double() for _ in range(2))
        sigmoid.step(PlainEngine(whole), batch)[0].backward()
        gets = [partial(micro_batch, batch, piece, 4, torch.device("cpu")) for piece in range(4)]
        backward_cached(PlainEngine(parts), gets, batch, sigmoid, lambda: None)
        wanted_by[equal] = gradients(whole)
        assert gradients(whole)["logit_bias"].abs() > 1e-3
        for name, wanted in gradients(whole).items():
            torch.testing.assert_close(gradients(parts)[name], wanted, rtol=1e-9, atol=1e-10, msg=name)
    first, second = (wanted_by[equal]["text_projection.weight"] for equal in ("negative", "ignored"))
    assert not torch.allclose(first, second, rtol=1e-3)


def test_the_loss_of_distributions_has_the_gradient_of_the_whole_batch() -> None:
    """The variances of a micro batch are cached beside its features."""
    batch = batches(1)[0]
    loss = RetrievalObjective(LossConfig(lambda_cs=0.7, chunk=3, kind="probabilistic"), torch.device("cpu"))
    whole, parts = (built(logit_bias_init=5.0, uncertainty=True).double() for _ in range(2))
    loss.step(PlainEngine(whole), batch)[0].backward()
    gets = [partial(micro_batch, batch, piece, 4, torch.device("cpu")) for piece in range(4)]
    backward_cached(PlainEngine(parts), gets, batch, loss, lambda: None)
    assert gradients(whole)["uncertainty.text.linear.weight"].abs().max() > 1e-6
    for name, wanted in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], wanted, rtol=1e-9, atol=1e-10, msg=name)


def test_a_shared_scale_gets_the_gradient_of_both_losses() -> None:
    batch = batches(1)[0]
    whole, parts = built(shared_scale=True).double(), built(shared_scale=True).double()
    objective().step(PlainEngine(whole), batch)[0].backward()
    cached(PlainEngine(parts), batch, 4)
    wanted = gradients(whole)["logit_scale"]
    torch.testing.assert_close(gradients(parts)["logit_scale"], wanted, rtol=1e-9, atol=1e-10)
    assert gradients(parts)["attribution_scale"] is None


def test_one_piece_gives_the_same_bits() -> None:
    batch = batches(1)[0]
    whole, parts = built(), built()
    objective().step(PlainEngine(whole), batch)[0].backward()
    cached(PlainEngine(parts), batch, 1)
    for name, wanted in gradients(whole).items():
        assert torch.equal(gradients(parts)[name], wanted), name


@pytest.mark.parametrize("kind", ["priorclip", "prioritr"])
def test_dropout_masks_are_the_same_in_both_passes(kind: str) -> None:
    """The gradient equals that of one graph over all micro batches with the same seed."""
    batch, pieces = batches(1)[0], 4
    whole, parts = built(dropout=0.3, kind=kind).double(), built(dropout=0.3, kind=kind).double()
    torch.manual_seed(5)
    engine = PlainEngine(whole)
    outputs = [objective().encode(engine, micro_batch(batch, i, pieces, torch.device("cpu"))) for i in range(pieces)]
    joined = {k: torch.cat([o[k] for o in outputs]) if v.ndim else v for k, v in outputs[0].items()}
    objective().losses(joined, batch)[0].backward()
    torch.manual_seed(5)
    engine = PlainEngine(parts)
    cached(engine, batch, pieces)
    for first, second in zip(engine.text_features[:pieces], engine.text_features[pieces:], strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(engine.text_features[0], built(dropout=0.0, kind=kind).double().eval().encode_text(
        *(micro_batch(batch, 0, pieces, torch.device("cpu"))[k] for k in ("input_ids", "attention_mask"))
    )), "dropout did nothing"  # fmt: skip
    for name, wanted in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], wanted, rtol=1e-9, atol=1e-10, msg=name)


def test_batch_norms_count_a_micro_batch_once() -> None:
    batch, pieces = batches(1)[0], 2
    once, parts = built(batch_norm=True), built(batch_norm=True)
    before = {name: value.clone() for name, value in once.named_buffers()}
    with torch.no_grad():
        for piece in range(pieces):
            objective().encode(PlainEngine(once), micro_batch(batch, piece, pieces, torch.device("cpu")))
    cached(PlainEngine(parts), batch, pieces)
    wanted, found = dict(once.named_buffers()), dict(parts.named_buffers())
    counted = [name for name in wanted if name.endswith("num_batches_tracked")]
    assert counted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        if name in counted:
            assert value - before[name] == pieces
    assert all(module.track_running_stats for module in parts.modules() if isinstance(module, nn.BatchNorm2d))


# Precision, ZeRO stage, micro batches of each of the two ranks (1: no gradient caching).
ENGINES = [("fp32", 0, 1), ("fp32", 1, 1), ("fp32", 2, 1), ("fp32", 3, 1),
           ("fp32", 0, 2), ("fp32", 1, 2), ("fp32", 2, 2), ("fp32", 3, 2), ("bf16", 3, 2)]  # fmt: skip


def two_ranks(rank: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    import deepspeed

    from priorclip.training.engine.build import full_state_dict
    from priorclip.training.ranks.distributed import disable_shared_memory_op

    disable_shared_memory_op()

    for precision, stage, pieces in ENGINES:
        model = built()
        settings = {
            "train_batch_size": SIZE,
            "train_micro_batch_size_per_gpu": SIZE // 2 // pieces,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed's default of 1.0 would hide a gradient of wrong norm
            "bf16": {"enabled": precision == "bf16"},
        }
        optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=RATE)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        losses, feature_losses = [], objective() if pieces > 1 else None
        for batch in batches():
            own_rows = {k: v[rank * 4 : rank * 4 + 4] if torch.is_tensor(v) else v for k, v in batch.items()}
            parts = optimize(engine, own_rows, objective().step, torch.device("cpu"), feature_losses)
            losses.append(parts["loss"].item())
        assert engine.global_steps == STEPS
        torch.save((losses, full_state_dict(engine)), f"{folder}/{precision}-{stage}-{pieces}-{rank}.pt")
        if pieces == 1:
            engine.save_checkpoint(f"{folder}/checkpoints-{stage}", tag="step_00000002")
        engine.destroy()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def deepspeed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ranks are forks of a server process that has imported DeepSpeed, timm and transformers."""
    folder = tmp_path_factory.mktemp("cached")
    mp.set_forkserver_preload(["deepspeed", "timm", "transformers"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        mp.start_processes(two_ranks, (str(folder),), nprocs=2, start_method="forkserver")
    return folder


def of_rank(folder: Path, rank: int, precision: str, stage: int, pieces: int) -> tuple[list[float], dict]:
    return torch.load(folder / f"{precision}-{stage}-{pieces}-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_batches() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of plain torch in one process, without micro batches."""
    model, losses = built(), []
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=RATE)
    for batch in batches():
        optimizer.zero_grad()
        loss = objective().step(model, batch)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("precision", "stage", "pieces"), ENGINES)
def test_two_ranks_equal_one_process(
    precision: str,
    stage: int,
    pieces: int,
    deepspeed_runs: Path,
    whole_batches: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    losses, expected = whole_batches
    before = dict(built().named_parameters())
    ranks = [of_rank(deepspeed_runs, rank, precision, stage, pieces) for rank in range(2)]
    means = [sum(pair) / 2 for pair in zip(*(found for found, _ in ranks), strict=True)]
    assert means == pytest.approx(losses, rel=1e-4 if precision == "fp32" else 2e-2)
    for _, weights in ranks:
        moved = {name: weights[name] - before[name].detach() for name in expected}
        wanted = {name: expected[name] - before[name].detach() for name in expected}
        if precision == "fp32":
            for name, value in wanted.items():
                assert value.abs().max() > 0, f"{name} was not trained"
                assert (moved[name] - value).abs().max() < 1e-3 * value.abs().max() + 1e-6, name
        else:  # rounding turns a gradient a little; a wrong factor or a missing part changes it more
            a, b = (torch.cat([value.flatten() for value in each.values()]) for each in (moved, wanted))
            assert (a @ b / (a.norm() * b.norm())).item() > 0.98
            assert (a.norm() / b.norm()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_two_ranks_is_read_in_one_process(stage: int, deepspeed_runs: Path) -> None:
    """`model export` reads the weights from a checkpoint of any ZeRO stage."""
    found = whole_state(deepspeed_runs / f"checkpoints-{stage}" / "step_00000002")
    _, expected = of_rank(deepspeed_runs, 0, "fp32", stage, 1)
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].reshape(value.shape), value), name
