"""Fits a batch into a GPU: chooses ZeRO stage, micro batch, recomputed activations and offload.

choose_setting(table, config, ranks=8, share=512, usable=72e9).reason    ->  "ZeRO-2: 31.2 of 71.8 GB"
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from priorclip.cluster.commands import PlanConfig
from priorclip.cluster.plan.memory import Memory, Setting, estimate_memory, largest_micro_batch
from priorclip.cluster.plan.model_table import ModelTable

GB = 1e9
GPUS = re.compile(r"(?P<count>\d+)x(?P<memory>\d+(\.\d+)?)GB", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The chosen setting, the memory that it needs, and the reason in words."""

    setting: Setting
    memory: Memory
    reason: str

    @property
    def grad_cache(self) -> bool:
        return self.setting.micro_batch < self.setting.share


def parse_gpus(text: str) -> tuple[int, float]:
    """``8x80GB`` -> (8, 80e9)."""
    match = GPUS.fullmatch(text.strip())
    if match is None or int(match["count"]) < 1 or float(match["memory"]) <= 0:
        raise ValueError(f"--gpus {text}: write number and size, such as 8x80GB")
    return int(match["count"]), float(match["memory"]) * GB


def choose_setting(table: ModelTable, config: PlanConfig, ranks: int, share: int, usable: float) -> Choice:
    """Returns the fastest setting that fits into ``usable`` bytes. Options that the user gave stay fixed.

    Raises:
        ValueError: no setting fits, or --micro_batch does not divide ``share``, the samples of a GPU.
    """
    base = Setting(0, ranks, config.precision, config.micro_batch or share, share)
    if share % base.micro_batch:
        raise ValueError(f"--micro_batch {base.micro_batch} does not divide the {share} samples of a GPU")
    stages = [int(config.zero)] if config.zero is not None else ([2, 3] if ranks > 1 else [0, 2])
    recompute = [config.grad_checkpointing] if config.grad_checkpointing is not None else [False, True]
    settings = [
        replace(base, zero=stage, checkpointing=checkpointing, offload=offload)
        for offload in ("none", "optimizer") for checkpointing in recompute for stage in stages
        if stage >= 2 or offload == "none"
    ]  # fmt: skip
    for setting in settings:
        memory = estimate_memory(table, setting)
        if memory.peak <= usable:
            return Choice(setting, memory, describe(setting, memory, usable))
    if config.micro_batch is None:
        for setting in settings:
            micro_batch = largest_micro_batch(table, setting, usable)
            if micro_batch:
                setting = replace(setting, micro_batch=micro_batch)
                return Choice(setting, memory := estimate_memory(table, setting), describe(setting, memory, usable))
    least = estimate_memory(table, replace(settings[-1], micro_batch=config.micro_batch or 1)).peak
    raise ValueError(
        f"{config.preset} does not fit: it needs {least / GB:.1f} GB and a GPU has {usable / GB:.1f} GB for it, with a"
        f" micro batch of {config.micro_batch or 1}, ZeRO-{settings[-1].zero} and all options that save memory"
    )


def describe(setting: Setting, memory: Memory, usable: float) -> str:
    """The setting and the reasons for it in one line."""
    words = [f"ZeRO-{setting.zero}"]
    if setting.offload != "none":
        words.append("with optimizer states on the host, because they fit nowhere else")
    if setting.checkpointing:
        words.append("with grad_checkpointing, because activations do not fit otherwise")
    if setting.micro_batch < setting.share:
        words.append(f"with grad_cache over {setting.share // setting.micro_batch} micro batches")
    return ", ".join(words) + f": {memory.peak / GB:.1f} of {usable / GB:.1f} GB"
