"""Reads the tensors of a TorchScript archive, the format of OpenAI's CLIP, without executing its code.

``torch.jit.load`` executes the archive's code, and ``torch.load(weights_only=True)`` refuses the format. An archive is
a zip file, and its ``data.pkl`` is a tree of modules with attributes. The unpickler here knows tensors and containers
only: a module becomes an object with attributes, and any other name in the pickle is an error.

    state = read_torchscript("ViT-B-32.pt")       # {"visual.conv1.weight": ..., ...}
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ModuleAttributes:
    """The attributes of a module, without its methods."""

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes if isinstance(attributes, dict) else {})


def is_torchscript(path: Path) -> bool:
    """Tells whether the file is a TorchScript archive: a zip file with code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Returns parameters and buffers by their dotted names.

    Raises ValueError if the archive names anything other than modules, containers and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = next((name.split("/")[0] for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError(f"{path} is a TorchScript archive without data.pkl")
        try:
            tree = ArchiveReader(archive, root).load()
        except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"{path} cannot be read as a TorchScript archive: {error}") from error
    return dict(tensors_of(tree))


class ArchiveReader(pickle.Unpickler):
    """Reads ``data.pkl``. It accepts only names that build data."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (ModuleAttributes,), {})
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): view,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
        }
        if module == "torch" and name in DTYPES:
            return name
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no archive of weights needs; do not trust it")

    def persistent_load(self, identifier: Any) -> Tensor:
        """Returns a storage as a flat tensor."""
        _, kind, key, _, _ = identifier
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            dtype = DTYPES[kind]
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[key]


def view(storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Copies a tensor out of a flat storage. Raises UnpicklingError if it lies outside of the storage."""
    needed = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if 0 not in tuple(size) and (needed > storage.numel() or offset < 0 or any(step < 0 for step in stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} lies outside of its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def tensors_of(module: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Returns the tensors among the attributes and below them, with their dotted names."""
    found: list[tuple[str, Tensor]] = []
    for name, value in vars(module).items() if isinstance(module, ModuleAttributes) else ():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, ModuleAttributes):
            found += tensors_of(value, f"{prefix}{name}.")
    return found
