"""The text of ``cluster plan``."""

from __future__ import annotations

from typing import Any

from priorclip.cluster.commands import PlanConfig
from priorclip.cluster.plan.fit import GB, Choice
from priorclip.cluster.plan.step_time import PARTS


def format_plan(config: PlanConfig, choice: Choice, figures: dict[str, Any]) -> str:
    """Returns the figures of plan_run.plan_figures as text: memory, engine options, time, data and checkpoint."""
    setting, memory, data = choice.setting, choice.memory, figures["data"]
    rows = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("gathered by ZeRO-3", memory.gathered),
        ("activations", memory.activations),
        ("features and loss", memory.losses),
        ("gradient buckets", memory.bucket),
        ("peak", memory.peak),
    ]
    if memory.host:
        rows.append(("on the host", memory.host))
    engine = [
        f"zero: {setting.zero if setting.offload == 'none' else f'zero{setting.zero}-offload'}",
        f"precision: {setting.precision}",
        f"global_batch: {figures['global_batch']}",
        f"micro_batch: {setting.micro_batch if choice.grad_cache else 'null'}",
        f"grad_checkpointing: {str(setting.checkpointing).lower()}",
    ]
    if data["workers_a_rank"] is None:
        workers = "to get the number of workers, run 'python -m data_shards bench' and pass --loader or --loader_rate"
    else:
        workers = (
            f"{data['workers_a_rank']} workers a rank at {data['loader_images_per_second_a_worker']:.0f} images/s each"
        )
    step = figures["step"]
    micro = [f"  {name:44}" + "".join(f"{size:8}" for size in sizes)
             for name, sizes in figures["largest_micro_batch"].items()]  # fmt: skip
    checkpoint = figures["checkpoint"]
    return "\n".join([
        f"{figures['preset']}, {figures['parameters'] / 1e6:.1f} M parameters, {figures['trained'] / 1e6:.1f} M"
        f" trained, on {config.gpus}",
        f"  {figures['why']}", "",
        "memory of a GPU, GB", *(f"  {name:20} {size / GB:8.2f}" for name, size in rows),
        f"largest micro batch, of {setting.share} pairs a GPU; ZeRO{''.join(f'{stage:8}' for stage in range(4))}",
        *micro, "",
        f"run.engine: {{{', '.join(engine)}}}", "",
        f"step {1e3 * figures['step_seconds']:.0f} ms: "
        + ", ".join(f"{name} {1e3 * step[name]:.0f}" for name in PARTS),
        f"  compute is {figures['compute_from']}",
        f"{figures['images_per_second']:,.0f} images/s; an epoch of {config.pairs:,} pairs is"
        f" {figures['steps_an_epoch']:,} steps; {config.epochs} epochs take {figures['days']:.2f} days"
        f" ({24 * figures['days']:.1f} hours)", "",
        f"data: {data['images_per_second_a_rank']:,.0f} images/s a rank,"
        f" {data['megabytes_per_second']:,.0f} MB/s in total; {workers}",
        f"shards: {data['readers']} processes read at the same time; any number of shards works,"
        f" {2 * data['readers']} or more spread the load over the servers",
        f"checkpoint: {checkpoint['bytes'] / GB:.1f} GB, {checkpoint['seconds']:.1f} s at {config.disk_gbytes:g} GB/s",
    ])  # fmt: skip
