"""Reads a published checkpoint: tensors, and the facts in its config.

    checkpoint = read_checkpoint("RemoteCLIP-ViT-B-32.pt")
    checkpoint.state["visual.conv1.weight"]       # without the wrappers and prefixes of trainers

Read by safetensors, by ``torch.load(weights_only=True)``, or as a TorchScript archive: no code is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from priorclip.common.untrusted_json import read_object
from priorclip.model.convert.torchscript import is_torchscript, read_torchscript
from priorclip.model.encoders.weight_file import read_weight_file
from priorclip.model.encoders.weights import State

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
PREFIXES = ("module.", "_orig_mod.")
OPEN_CLIP_CONFIG = "open_clip_config.json"
MAX_BYTES = 4 << 20  # of a configuration
WEIGHT_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """Args:
    source: file or folder, for messages
    state: tensors by name
    facts: a folder's config.json, or the ``config`` that a trainer saved, and under ``open_clip_config.json`` the
        content of that file beside the weights; they are not trusted
    scripted: the file was a TorchScript archive
    """

    source: str
    state: State
    facts: dict[str, Any] = field(default_factory=dict)
    scripted: bool = False


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the checkpoint of a file or a folder.

    Raises:
        FileNotFoundError: no such file
        ValueError: reading it would execute code, it is damaged, or it holds no tensors
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"--input {path}: no such file or folder")
    if path.suffix != ".safetensors" and is_torchscript(path):
        return Checkpoint(str(path), unwrapped(read_torchscript(path), path), scripted=True)
    try:
        loaded = read_weight_file(path)
    except ValueError as error:
        raise ValueError(f"--input {error}") from error
    facts = loaded.get("config") if isinstance(loaded, Mapping) else None
    facts = dict(facts) if isinstance(facts, Mapping) else {}
    return Checkpoint(str(path), unwrapped(loaded, path), facts | open_clip_facts(path.parent))


def read_folder(folder: Path) -> Checkpoint:
    """Reads a folder of transformers, or of open_clip on the hub."""
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"--input {folder} holds none of {', '.join(WEIGHT_FILES)}")
    facts = read_config(folder / "config.json") | open_clip_facts(folder)
    return Checkpoint(str(folder), read_checkpoint(found[0]).state, facts)


def open_clip_facts(folder: Path) -> dict[str, Any]:
    """Returns the content of open_clip_config.json under that name; nothing if there is none."""
    content = read_config(folder / OPEN_CLIP_CONFIG)
    return {OPEN_CLIP_CONFIG: content} if content else {}


def read_config(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, an empty one if there is none. Raises ValueError that names the file."""
    try:
        return read_object(path, MAX_BYTES)
    except FileNotFoundError:
        return {}


def unwrapped(loaded: Any, path: Path) -> State:
    """Returns the tensors by name, without the wrappers of trainers and the prefixes of wrapped modules."""
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {} if not isinstance(loaded, Mapping) else {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"--input {path} holds no tensors by name")
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
