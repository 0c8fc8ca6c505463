"""``python -m cluster plan``: plans a run before you have a GPU: memory, time, and the rates of data and disk.

    python -m cluster plan --preset priorclip-b32 --gpus 8x80GB --gpu H100
    python -m cluster plan --gpus 32x40GB --gpu A100 --global_batch 16384 --throughput 700 --json

memory.py estimates the memory, step_time.py the time of a step. Of all settings that fit, the plan takes the fastest:
the lowest ZeRO stage that holds the rank's share of the batch; if none does, recomputed activations (about a third more
compute); then micro batches with gradient caching (one more forward pass); last, optimizer state on the host.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

from priorclip.cluster.commands import PlanConfig
from priorclip.cluster.plan.fit import GB, Choice, choose_setting, parse_gpus
from priorclip.cluster.plan.gpu_rates import bench_rate, images_from_peak, loader_rate, loss_flops, peak_tflops
from priorclip.cluster.plan.memory import BYTES, largest_micro_batch
from priorclip.cluster.plan.model_table import ModelTable, load_table
from priorclip.cluster.plan.plan_text import format_plan
from priorclip.cluster.plan.step_time import StepTime, Work, step_time


def plan(config: PlanConfig) -> str:
    """Returns the plan as text or JSON.

    Raises:
        ValueError: options are invalid, or not even one sample fits.
    """
    ranks, limit = parse_gpus(config.gpus)
    table = load_table(config.preset, config.precision, config.table)
    global_batch = config.global_batch or 512 * ranks  # as published: 512 pairs a GPU
    if global_batch % ranks:
        raise ValueError(f"--global_batch {global_batch} is not divisible by the {ranks} GPUs of --gpus {config.gpus}")
    usable = (limit - config.reserve_gb * GB) * (1 - config.fragmentation)
    if usable <= 0:
        raise ValueError(f"--reserve_gb {config.reserve_gb} leaves nothing of {limit / GB:g} GB")
    choice = choose_setting(table, config, ranks, global_batch // ranks, usable)
    step, source = time_of_step(table, config, choice)
    figures = plan_figures(table, config, choice, step, source, usable)
    return json.dumps(figures, indent=2) if config.json else format_plan(config, choice, figures)


def time_of_step(table: ModelTable, config: PlanConfig, choice: Choice) -> tuple[StepTime, str]:
    """Returns the time of a step and the source of its compute: measured, or FLOPs, peak and MFU."""
    setting, loader = choice.setting, loader_rate(config)
    flops = table.flops(setting.checkpointing, choice.grad_cache)
    slowdown = flops / table.flops(False, False)
    if config.bench is not None:
        rate, source = bench_rate(config.bench, config.preset, config.precision)
    elif config.throughput is not None:
        rate, source = config.throughput, "given"
    else:
        rate = images_from_peak(table, config)
        source = (
            f"estimated: {table.flops(False, False) / 1e9:.1f} GFLOPs a pair, {peak_tflops(table, config):g} TFLOP/s,"
            f" MFU {config.mfu:g}"
        )
    work = Work(
        seconds_a_sample=slowdown / rate, trained=table.trained, frozen=table.frozen, width=table.width,
        loss_flops=loss_flops(table, config), bytes_a_parameter=BYTES[config.precision], zero=setting.zero,
        persistent=len(table.persistent(setting.persistent)), cached=choice.grad_cache,
        micro_batches=setting.share // setting.micro_batch,
        loader_rate=None if loader is None else loader * config.workers,
    )  # fmt: skip
    return step_time(work, config.network, setting.ranks, setting.share), source


def plan_figures(
    table: ModelTable, config: PlanConfig, choice: Choice, step: StepTime, source: str, usable: float
) -> dict[str, Any]:
    """All figures of the plan, in bytes, seconds and images."""
    setting, memory = choice.setting, choice.memory
    ranks, global_batch = setting.ranks, setting.share * setting.ranks
    steps = config.pairs // global_batch
    if not steps:
        raise ValueError(f"a global batch of {global_batch} is more than the {config.pairs} pairs of an epoch")
    total = steps * config.epochs * step.seconds
    rank_rate = step.images_per_second / ranks
    worker_rate = loader_rate(config)
    workers = math.ceil(rank_rate / worker_rate) if worker_rate else None
    checkpoint = BYTES[config.precision] * (table.trained + table.frozen) + 12.0 * table.trained
    micro = {
        name: [
            largest_micro_batch(table, replace(setting, zero=stage, checkpointing=again, offload="none"), usable)
            for stage in range(4)
        ]
        for name, again in (("plain", False), ("checkpointing", True))
    }
    return {
        "preset": table.preset, "parameters": table.trained + table.frozen, "trained": table.trained,
        "setting": asdict(setting), "why": choice.reason, "usable_bytes": usable, "memory": asdict(memory),
        "largest_micro_batch": micro, "global_batch": global_batch, "grad_cache": choice.grad_cache,
        "step_seconds": step.seconds, "step": asdict(step), "compute_from": source,
        "images_per_second": step.images_per_second, "steps_an_epoch": steps, "epochs": config.epochs,
        "days": total / 86400,
        "data": {"images_per_second_a_rank": rank_rate, "loader_images_per_second_a_worker": worker_rate,
                 "workers_a_rank": workers, "readers": ranks * (workers or config.workers),
                 "megabytes_per_second": step.images_per_second * config.kilobytes_an_image / 1e3},
        "checkpoint": {"bytes": checkpoint, "seconds": checkpoint / (config.disk_gbytes * GB)},
    }  # fmt: skip
