"""Rates for a plan: measured, or peak x MFU. Images a second of a GPU and of the loader, FLOP/s of a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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


def bench_rate(file: str, preset: str, precision: str) -> tuple[float, str]:
    """Images a second of the preset on one GPU, and where they are from.

    Args:
        file: JSON that ``python -m model bench --format json`` printed, or that ``python -m benchmarks.gpu`` wrote. Of
            the latter, the model that is not compiled counts if it was measured, because a run compiles only if
            run.engine.compile says so
        preset: name in model/presets
        precision: of the plan

    Raises:
        ValueError: the file is neither, or it has no throughput of the preset in that precision
    """
    try:
        values = json.loads(Path(file).read_text())
        if values.get("benchmark") == "gpu":
            return measured_rate(values, file, preset, precision)
        rate = float(next(row for row in values["models"] if row["name"] == preset)["images_per_second"])
    except (AttributeError, KeyError, TypeError, StopIteration, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--bench {file}: no output of 'python -m model bench --format json' or 'python -m benchmarks.gpu' for"
            f" {preset}"
        ) from error
    return checked_rate(rate, file), f"measured, {file}"


def measured_rate(values: dict[str, Any], file: str, preset: str, precision: str) -> tuple[float, str]:
    """The same of the JSON of ``benchmarks.gpu``."""
    rows = values.get("models", [])
    fits = [row for row in rows if (row["preset"], row["precision"]) == (preset, precision)]
    if not fits:
        found = ", ".join(sorted({f"{row['preset']} in {row['precision']}" for row in rows})) or "none"
        raise ValueError(
            f"--bench {file}: no throughput of {preset} in {precision}, only of: {found}. Measure it: python -m"
            f" benchmarks.gpu --sections models --presets {preset} --precision {precision}"
        )
    row = min(fits, key=lambda each: each["mode"] != "eager")
    device = values["machine"]["device"]
    return checked_rate(float(row["images_per_second"]), file), (
        f"measured, {file}: {device}, {row['precision']}, {row['mode']}, batch {row['batch']}"
    )


def checked_rate(rate: float, file: str) -> float:
    if not 0 < rate < math.inf:
        raise ValueError(f"--bench {file}: {rate} images/s cannot be")
    return rate


def loader_rate(config: PlanConfig) -> float | None:
    """Images a second of a worker: --loader_rate, or the slowest in the JSON of ``python -m data_shards bench``."""
    if config.loader is None:
        return config.loader_rate
    try:
        values = json.loads(Path(config.loader).read_text())
        return min(float(row["ours_per_core"]) for row in values["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--loader {config.loader}: no JSON that 'python -m data_shards bench' wrote") from error
