"""Steps of the real DeepSpeed engine on one rank, as a training takes them, and the sections that vary its settings.

    run = EngineRun("priorclip-tiny", settings, batch=8, zero="2")
    run.step()
    run.end()

A step is what `training/step.py` does: encode, losses, backward, clipping, AdamW. Weights and pixels are random, texts
have their full length. The images are uint8 on the device; with gradient caching they come from pinned memory.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import batch_of
from benchmarks.gpu.timing import WARM, Step, repeated, with_peak
from benchmarks.rank_memory import synthetic_batch, synthetic_engine
from priorclip.model import RetrievalObjective
from priorclip.model.config import LossConfig
from priorclip.training.config import EngineConfig
from priorclip.training.engine.compiling import compile_engine
from priorclip.training.ranks.distributed import seed_everything, start
from priorclip.training.step import optimize

CLASSES = 30  # scenes of the labels


class EngineRun:
    """An engine, its objective and one batch.

    Args:
        preset: a name in model/presets
        settings: of the benchmark
        batch: pairs of a step
        zero: a stage or a name in cluster/zero; None: that of the settings
        compiled: compile the model as run.engine.compile does
        micro_batch: pairs of a forward pass, with gradient caching if it is less than the batch
    """

    def __init__(
        self,
        preset: str,
        settings: dict[str, Any],
        batch: int,
        zero: str | None = None,
        compiled: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        self.rank = start(EngineConfig(threads=settings.get("threads"), timeout_minutes=30))
        self.device = self.rank.device
        seed_everything(0, False)
        wanted = {"zero": zero or settings["zero"], "precision": settings["precision"], "batch": batch,
                  "micro_batch": micro_batch}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            self.engine, config = synthetic_engine(preset, wanted, self.rank, Path(folder) / "run")
        compile_engine(self.engine, "default" if compiled else "off")
        self.objective = RetrievalObjective(LossConfig(), self.device, classes=CLASSES)
        self.cached = micro_batch is not None and micro_batch < batch
        self.batch = self.draw(config, batch, micro_batch or batch)
        for name, value in self.batch.items():
            if not self.cached:
                self.batch[name] = value.to(self.device)
            elif self.device.type == "cuda":
                self.batch[name] = value.pin_memory()

    def draw(self, config: Any, batch: int, distinct: int) -> dict[str, Any]:
        """Returns a batch of random pairs. Pixels repeat after some, because drawing 5 GB of them takes a minute."""
        drawn = synthetic_batch(config, distinct, self.rank)
        whole = {name: value.repeat(batch // distinct, *[1] * (value.ndim - 1)) for name, value in drawn.items()}
        return {**whole, "image_ids": torch.arange(batch), "labels": torch.randint(CLASSES, (batch,))}

    def step(self) -> None:
        losses = self.objective if self.cached else None
        optimize(self.engine, self.batch, self.objective.step, self.device, losses)

    def end(self) -> None:
        """Frees the engine's memory."""
        self.engine.destroy()
        del self.engine
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_stage(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns time and memory of a step under a ZeRO stage."""
    batch = batch_of(settings, case["preset"])
    return measure_engine(settings, {"preset": case["preset"], "batch": batch, "zero": case["zero"]}, settings["steps"])


def measure_cached(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns time and memory of a step with gradient caching. Raises ValueError if the batches do not divide."""
    batch, micro_batch = case["global_batch"], min(case["global_batch"], settings["micro_batch"])
    if batch % micro_batch:
        raise ValueError(f"--micro_batch {micro_batch} does not divide --global_batches {batch}")
    few = max(1, settings["steps"] * micro_batch // batch)  # a step of a large batch takes long
    wanted = {"preset": case["preset"], "batch": batch, "micro_batch": micro_batch}
    long = batch // micro_batch > 16
    return measure_engine(settings, wanted, few, 1 if long else settings["repeats"], 1 if long else WARM)


def measure_engine(
    settings: dict[str, Any], wanted: dict[str, Any], count: int, repeats: int | None = None, warm: int = WARM
) -> dict[str, Any]:
    """Returns the figures of one engine; ``wanted`` are the arguments of `EngineRun`."""
    run, peak = start_engine(settings, warm, **wanted)
    seconds = repeated({"ours": run.step}, count, repeats or settings["repeats"], run.device)["ours"]
    run.end()
    return {**wanted, "seconds": seconds, "images_per_second": wanted["batch"] / statistics.median(seconds),
            "peak_bytes": peak}  # fmt: skip


def start_engine(settings: dict[str, Any], warm: int = WARM, **wanted: Any) -> tuple[EngineRun, int]:
    """Builds an engine and takes its first steps. Returns it and the most bytes of a step."""
    runs: list[EngineRun] = []

    def build() -> Step:
        runs.append(EngineRun(settings=settings, **wanted))
        return runs[0].step

    device = start(EngineConfig(threads=settings.get("threads"), timeout_minutes=30)).device
    _, peak = with_peak(device, build, warm)
    return runs[0], peak
