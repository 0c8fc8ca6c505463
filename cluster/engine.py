"""A model made into a DeepSpeed engine: the ZeRO JSON with its "auto" values filled in, AdamW, and the schedule.

    engine = build_engine(model, groups, run_config, total_steps=10_000, world_size=2)
    engine(images=...)["image_features"]; engine.backward(loss); engine.step()

DeepSpeed does the sharding, mixed precision, clipping and offload. The optimizer is torch's fused AdamW, which needs no
compiler on the node; with ``offload_optimizer`` in the JSON it is DeepSpeed's CPU Adam.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.optim.lr_scheduler import LambdaLR

from cluster.config import EngineConfig, OptimizerConfig, RunConfig

logger = logging.getLogger(__name__)

ZERO_FOLDER = Path(__file__).parent / "zero"


def build_engine(
    model: torch.nn.Module, groups: list[dict[str, Any]], run: RunConfig, *, total_steps: int, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """Shard ``model`` as the run says. ``groups`` are optimizer parameter groups (see model.parameter_groups).

    Raises:
        ValueError: batch sizes that do not divide, a JSON that is not there or contradicts the run's configuration.
    """
    settings = deepspeed_settings(run.engine, run.optimizer, world_size)
    optimizer = build_optimizer(groups, run.optimizer, settings)
    shape = schedule_shape(run.optimizer, total_steps)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: LambdaLR(wrapped, shape),
        config=settings,
        dist_init_required=False,
    )
    return engine


def deepspeed_settings(engine: EngineConfig, optimizer: OptimizerConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON of the run, its "auto" values filled from the run's configuration.

    Keys that the file sets itself stay; one that contradicts the configuration is an error that names both.
    """
    path = ZERO_FOLDER / f"zero{engine.zero}.json" if engine.zero in ("0", "1", "2", "3") else Path(engine.zero)
    if not path.is_file():
        raise ValueError(
            f"run.engine.zero: '{engine.zero}' is neither a ZeRO stage (0, 1, 2, 3) nor a DeepSpeed JSON file"
        )
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ValueError(f"{path}: remove '{section}': it is set by run.optimizer in the run's configuration")
    micro_batch, accumulation = batch_split(engine, world_size)
    values = {
        "train_batch_size": engine.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_grad_norm,
        "bf16.enabled": engine.precision == "bf16",
        "fp16.enabled": engine.precision == "fp16",
        "zero_optimization.overlap_comm": torch.cuda.is_available(),
    }
    for dotted, value in values.items():
        fill(settings, dotted, value, path)
    left = [dotted for dotted, value in flatten(settings).items() if value == "auto"]
    if left:
        raise ValueError(f'{path}: no value is known for the "auto" of {", ".join(left)}: write a number there')
    return settings


def batch_split(engine: EngineConfig, world_size: int) -> tuple[int, int]:
    """(micro batch, gradient accumulation steps) of a rank."""
    if engine.global_batch % world_size:
        raise ValueError(
            f"run.engine.global_batch {engine.global_batch} is not divisible by the world size {world_size}:"
            " every rank takes the same share of it"
        )
    share = engine.global_batch // world_size
    micro = engine.micro_batch or share
    if share % micro:
        raise ValueError(
            f"run.engine.micro_batch {micro} does not divide the {share} samples that a rank has of the global batch"
            f" {engine.global_batch} over {world_size} ranks"
        )
    return micro, share // micro


def fill(settings: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    *sections, name = dotted.split(".")
    node = settings
    for section in sections:
        node = node.setdefault(section, {})
    if node.get(name, "auto") == "auto":
        if name != "overlap_comm" or name in node:
            node[name] = value
    elif name != "overlap_comm" and node[name] != value:
        raise ValueError(
            f'{path}: {dotted} is {node[name]} there but {value} by the run\'s configuration: write "auto" in the file'
        )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    device = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if device in ("cpu", "nvme"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **options)


def schedule_shape(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Learning rate at a step as a share of the peak: linear warm-up, then cosine, linear or constant."""
    warmup = int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * total_steps)

    def shape(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        falling = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        return config.min_lr_share + (1 - config.min_lr_share) * falling

    return shape


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Whole parameters (float32 masters where DeepSpeed keeps them) and buffers on the CPU, for any ZeRO stage.

    A collective: every rank calls it and every rank gets the result.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if value is None:
            sharded = [parameter] if hasattr(parameter, "ds_id") else []
            with GatheredParameters(sharded, enabled=bool(sharded)):
                value = parameter.detach().clone()
        state[name] = (
            value.detach().to("cpu", copy=True).float().reshape(getattr(parameter, "ds_shape", parameter.shape))
        )
    persistent = set(engine.module.state_dict().keys())
    for name, buffer in engine.module.named_buffers():
        if name in persistent:
            state[name] = buffer.detach().cpu().clone()
    return state
