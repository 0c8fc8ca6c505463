"""Whether two finished runs are the same to the last bit: the loss of each step, each tensor of the last checkpoint.

compare(Path("runs/whole"), Path("runs/shot"))      # ["step 7: loss 0.41 instead of 0.42", ...], or []
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from priorclip.training.monitoring.read_metrics import records


def compare(whole: Path, shot: Path) -> list[str]:
    """What is not the same in two finished runs: losses by step, tensors of the last checkpoint."""
    found = []
    traces = [losses(folder) for folder in (whole, shot)]
    found += [f"step {step}: loss {traces[1].get(step)} instead of {loss}" for step, loss in traces[0].items()
              if traces[1].get(step) != loss]  # fmt: skip
    newest = [folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text() for folder in (whole, shot)]
    if newest[0].name != newest[1].name:
        return [*found, f"the last checkpoint is {newest[1].name} instead of {newest[0].name}"]
    import torch

    for path in sorted(newest[0].glob("*.pt")):
        states = [torch.load(folder / path.name, map_location="cpu", weights_only=False) for folder in newest]
        found += [f"{path.name}: {name} differs" for name in differing(states[0], states[1], "")]
    return found


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["train/loss"] for record in records(folder) if "train/loss" in record}


def differing(one: Any, other: Any, name: str) -> Iterator[str]:
    """Names of the tensors that are not equal to the last bit."""
    import torch

    if isinstance(one, torch.Tensor):
        if not (isinstance(other, torch.Tensor) and torch.equal(one, other)):
            yield name
    elif isinstance(one, dict):
        for key, value in one.items():
            yield from differing(value, other.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{name}: {len(other)} entries instead of {len(one)}, which"
        for number, value in enumerate(one[: len(other)]):
            yield from differing(value, other[number], f"{name}[{number}]")
