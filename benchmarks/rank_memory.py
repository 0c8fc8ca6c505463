"""Memory of real DeepSpeed ranks, measured with torch's CPU allocator, to check the estimates.

    python -m cluster launch --nproc 2 -- benchmarks.rank_memory REQUEST.json

REQUEST.json is ``{"preset": ..., "runs": [{"zero": "2", "batch": 8, "bucket": 500000}, ...]}``, batch for each
rank. Rank 0 writes REQUEST.json.measured, a list with one record per run, in bytes of the largest rank:

    parameters, gradients, optimizer     storages of the engine (gradients: after the backward pass)
    peak                                 most memory allocated at once during the second step
    before                               memory allocated at the start of that step
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from priorclip.common.options import without_local_rank
from priorclip.model import RetrievalObjective, build_model, parameter_groups
from priorclip.model.config import LossConfig
from priorclip.model.presets import load_preset
from priorclip.training.config import EngineConfig, OptimizerConfig, RunConfig
from priorclip.training.engine.build import build_engine, settings_file
from priorclip.training.ranks.distributed import Rank, seed_everything, start

STEPS = 2


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Returns the bytes of the distinct storages of these tensors."""
    found = {}
    for tensor in tensors:
        if torch.is_tensor(tensor) and tensor.numel():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def parameter_tensors(engine: Any) -> list[torch.Tensor]:
    """Returns the parameters that the engine keeps between steps: whole ones, or with ZeRO-3 the rank's shards."""
    kept = []
    for parameter in engine.module.parameters():
        kept.append(parameter.data)
        if hasattr(parameter, "ds_tensor"):
            kept.append(parameter.ds_tensor.data)
    return kept


def optimizer_tensors(engine: Any) -> list[torch.Tensor]:
    """Returns Adam's states and the float32 masters."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    masters += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    return [*masters, *states]


def gradient_tensors(engine: Any) -> list[torch.Tensor]:
    own = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    averaged = getattr(engine.optimizer, "averaged_gradients", {})
    if getattr(engine.optimizer, "grad_partitions_flat_buffer", None) is not None:
        own.append(engine.optimizer.grad_partitions_flat_buffer)
    return own + [tensor for tensors in averaged.values() if tensors for tensor in tensors if tensor is not None]


def with_buckets(wanted: dict[str, Any], rank: Rank, folder: Path) -> str:
    """Returns a DeepSpeed JSON with small buckets, because default buckets are larger than a small model."""
    settings = json.loads(settings_file(wanted["zero"]).read_text())
    for name in settings["zero_optimization"]:
        if "bucket" in wanted and name.endswith("bucket_size"):
            settings["zero_optimization"][name] = wanted["bucket"]
    path = folder.with_name(f"zero{wanted['zero']}-rank{rank.rank}.json")  # one file per rank
    path.write_text(json.dumps(settings))
    return str(path)


def synthetic_batch(config: Any, size: int, rank: Rank) -> dict[str, Any]:
    side, text = config.vision.image_size, config.text
    tokens = torch.randint(1, text.config["vocab_size"] - 1, (size, text.context_length))
    return {
        "images": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens),
        "image_ids": torch.arange(size) + rank.rank * size, "labels": torch.full((size,), -1),
    }  # fmt: skip


def synthetic_run(preset: str, wanted: dict[str, Any], rank: Rank, folder: Path) -> tuple[Any, RetrievalObjective, Any]:
    """Returns engine, objective and batch of a preset with random weights."""
    engine, config = synthetic_engine(preset, wanted, rank, folder)
    return engine, RetrievalObjective(LossConfig(), rank.device), synthetic_batch(config, wanted["batch"], rank)


def synthetic_engine(preset: str, wanted: dict[str, Any], rank: Rank, folder: Path) -> tuple[Any, Any]:
    """Returns the engine of a preset with random weights, and the model's configuration."""
    config = load_preset(preset)
    config.vision.weights = config.prior.weights = config.text.weights = None
    with torch.device(rank.device):
        model = build_model(config).train()
    model.set_grad_checkpointing(wanted.get("checkpointing", False))
    engine_config = EngineConfig(
        zero=with_buckets(wanted, rank, folder),
        precision=wanted.get("precision", "fp32"),
        global_batch=wanted["batch"] * rank.world_size,
        micro_batch=wanted.get("micro_batch"),
    )
    run = RunConfig(dir=str(folder), engine=engine_config, optimizer=OptimizerConfig())
    engine = build_engine(model, parameter_groups(model, 0.1), run, total_steps=100, world_size=rank.world_size)
    return engine, model.config


def measured(preset: str, wanted: dict[str, Any], rank: Rank, folder: Path) -> dict[str, Any]:
    """Records the allocator during the build of the model and two steps of the preset with random weights."""
    held: dict[str, int] = {}
    gc.collect()  # frees the memory of the previous run before this one starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        engine, objective, batch = synthetic_run(preset, wanted, rank, folder)
        for step in range(STEPS):
            with record_function(f"step {step}"):
                loss, _ = objective.step(engine, batch)
                engine.backward(loss)
                held["gradients"] = storage_bytes(gradient_tensors(engine))
                del loss
                engine.step()
    parameters, optimizer = parameter_tensors(engine), optimizer_tensors(engine)
    held["parameters"] = storage_bytes(parameters)
    held["optimizer"] = storage_bytes([*parameters, *optimizer]) - held["parameters"]
    engine.destroy()
    return {**wanted, "world_size": rank.world_size, **most({**held, **allocations(watch)})}


def most(figures: dict[str, int]) -> dict[str, int]:
    """Returns the largest value of each figure over the ranks."""
    values = torch.tensor(list(figures.values()))
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(figures, values.tolist(), strict=True))


def allocations(watch: Any) -> dict[str, int]:
    """Sums the allocator's events. Returns the memory at the start of the last step and its peak in the step."""
    events = watch.profiler.kineto_results.events()
    last = next(event for event in events if event.name() == f"step {STEPS - 1}")
    begun, ended = last.start_ns(), last.start_ns() + last.duration_ns()
    now = before = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        if event.start_ns() > ended:
            break
        if event.start_ns() >= begun and not before:
            before = peak = now
        now += event.nbytes()
        if before:
            peak = max(peak, now)
    return {"before": before, "peak": peak}


def main(path: Path) -> None:
    request = json.loads(path.read_text())
    rank = start(EngineConfig(threads=1, timeout_minutes=30))
    records = []
    for wanted in request["runs"]:
        seed_everything(0, False)
        records.append(measured(request["preset"], wanted, rank, path.parent / "run"))
    if rank.is_first:
        path.with_suffix(".json.measured").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main(Path(without_local_rank(sys.argv[1:])[0]))
