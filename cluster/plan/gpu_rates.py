"""Rates for a plan: measured, or peak x MFU. Images a second of a GPU and of the loader, FLOP/s of a GPU."""

from __future__ import annotations

import json
from pathlib import Path

from priorclip.cluster.commands import PlanConfig, SimulateConfig
from priorclip.cluster.plan.memory import BYTES
from priorclip.cluster.plan.model_table import ModelTable


def peak_tflops(table: ModelTable, config: PlanConfig | SimulateConfig) -> float:
    """Dense peak in TFLOP/s of the GPU in the precision of the run. Raises ValueError if the GPU is unknown."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    if config.gpu not in table.peaks:
        raise ValueError(f"--gpu {config.gpu} is not known ({', '.join(table.peaks)}): give its --peak_tflops")
    return table.peaks[config.gpu][0 if BYTES[config.precision] == 2 else 1]


def images_from_peak(table: ModelTable, config: PlanConfig | SimulateConfig) -> float:
    """Images a second of one GPU, without checkpointing and gradient caching, from peak x MFU."""
    return config.mfu * peak_tflops(table, config) * 1e12 / table.flops(False, False)


def loss_flops(table: ModelTable, config: PlanConfig | SimulateConfig) -> float | None:
    """FLOP/s of the loss, which is always in float32. For an unknown GPU from --peak_tflops, None without it."""
    peak = table.peaks[config.gpu][1] if config.gpu in table.peaks else config.peak_tflops
    return config.mfu * peak * 1e12 if peak else None


def bench_rate(file: str, preset: str) -> float:
    """Images a second of the preset, from the JSON that ``python -m model bench --format json`` printed."""
    try:
        models = json.loads(Path(file).read_text())["models"]
        return float(next(row for row in models if row["name"] == preset)["images_per_second"])
    except (KeyError, TypeError, StopIteration, json.JSONDecodeError) as error:
        raise ValueError(f"--bench {file}: no output of 'python -m model bench --format json' for {preset}") from error


def loader_rate(config: PlanConfig) -> float | None:
    """Images a second of a worker: --loader_rate, or the slowest in the JSON of ``python -m data_shards bench``."""
    if config.loader is None:
        return config.loader_rate
    try:
        values = json.loads(Path(config.loader).read_text())
        return min(float(row["ours_per_core"]) for row in values["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--loader {config.loader}: no JSON that 'python -m data_shards bench' wrote") from error
