"""The device that a command runs its model on."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """Returns the device for ``auto`` (a GPU if torch sees one), ``cpu`` or ``cuda``.

    Raises ValueError if a GPU is asked for and torch sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU on this machine, use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
