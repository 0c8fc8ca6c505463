"""Times of real DeepSpeed ranks: steps, collectives, and parallel computing. See benchmarks/scaling.py.

    python -m cluster launch --nproc 2 -- benchmarks.rank_speed REQUEST.json

REQUEST.json is ``{"preset": ..., "steps": [{"zero": "2", "batch": 16}, ...], "alone": 16, "sizes": [4096, ...]}``, all
except the preset optional. Rank 0 writes REQUEST.json.measured:

    steps         the requested runs, with ``seconds``: the times of their steps after the first ones
    alone         seconds of a forward and backward pass over this many pairs, all ranks at once, without communication
    collectives   {"all_reduce": {bytes: seconds}, "all_gather": ..., "reduce_scatter": ...}; bytes of the whole tensor
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rank_memory import synthetic_batch, synthetic_run
from priorclip.common.options import without_local_rank
from priorclip.model import build_model
from priorclip.model.presets import load_preset
from priorclip.training.config import EngineConfig
from priorclip.training.ranks.distributed import Rank, seed_everything, start

WARM, COUNTED = 3, 9  # steps
REPEATED = 15  # measurements of each collective


def step_seconds(preset: str, wanted: dict[str, Any], rank: Rank, folder: Path) -> list[float]:
    seed_everything(0, False)
    engine, objective, batch = synthetic_run(preset, wanted, rank, folder)
    seconds = []
    for _ in range(WARM + COUNTED):
        dist.barrier()
        begun = time.perf_counter()
        loss, _ = objective.step(engine, batch)
        engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - begun)
        del loss
    engine.destroy()
    return seconds[WARM:]


def pass_seconds(preset: str, size: int, rank: Rank) -> float:
    """Returns the median time of a forward and backward pass. All ranks start together and do not wait."""
    config = load_preset(preset)
    config.vision.weights = config.prior.weights = config.text.weights = None
    model: Any = build_model(config).train()
    batch = synthetic_batch(model.config, size, rank)
    words = {name: batch[name] for name in ("images", "input_ids", "attention_mask")}
    seconds = []
    for _ in range(WARM + COUNTED):
        dist.barrier()
        begun = time.perf_counter()
        outputs = model(**words)
        (outputs["image_features"].sum() + outputs["text_features"].sum()).backward()
        seconds.append(time.perf_counter() - begun)
    return slowest(statistics.median(seconds[WARM:]))


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def collective_seconds(sizes: list[int], rank: Rank) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {"all_reduce": {}, "all_gather": {}, "reduce_scatter": {}}
    for size in sizes:
        count = size // 4 // rank.world_size * rank.world_size
        whole, own = torch.ones(count), torch.ones(count // rank.world_size)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, own=own: dist.all_gather_into_tensor(whole, own),
            "reduce_scatter": lambda whole=whole, own=own: dist.reduce_scatter_tensor(own, whole),
        }
        for name, call in calls.items():
            found[name][4 * count] = slowest(median_seconds(call))
    return found


def median_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(2 + REPEATED):
        dist.barrier()
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[2:])


def main(path: Path) -> None:
    request = json.loads(path.read_text())
    rank = start(EngineConfig(threads=1, timeout_minutes=30))
    found: dict[str, Any] = {"ranks": rank.world_size}
    if request.get("alone"):
        found["alone"] = pass_seconds(request["preset"], request["alone"], rank)
    if request.get("sizes") and rank.world_size > 1:
        found["collectives"] = collective_seconds(request["sizes"], rank)
    found["steps"] = [
        {**wanted, "seconds": step_seconds(request["preset"], wanted, rank, path.parent / "run")}
        for wanted in request.get("steps", ())
    ]
    if rank.is_first:
        path.with_suffix(".json.measured").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(without_local_rank(sys.argv[1:])[0]))
