"""The cost of a checkpoint for the training: written in the background, compared with DeepSpeed's own save.

    python benchmarks/checkpoints.py [--million 40] [--rounds 5] [--zero 2] [--output checkpoints.json]

One process trains a model of this many million parameters with AdamW's state (12 bytes per parameter, plus the
weights). In turn the model is saved by ``engine.save_checkpoint`` with DeepSpeed's default engine, for which the
training waits, and by ``training/checkpoints/writer.py``, which adds fsync and checksums. The lost time is the time of
the call plus the extra time of the steps during the writing; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import nn

from priorclip.training.checkpoints.writer import Writer
from priorclip.training.config import CheckpointConfig, EngineConfig, OptimizerConfig, RunConfig
from priorclip.training.engine.build import build_engine
from priorclip.training.ranks.distributed import start

WIDTH = 1024


def build(million: int, zero: str) -> deepspeed.DeepSpeedEngine:
    layers = max(1, round(million * 1e6 / WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    run = RunConfig(dir="", engine=EngineConfig(zero=zero, global_batch=16), optimizer=OptimizerConfig(lr=1e-5))
    return build_engine(model, [{"params": list(model.parameters())}], run, total_steps=10**6, world_size=1)


def step(engine: deepspeed.DeepSpeedEngine) -> float:
    """Returns the seconds of a training step."""
    begun = time.perf_counter()
    inputs = torch.randn(16, WIDTH)
    engine.backward(engine(inputs).square().mean())
    engine.step()
    return time.perf_counter() - begun


def saved_by_deepspeed(engine: deepspeed.DeepSpeedEngine, folder: Path) -> float:
    engine.checkpoint_engine = TorchCheckpointEngine()
    begun = time.perf_counter()
    engine.save_checkpoint(str(folder), tag="peer", client_state={}, save_latest=False)
    return time.perf_counter() - begun


def saved_beside(engine: deepspeed.DeepSpeedEngine, writer: Writer, usual: float) -> tuple[float, float, float]:
    """Returns the seconds in the call, the seconds that the steps lose, and those until the checkpoint is published."""
    engine.checkpoint_engine = writer.staging
    begun = time.perf_counter()
    writer.save({}, {})
    call = time.perf_counter() - begun
    steps = []
    while writer.thread and writer.thread.is_alive():
        steps.append(step(engine))
    published = time.perf_counter() - begun
    writer.finish()
    assert not writer.problem, writer.problem
    return call, sum(each - usual for each in steps), published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--million", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zero", default="2", choices=["0", "1", "2", "3"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=".") as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    start(EngineConfig(threads=1))
    engine = build(options.million, options.zero)
    writer = Writer(engine, folder / "ours", CheckpointConfig(keep=1))
    usual = statistics.median(step(engine) for _ in range(7))
    saved_beside(engine, writer, usual)  # host memory is allocated once
    rounds = []
    for _ in range(options.rounds):
        usual = statistics.median(step(engine) for _ in range(5))
        rounds.append((saved_by_deepspeed(engine, folder / "peer"), *saved_beside(engine, writer, usual)))
    size = sum(path.stat().st_size for path in (folder / "ours").rglob("*") if path.is_file())
    peer, call, slowed, published = (statistics.median(column) for column in zip(*rounds, strict=True))
    figures = {
        "parameters_million": options.million, "zero": options.zero, "checkpoint_mb": round(size / 1e6),
        "step_s": usual, "deepspeed_s": peer, "stall_s": call, "slowed_s": slowed, "published_after_s": published,
        "stall_share": call / peer, "lost_share": (call + slowed) / peer,
    }  # fmt: skip
    print(f"{options.million} M parameters, ZeRO {options.zero}, {size / 1e6:.0f} MB, step {usual:.3f} s, medians")
    print(f"DeepSpeed's save_checkpoint: training waits {peer:.2f} s")
    print(
        f"in the background: training waits {call:.2f} s ({call / peer:.2f} of it), the steps during the writing lose"
    )
    print(f"{slowed:.2f} s more ({(call + slowed) / peer:.2f} in all); whole on disk after {published:.2f} s")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
