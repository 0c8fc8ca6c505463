"""Builds the DeepSpeed engine: the ZeRO JSON with its "auto" values filled in, AdamW, and the schedule.

    engine = build_engine(model, groups, run_config, total_steps=10_000, world_size=2)
    engine(images=...)["image_features"]; engine.backward(loss); engine.step()

DeepSpeed does the sharding, mixed precision, clipping and offload. The optimizer is torch's fused AdamW, also on the
CPU, because it needs no compiler. DeepSpeed's own CPU Adam is compiled at its first use, which takes minutes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.optim.lr_scheduler import LambdaLR

from priorclip.common.cpu_features import has_bfloat16
from priorclip.common.output import get_logger
from priorclip.training.config import EngineConfig, OptimizerConfig, RunConfig
from priorclip.training.engine.late_compiler import compile_muon_late, make_optimizer
from priorclip.training.engine.offload import check_offload, offload_devices, prepare_nvme

logger = get_logger(__name__)

ZERO_FOLDER = Path(__file__).parent / "zero"
BUCKET = 50_000_000  # elements
# DeepSpeed's names for the shapes of run.optimizer.schedule.
SCHEDULERS = {"constant": ("WarmupLR",), "linear": ("WarmupDecayLR",), "cosine": ("WarmupCosineLR",)}


def build_engine(
    model: torch.nn.Module, groups: list[dict[str, Any]], run: RunConfig, *, total_steps: int, world_size: int
) -> deepspeed.DeepSpeedEngine:
    """Shards ``model`` with DeepSpeed as the configuration says. A collective.

    Args:
        model: the model to train
        groups: optimizer parameter groups (see model.parameter_groups)
        run: the run's configuration
        total_steps: length of the learning rate schedule
        world_size: number of ranks

    Raises:
        ValueError: batch sizes do not divide, or the JSON is missing or contradicts the run's configuration
    """
    settings = deepspeed_settings(run.engine, run.optimizer, world_size)
    warn_of_emulation(run.engine.precision)
    prepare_nvme(settings, run.dir)
    compile_muon_late()
    optimizer = build_optimizer(groups, run.optimizer)
    shape = schedule_shape(run.optimizer, total_steps)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda wrapped: LambdaLR(wrapped, shape),
        config=settings,
        dist_init_required=False,
    )
    return engine


def warn_of_emulation(precision: str) -> None:
    if precision == "bf16" and not torch.cuda.is_available() and not has_bfloat16():
        logger.warning("this CPU has no bfloat16 and emulates it, which is slow: --run.engine.precision fp32 is faster")


def deepspeed_settings(engine: EngineConfig, optimizer: OptimizerConfig, world_size: int) -> dict[str, Any]:
    """Returns the DeepSpeed JSON of the run, with "auto" values filled from the run's configuration.

    Values in the file stay. A value that contradicts the configuration is an error that names both.
    """
    path = settings_file(engine.zero)
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    drop_optimizer(settings, optimizer, path)
    micro_batch, accumulation = batch_split(engine, world_size)
    values = {
        "train_batch_size": engine.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_grad_norm,
        "bf16.enabled": engine.precision == "bf16",
        "fp16.enabled": engine.precision == "fp16",
    }
    for dotted, value in values.items():
        fill(settings, dotted, value, path)
    gpu = torch.cuda.is_available()
    auto_values: dict[str, Any] = {
        "overlap_comm": gpu,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 100_000,
        "offload_optimizer.pin_memory": gpu,
        "offload_param.pin_memory": gpu,
        "offload_optimizer.nvme_path": engine.nvme_path,
        "offload_param.nvme_path": engine.nvme_path,
    }
    flat = flatten(settings)
    for name, chosen in auto_values.items():
        if flat.get(dotted := f"zero_optimization.{name}") == "auto":
            fill(settings, dotted, chosen, path)
    check_offload(settings, path)
    if offload_devices(settings):
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    left = [dotted for dotted, value in flatten(settings).items() if value == "auto"]
    if left:
        raise ValueError(f'{path}: we have no value for the "auto" of {", ".join(left)}: write a number there')
    return settings


def settings_file(zero: str) -> Path:
    """Returns the JSON of a stage or of a name in cluster/zero, or the path itself."""
    for name in (zero, f"zero{zero}"):
        if (path := ZERO_FOLDER / f"{name}.json").is_file():
            return path
    path = Path(zero)
    if not path.is_file() and path.parent == Path("cluster/zero"):
        path = ZERO_FOLDER / path.name  # an installed package has the files, but not the folder cluster/zero
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in ZERO_FOLDER.glob("*.json")))
        raise ValueError(
            f"run.engine.zero: '{zero}' is neither a ZeRO stage (0, 1, 2, 3) nor one of {known}, nor a DeepSpeed JSON"
            " file"
        )
    return path


def drop_optimizer(settings: dict[str, Any], optimizer: OptimizerConfig, path: Path) -> None:
    """Removes an optimizer and a scheduler whose values are all "auto", as many files have them.

    Raises:
        ValueError: one of them sets a value, which run.optimizer sets
    """
    fits = {"optimizer": ("Adam", "AdamW"), "scheduler": SCHEDULERS[optimizer.schedule]}
    for section, types in fits.items():
        if section not in settings:
            continue
        given = settings.pop(section)
        numbers = [name for name, value in given.get("params", {}).items() if value != "auto"]
        if given.get("type") not in types or numbers:
            what = f"'{section}.params.{numbers[0]}'" if numbers else f"'{section}'"
            raise ValueError(
                f"{path}: remove {what}: run.optimizer in the run's configuration sets it, here"
                f' {"AdamW" if section == "optimizer" else optimizer.schedule} (a section with only "auto" may stay)'
            )


def batch_split(engine: EngineConfig, world_size: int) -> tuple[int, int]:
    """Returns (micro batch, gradient accumulation steps) of a rank."""
    if engine.global_batch % world_size:
        raise ValueError(
            f"run.engine.global_batch {engine.global_batch} is not divisible by the world size {world_size}:"
            " every rank takes the same share of it"
        )
    share = engine.global_batch // world_size
    micro = engine.micro_batch or share
    if share % micro:
        raise ValueError(
            f"run.engine.micro_batch {micro} does not divide the {share} samples of a rank:"
            f" run.engine.global_batch {engine.global_batch} over {world_size} ranks"
        )
    return micro, share // micro


def fill(settings: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    """Sets the value of a dotted name, if it is missing or "auto". ValueError if the file has another value."""
    *sections, name = dotted.split(".")
    node = settings
    for section in sections:
        node = node.setdefault(section, {})
    if node.get(name, "auto") == "auto":
        node[name] = value
    elif node[name] != value:
        raise ValueError(
            f'{path}: {dotted} is {node[name]} there but {value} in the run\'s configuration: write "auto" in the file'
        )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"bf16": {"enabled": True}}`` -> ``{"bf16.enabled": True}``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    betas = (config.betas[0], config.betas[1])
    return make_optimizer(torch.optim.AdamW, groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def schedule_shape(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Returns a function: step -> share of the peak learning rate. Linear warm-up, then cosine, linear or constant."""
    warmup = int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * total_steps)

    def shape(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
        return config.min_lr_share + (1 - config.min_lr_share) * decay

    return shape


def full_state_dict(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Returns whole parameters (float32 masters if DeepSpeed keeps them) and buffers on the CPU, for any ZeRO stage.

    A collective: every rank gets the result.
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
