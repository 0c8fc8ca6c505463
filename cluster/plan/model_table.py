"""Figures of a model for planning: parameters, FLOPs and activations, as ``model summary`` prints them.

    table = load_table("priorclip-b32", "bf16")
    table.trained, table.flops(checkpointing=False, grad_cache=False)

This package does not import the model package: another process prints the summary, or a file holds it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorclip.common.output import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Point:
    """Largest activation bytes, ``fixed + sample x micro batch``, while this share of the gradients exists."""

    gradients: float
    fixed: float
    sample: float


@dataclass(frozen=True)
class ModelTable:
    """Figures of one model.

    Args:
        preset: name of the preset
        tensors: elements of each trained parameter
        frozen_tensors: elements of each frozen parameter
        width: dimension of the embedding space
        trained_flops: FLOPs of the forward pass of a pair through trained parameters
        frozen_flops: FLOPs of the forward pass of a pair through frozen parameters
        activations: activation curves by grad_checkpointing
        peaks: dense TFLOP/s of GPUs by name, (bf16, float32)
    """

    preset: str
    tensors: list[int]
    frozen_tensors: list[int]
    width: int
    trained_flops: int
    frozen_flops: int
    activations: dict[bool, list[Point]]
    peaks: dict[str, tuple[float, float]]

    @property
    def trained(self) -> int:
        return sum(self.tensors)

    @property
    def frozen(self) -> int:
        return sum(self.frozen_tensors)

    def persistent(self, threshold: int) -> list[int]:
        """Elements of each tensor that ZeRO-3 does not shard."""
        return [size for size in (*self.tensors, *self.frozen_tensors) if size <= threshold]

    def flops(self, checkpointing: bool, grad_cache: bool) -> int:
        """FLOPs of a training step for one pair. A backward pass counts as two forward passes."""
        forward = self.trained_flops + self.frozen_flops
        return forward + 2 * self.trained_flops + checkpointing * self.trained_flops + grad_cache * forward


def load_table(preset: str, precision: str, file: str | None = None) -> ModelTable:
    """Returns the table of the preset, from ``file`` if it holds ``python -m model summary --memory --format json``.

    Raises:
        ValueError: the file has another preset, precision or format, or the summary command failed.
    """
    if file is not None:
        text, source = Path(file).read_text(), file
    else:
        command = [sys.executable, "-m", "priorclip.model", "summary", "--preset", preset, "--format", "json"]
        command += ["--memory", "true", "--precision", precision]
        logger.info(
            "python %s: takes a minute for a large preset; save its output and pass it as --table",
            " ".join(command[1:]),
        )
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"python {' '.join(command[1:])} failed: {last}")
        text, source = done.stdout, f"the summary of {preset}"
    try:
        values = json.loads(text)
        if (values["preset"], values["precision"]) != (preset, precision):
            raise ValueError(
                f"{source} is of {values['preset']} in {values['precision']}, not of {preset} in {precision}"
            )
        return parse_table(values)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{source} is no output of 'python -m model summary --memory --format json': {error!r}"
        ) from error


def parse_table(values: dict[str, Any]) -> ModelTable:
    parts = values["parts"][:-1]  # the last row is the total
    flops = {name: sum(row["image_flops"] + row["text_flops"] for row in parts if bool(row["trained"]) == trained)
             for name, trained in (("trained_flops", True), ("frozen_flops", False))}  # fmt: skip
    curves = {name: [Point(**point) for point in values["activations"][name]] for name in ("plain", "checkpointed")}
    return ModelTable(
        preset=values["preset"],
        tensors=values["tensors"],
        frozen_tensors=values["frozen_tensors"],
        width=values["embed_dim"],
        activations={False: curves["plain"], True: curves["checkpointed"]},
        peaks={name: (both[0], both[1]) for name, both in values["gpu_tflops"].items()},
        **flops,
    )
