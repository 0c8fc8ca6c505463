"""Reads a file of weights that somebody else may have made: tensors only, and an error names the file.

read_weight_file(Path("vit.safetensors"))     {"blocks.0.attn.qkv.weight": Tensor, ...}
read_weight_file(Path("vit.pth"))             what torch.load(weights_only=True) gives

ValueError: vit.pth is no file of weights, or it is damaged: it begins with 'version https://git-lfs.'
ValueError: vit.safetensors is damaged: Error while deserializing header: header too large
PermissionError: [Errno 13] Permission denied: 'vit.safetensors'
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from priorclip.common.safe_load import refuse_bomb

SHOWN = 24  # bytes of the beginning in a message
HOLDS_CODE = "GLOBAL "  # in what torch says about a pickle that names a function or a class


def read_weight_file(path: Path) -> Any:
    """Returns the content of a .safetensors file, or of another file by ``torch.load(weights_only=True)``, on the CPU.

    Raises:
        OSError: there is no such file, or it may not be read
        ValueError: it is damaged, or reading it would execute code
    """
    check_readable(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    refuse_bomb(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if HOLDS_CODE not in str(error):
            raise no_weights(path) from error
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} holds more than weights, and reading it would execute its code. Save only its "
            f"state_dict as .safetensors, on a machine where you trust the file. ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, TypeError, MemoryError, ValueError) as error:
        raise no_weights(path) from error


def check_readable(path: Path) -> None:
    """Raises OSError with the reason if a file cannot be opened: safetensors says of each that there is none."""
    with open(path, "rb"):
        pass


def no_weights(path: Path) -> ValueError:
    """Returns the error for a file that torch cannot read, with its beginning."""
    with open(path, "rb") as file:
        first = file.read(SHOWN)
    begins = f"it begins with {first.decode('ascii', 'replace')!r}" if first else "it is empty"
    return ValueError(f"{path} is no file of weights, or it is damaged: {begins}")
