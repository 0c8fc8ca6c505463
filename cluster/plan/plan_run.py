"""A run planned before a GPU is asked for: what fits, how long it takes, what the data and the disk must deliver.

    python -m cluster plan --preset priorclip-b32 --gpus 8x80GB --gpu H100
    python -m cluster plan --gpus 32x40GB --gpu A100 --global_batch 16384 --throughput 700 --json

Memory is `cluster.memory`'s, the time of a step `cluster.simulate`'s. Of what fits, that is advised which costs least
time: the lowest ZeRO stage that holds the rank's share of the batch; where none does, recomputed activations (about a
third more compute); then micro batches with gradient caching (a forward pass more); last, optimizer states on the host.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from priorclip.cluster.commands import PlanConfig, SimulateConfig
from priorclip.cluster.plan.model_table import ModelTable, load_table
from priorclip.cluster.plan.rank_memory import BYTES, PERSISTENT, Memory, Setting, estimate, largest_micro_batch
from priorclip.cluster.plan.step_time import (
    PARTS,
    StepTime,
    Work,
    as_dict,
    plot,
    step_time,
    strong_scaling,
    weak_scaling,
)
from priorclip.cluster.plan.step_time import table as scaling_table

GB = 1e9
GPUS = re.compile(r"(?P<count>\d+)x(?P<memory>\d+(\.\d+)?)GB", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """How the batch is fitted into a GPU, and what it takes of it."""

    setting: Setting
    memory: Memory
    reason: str

    @property
    def grad_cache(self) -> bool:
        return self.setting.micro_batch < self.setting.share


def plan(config: PlanConfig) -> str:
    """The plan as text or JSON.

    Raises:
        ValueError: options that make no sense, or a batch of which not even one sample fits.
    """
    count, limit = parse_gpus(config.gpus)
    table = load_table(config.preset, config.precision, config.table)
    global_batch = config.global_batch or 512 * count  # as published: 512 pairs a GPU
    if global_batch % count:
        raise ValueError(f"--global_batch {global_batch} is not divisible by the {count} GPUs of --gpus {config.gpus}")
    usable = (limit - config.reserve_gb * GB) * (1 - config.fragmentation)
    if usable <= 0:
        raise ValueError(f"--reserve_gb {config.reserve_gb} leaves nothing of {limit / GB:g} GB")
    choice = choose(table, config, count, global_batch // count, usable)
    step, source = timed(table, config, choice, count)
    found = figures(table, config, choice, step, source, usable)
    return json.dumps(found, indent=2) if config.json else as_text(config, choice, found)


def parse_gpus(text: str) -> tuple[int, float]:
    """``8x80GB`` -> (8, 80e9)."""
    match = GPUS.fullmatch(text.strip())
    if match is None or int(match["count"]) < 1 or float(match["memory"]) <= 0:
        raise ValueError(f"--gpus {text}: write how many and how large, as 8x80GB")
    return int(match["count"]), float(match["memory"]) * GB


def choose(table: ModelTable, config: PlanConfig, count: int, share: int, usable: float) -> Choice:
    """The cheapest setting that fits; what the user fixed stays."""
    base = Setting(0, count, config.precision, config.micro_batch or share, share)
    if share % base.micro_batch:
        raise ValueError(f"--micro_batch {base.micro_batch} does not divide the {share} samples of a GPU")
    stages = [int(config.zero)] if config.zero is not None else ([2, 3] if count > 1 else [0, 2])
    recompute = [config.grad_checkpointing] if config.grad_checkpointing is not None else [False, True]
    settings = [
        replace(base, zero=stage, checkpointing=again, offload=offload)
        for offload in ("none", "optimizer") for again in recompute for stage in stages
        if stage >= 2 or offload == "none"
    ]  # fmt: skip
    for setting in settings:
        memory = estimate(table, setting)
        if memory.peak <= usable:
            return Choice(setting, memory, reason(setting, memory, usable))
    if config.micro_batch is None:
        for setting in settings:
            fits = largest_micro_batch(table, setting, usable)
            if fits:
                setting = replace(setting, micro_batch=fits)
                return Choice(setting, memory := estimate(table, setting), reason(setting, memory, usable))
    least = estimate(table, replace(settings[-1], micro_batch=config.micro_batch or 1)).peak
    raise ValueError(
        f"{config.preset} does not fit: it takes {least / GB:.1f} GB of the {usable / GB:.1f} GB that a GPU has for it"
        f" with a micro batch of {config.micro_batch or 1}, ZeRO-{settings[-1].zero} and all that saves memory"
    )


def reason(setting: Setting, memory: Memory, usable: float) -> str:
    words = [f"ZeRO-{setting.zero}"]
    if setting.offload != "none":
        words.append("with optimizer states on the host, because they fit nowhere else")
    if setting.checkpointing:
        words.append("with grad_checkpointing, because activations do not fit otherwise")
    if setting.micro_batch < setting.share:
        words.append(f"with grad_cache over {setting.share // setting.micro_batch} micro batches")
    return ", ".join(words) + f": {memory.peak / GB:.1f} of {usable / GB:.1f} GB"


def timed(table: ModelTable, config: PlanConfig, choice: Choice, count: int) -> tuple[StepTime, str]:
    """The step and where its compute comes from: measured, or FLOPs by a peak and an MFU."""
    setting, loader = choice.setting, loader_rate(config)
    flops = table.flops(setting.checkpointing, choice.grad_cache)
    slower = flops / table.flops(False, False)
    if config.bench is not None:
        rate, source = bench_rate(config.bench, config.preset), f"measured, {config.bench}"
    elif config.throughput is not None:
        rate, source = config.throughput, "given"
    else:
        peak = peak_of(table, config)
        rate = config.mfu * peak * 1e12 / table.flops(False, False)
        source = f"estimated: {table.flops(False, False) / 1e9:.1f} GFLOPs a pair, {peak:g} TFLOP/s, MFU {config.mfu:g}"
    work = Work(
        seconds_a_sample=slower / rate, trained=table.trained, frozen=table.frozen, width=table.width,
        loss_flops=loss_flops(table, config), bytes_a_parameter=BYTES[config.precision], zero=setting.zero,
        persistent=len(table.persistent(setting.persistent)), cached=choice.grad_cache,
        micro_batches=setting.share // setting.micro_batch,
        loader_rate=None if loader is None else loader * config.workers,
    )  # fmt: skip
    return step_time(work, config.network, count, setting.share), source


def peak_of(table: ModelTable, config: PlanConfig | SimulateConfig) -> float:
    """Dense TFLOP/s in the run's precision."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    if config.gpu not in table.peaks:
        raise ValueError(f"--gpu {config.gpu} is not known ({', '.join(table.peaks)}): give its --peak_tflops")
    return table.peaks[config.gpu][0 if BYTES[config.precision] == 2 else 1]


