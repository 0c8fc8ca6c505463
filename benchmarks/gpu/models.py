"""The section `models`: our training step beside open_clip's model, loss and optimizer, in turn on one device."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.gpu.cases import batch_of
from benchmarks.gpu.engine_steps import start_engine
from benchmarks.gpu.measure import reason_of
from benchmarks.gpu.open_clip_step import PEERS, OpenClipStep, why_no_peer
from benchmarks.gpu.timing import Step, repeated, with_peak
from priorclip.model.cost.summary import pair_flops
from priorclip.model.presets import load_preset


def measure_model(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of a preset, those of its peer, and the ratio of their images/s, ours / open_clip's.

    The ratio is the median over the repeats, in each of which both were timed. If the peer cannot be measured, for
    instance because it does not fit, ``peer_missing`` says why.
    """
    preset, compiled = case["preset"], case["mode"] == "compiled"
    batch = batch_of(settings, preset)
    config = load_preset(preset)
    flops = pair_flops(config, config.vision.image_size)
    run, peak = start_engine(settings, preset=preset, batch=batch, compiled=compiled)
    steps: dict[str, Step] = {"ours": run.step}
    peer, missing = PEERS.get(preset, ""), why_no_peer(preset)
    theirs_peak, theirs_flops = 0, 0.0
    if missing is None:
        try:
            steps["open_clip"], theirs_peak, theirs_flops = peer_step(peer, batch, run.device, settings, compiled)
        except (RuntimeError, MemoryError) as error:
            missing = reason_of(error)
    seconds = repeated(steps, settings["steps"], settings["repeats"], run.device)
    run.end()
    row = {"name": preset, "batch": batch, "precision": settings["precision"], "zero": settings["zero"],
           **figures(seconds["ours"], batch, flops, peak, settings), "peer": None, "peer_missing": missing,
           "ratio": None}  # fmt: skip
    if "open_clip" in seconds:
        theirs = seconds["open_clip"]
        row["peer"] = {"name": peer, **figures(theirs, batch, theirs_flops, theirs_peak, settings)}
        row["ratio"] = statistics.median(b / a for a, b in zip(seconds["ours"], theirs, strict=True))
    return row


def peer_step(
    peer: str, batch: int, device: torch.device, settings: dict[str, Any], compiled: bool
) -> tuple[Step, int, float]:
    """Returns open_clip's step, its peak of memory and its FLOPs a pair."""
    kept: list[OpenClipStep] = []

    def build() -> Step:
        kept.append(OpenClipStep(peer, batch, device, settings["precision"], compiled))
        return kept[0].take

    step, peak = with_peak(device, build)
    return step, peak, kept[0].flops_a_pair()


def figures(seconds: list[float], batch: int, flops: float, peak: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns images/s of the median repeat, and MFU: FLOPs of a pair x images/s over the peak of the device."""
    rate = batch / statistics.median(seconds)
    tflops = settings["peak_tflops"]
    return {
        "seconds": seconds,
        "images_per_second": rate,
        "flops_per_image": flops,
        "mfu": None if tflops is None else flops * rate / (1e12 * tflops),
        "peak_bytes": peak,
    }
