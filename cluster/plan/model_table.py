"""What a plan has to know of a model: parameters, FLOPs, activations by micro batch, as ``model summary`` has them.

    table = load_table("priorclip-b32", "bf16")
    table.parameters.trained, table.image_flops

This package knows no models: the summary comes from a process of its own, or from a file with its output.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """Most activation bytes, ``fixed + sample x micro batch``, while a share of the gradients is there."""

    gradients: float
    fixed: float
    sample: float


@dataclass(frozen=True)
class ModelTable:
    """A model for planning.

    Args:
        preset: its name
        tensors: elements of each trained parameter
        frozen_tensors: elements of each of the others
        width: of the shared embedding space
        trained_flops: of the forward pass of a pair through what is trained
        frozen_flops: through what is not
        activations: curves by grad_checkpointing
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
        """Elements of each tensor that ZeRO-3 leaves whole."""
        return [size for size in (*self.tensors, *self.frozen_tensors) if size <= threshold]

    def flops(self, checkpointing: bool, grad_cache: bool) -> int:
        """Of a training step for a pair; a backward pass is two forward passes."""
        forward = self.trained_flops + self.frozen_flops
        return forward + 2 * self.trained_flops + checkpointing * self.trained_flops + grad_cache * forward


def load_table(preset: str, precision: str, file: str | None = None) -> ModelTable:
    """Of the preset, or of the file that holds ``python -m model summary --memory --format json``.

    Raises:
        ValueError: the file is of another preset or precision, or something else; or the summary could not be made, and
            the message has its reason.
    """
    if file is not None:
        text, where = Path(file).read_text(), file
    else:
        command = [sys.executable, "-m", "priorclip.model", "summary", "--preset", preset, "--format", "json"]
        command += ["--memory", "true", "--precision", precision]
        logger.info("python %s: a minute for a large preset; its output is --table's", " ".join(command[1:]))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"python {' '.join(command[1:])} failed: {last}")
        text, where = done.stdout, f"the summary of {preset}"
    try:
        values = json.loads(text)
        if (values["preset"], values["precision"]) != (preset, precision):
            raise ValueError(
                f"{where} is of {values['preset']} in {values['precision']}, not of {preset} in {precision}"
            )
        return parse_table(values)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{where} is no output of 'python -m model summary --memory --format json': {error!r}"
        ) from error


def parse_table(values: dict[str, Any]) -> ModelTable:
    parts = values["parts"][:-1]  # the last row is all of them
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