def loss_flops(table: ModelTable, config: PlanConfig | SimulateConfig) -> float | None:
    """FLOP/s of the loss, which is in float32 whatever the run's precision; of an unknown GPU by --peak_tflops."""
    peak = table.peaks[config.gpu][1] if config.gpu in table.peaks else config.peak_tflops
    return config.mfu * peak * 1e12 if peak else None


def bench_rate(file: str, preset: str) -> float:
    """Images a second of the preset in the JSON that ``python -m model bench --format json`` printed."""
    try:
        models = json.loads(Path(file).read_text())["models"]
        return float(next(one for one in models if one["name"] == preset)["images_per_second"])
    except (KeyError, TypeError, StopIteration, json.JSONDecodeError) as error:
        raise ValueError(f"--bench {file}: no output of 'python -m model bench --format json' for {preset}") from error


def loader_rate(config: PlanConfig) -> float | None:
    """Images a second of a worker: given, or the slowest in the JSON of ``python -m data_shards bench``."""
    if config.loader is None:
        return config.loader_rate
    try:
        values = json.loads(Path(config.loader).read_text())
        return min(float(row["ours_per_core"]) for row in values["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--loader {config.loader}: no JSON that 'python -m data_shards bench' wrote") from error


def figures(
    table: ModelTable, config: PlanConfig, choice: Choice, step: StepTime, source: str, usable: float
) -> dict[str, Any]:
    """All that the plan says, bytes, seconds and images."""
    setting, memory = choice.setting, choice.memory
    ranks, global_batch = setting.ranks, setting.share * setting.ranks
    steps = config.pairs // global_batch
    if not steps:
        raise ValueError(f"a global batch of {global_batch} is more than the {config.pairs} pairs of an epoch")
    total = steps * config.epochs * step.seconds
    need = step.images_per_second / ranks
    rate = loader_rate(config)
    workers = math.ceil(need / rate) if rate else None
    readers = ranks * (workers or config.workers)
    checkpoint = BYTES[config.precision] * (table.trained + table.frozen) + 12.0 * table.trained
    micro = {
        name: [largest_micro_batch(table, replace(setting, zero=stage, checkpointing=again, offload="none"), usable)
               for stage in range(4)]
        for name, again in (("plain", False), ("checkpointing", True))
    }  # fmt: skip
    return {
        "preset": table.preset, "parameters": table.trained + table.frozen, "trained": table.trained,
        "setting": asdict(setting), "why": choice.reason, "usable_bytes": usable, "memory": asdict(memory),
        "largest_micro_batch": micro, "global_batch": global_batch, "grad_cache": choice.grad_cache,
        "step_seconds": step.seconds, "step": asdict(step), "compute_from": source,
        "images_per_second": step.images_per_second, "steps_an_epoch": steps, "epochs": config.epochs,
        "days": total / 86400,
        "data": {"images_per_second_a_rank": need, "loader_images_per_second_a_worker": rate, "workers_a_rank": workers,
                 "readers": readers, "megabytes_per_second": step.images_per_second * config.kilobytes_an_image / 1e3},
        "checkpoint": {"bytes": checkpoint, "seconds": checkpoint / (config.disk_gbytes * GB)},
    }  # fmt: skip


def as_text(config: PlanConfig, choice: Choice, found: dict[str, Any]) -> str:
    """For people."""
    setting, memory, data = choice.setting, choice.memory, found["data"]
    rows = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("gathered by ZeRO-3", memory.gathered),
        ("activations", memory.activations),
        ("features and loss", memory.losses),
        ("gradient buckets", memory.bucket),
        ("most at once", memory.peak),
    ]
    if memory.host:
        rows.append(("on the host", memory.host))
    engine = [
        f"zero: {setting.zero if setting.offload == 'none' else f'zero{setting.zero}-offload'}",
        f"precision: {setting.precision}",
        f"global_batch: {found['global_batch']}",
        f"micro_batch: {setting.micro_batch if choice.grad_cache else 'null'}",
        f"grad_checkpointing: {str(setting.checkpointing).lower()}",
    ]
    if data["workers_a_rank"] is None:
        workers = "measure a core's rate with 'python -m data_shards bench' and give it as --loader or --loader_rate"
    else:
        workers = (
            f"{data['workers_a_rank']} workers a rank at {data['loader_images_per_second_a_worker']:.0f} images/s each"
        )
    step = found["step"]
    micro = [f"  {name:44}" + "".join(f"{size:8}" for size in sizes)
             for name, sizes in found["largest_micro_batch"].items()]  # fmt: skip
    checkpoint = found["checkpoint"]
    return "\n".join([
        f"{found['preset']}, {found['parameters'] / 1e6:.1f} M parameters, {found['trained'] / 1e6:.1f} M trained,"
        f" on {config.gpus}",
        f"  {found['why']}", "",
        "memory of a GPU, GB", *(f"  {name:20} {size / GB:8.2f}" for name, size in rows),
        f"largest micro batch, of {setting.share} pairs a GPU; ZeRO{''.join(f'{stage:8}' for stage in range(4))}",
        *micro, "",
        f"run.engine: {{{', '.join(engine)}}}", "",
        f"step {1e3 * found['step_seconds']:.0f} ms: "
        + ", ".join(f"{name} {1e3 * step[name]:.0f}" for name in PARTS),
        f"  compute is {found['compute_from']}",
        f"{found['images_per_second']:,.0f} images/s; an epoch of {config.pairs:,} pairs is {found['steps_an_epoch']:,}"
        f" steps; {config.epochs} epochs take {found['days']:.2f} days ({24 * found['days']:.1f} hours)", "",
        f"data: {data['images_per_second_a_rank']:,.0f} images/s a rank,"
        f" {data['megabytes_per_second']:,.0f} MB/s in all; {workers}",
        f"shards: {data['readers']} processes read at once; any number of shards will do,"
        f" {2 * data['readers']} or more spread the load over the servers",
        f"checkpoint: {checkpoint['bytes'] / GB:.1f} GB, {checkpoint['seconds']:.1f} s at {config.disk_gbytes:g} GB/s",
    ])  # fmt: skip


