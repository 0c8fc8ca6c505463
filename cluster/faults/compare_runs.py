"""Compares two finished runs to the last bit: the loss of each step and each tensor of the last checkpoint.

compare_runs(Path("runs/whole"), Path("runs/shot"))      # ["step 7: loss 0.41 instead of 0.42", ...], or []
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from priorclip.common.safe_load import load_tensors
from priorclip.training.monitoring.read_metrics import records


def compare_runs(expected: Path, actual: Path) -> list[str]:
    """Returns the differences between two run directories: losses by step, tensors of the last checkpoint."""
    folders = (expected, actual)
    expected_losses, actual_losses = (losses(folder) for folder in folders)
    found = [f"step {step}: loss {actual_losses.get(step)} instead of {loss}" for step, loss in expected_losses.items()
             if actual_losses.get(step) != loss]  # fmt: skip
    newest = [folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text() for folder in folders]
    if newest[0].name != newest[1].name:
        return [*found, f"the last checkpoint is {newest[1].name} instead of {newest[0].name}"]
    for path in sorted(newest[0].glob("*.pt")):
        states = [load_tensors(folder / path.name) for folder in newest]
        found += [f"{path.name}: {name} differs" for name in different_tensors(states[0], states[1], "")]
    return found


def losses(folder: Path) -> dict[int, float]:
    """The training loss by step."""
    return {record["step"]: record["train/loss"] for record in records(folder) if "train/loss" in record}


def different_tensors(expected: Any, actual: Any, name: str) -> Iterator[str]:
    """Yields the names of the tensors that are not equal to the last bit."""
    import torch

    if isinstance(expected, torch.Tensor):
        if not (isinstance(actual, torch.Tensor) and torch.equal(expected, actual)):
            yield name
    elif isinstance(expected, dict):
        for key, value in expected.items():
            yield from different_tensors(value, actual.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            yield f"{name}: {len(actual)} entries instead of {len(expected)}, which"
        for number, value in enumerate(expected[: len(actual)]):
            yield from different_tensors(value, actual[number], f"{name}[{number}]")