def simulate(config: SimulateConfig) -> str:
    """Weak- and strong-scaling curves as text or JSON, and the plot where one is asked for."""
    table = load_table(config.preset, config.precision, config.table)
    rate = config.images_per_second or config.mfu * peak_of(table, config) * 1e12 / table.flops(False, False)
    work = Work(
        seconds_a_sample=1 / rate, trained=table.trained, frozen=table.frozen, width=table.width,
        loss_flops=loss_flops(table, config), bytes_a_parameter=BYTES[config.precision], zero=int(config.zero),
        persistent=len(table.persistent(PERSISTENT)), overlap=config.overlap,
        stragglers=config.stragglers, loader_rate=config.loader_rate,
    )  # fmt: skip
    ranks = [1 << power for power in range(config.gpus.bit_length())]
    weak = weak_scaling(work, config.network, ranks, config.batch)
    strong = strong_scaling(work, config.network, ranks, config.global_batch)
    if config.output:
        plot(weak, strong, f"{config.preset}, ZeRO-{config.zero}", config.output)
    if config.json:
        return json.dumps({"work": asdict(work), "weak": [as_dict(step) for step in weak],
                           "strong": [as_dict(step) for step in strong]}, indent=2)  # fmt: skip
    return (
        f"weak scaling, {config.batch} pairs a GPU, ms a step\n\n{scaling_table(weak)}\n\n"
        f"strong scaling, {config.global_batch:,} pairs a step, ms a step\n\n{scaling_table(strong)}"
    )
