"""Reads the tensors of a TorchScript archive, the format of OpenAI's CLIP, without executing its code.

``torch.jit.load`` executes the archive's code, and ``torch.load(weights_only=True)`` refuses the format. An archive is
a zip file, and its ``data.pkl`` is a tree of modules with attributes. The unpickler here knows tensors and containers
only: a module becomes an object with attributes, and any other name in the pickle is an error. All tensors together
take little more memory than the file has bytes: torch compresses only code, and shares few storages.

    state = read_torchscript("ViT-B-32.pt")       # {"visual.conv1.weight": ..., ...}
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from priorclip.common.safe_load import NO_ARCHIVE, is_stored

COPIES = 4  # times the size of the file that may be read and copied; each tensor of a storage is a copy
MAX_MODULES, MAX_DEPTH = 20_000, 100
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, AttributeError, TypeError, OSError,
    ValueError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip
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
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except NO_ARCHIVE:
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Returns parameters and buffers by their dotted names.

    Raises ValueError if the archive is damaged, names anything other than modules, containers and tensors, or would
    take far more memory than its size.
    """
    with zipfile.ZipFile(path) as archive:
        root = next((name.split("/")[0] for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError(f"{path} is a TorchScript archive without data.pkl")
        try:
            tree = ArchiveReader(archive, root, COPIES * path.stat().st_size).load()
            return tensors_of(tree)
        except DAMAGE as error:
            raise ValueError(f"{path} cannot be read as a TorchScript archive: {error}") from error


class ArchiveReader(pickle.Unpickler):
    """Reads ``data.pkl``. It accepts only names that build data."""

    def __init__(self, archive: zipfile.ZipFile, root: str, most: int):
        self.archive, self.root, self.left = archive, root, most
        super().__init__(io.BytesIO(self.stored("data.pkl")))
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (ModuleAttributes,), {})
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self.view,
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

    def stored(self, name: str) -> bytes:
        """Returns a file of the archive. Raises UnpicklingError if it is compressed: torch compresses only code."""
        info = self.archive.getinfo(f"{self.root}/{name}")
        self.left -= info.file_size
        if not is_stored(info) or self.left < 0:
            raise pickle.UnpicklingError(f"{name} would take more memory than the size of the archive")
        return self.archive.read(info)

    def view(self, storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
        """Copies a tensor out of a flat storage. Raises UnpicklingError if it lies outside, or for too many copies."""
        found = view(storage, offset, size, stride)
        self.left -= found.numel() * found.element_size()
        if self.left < 0:
            raise pickle.UnpicklingError(f"its tensors take more than {COPIES} times its size")
        return found.clone()

    def persistent_load(self, identifier: Any) -> Tensor:
        """Returns a storage as a flat tensor."""
        _, kind, key, _, _ = identifier
        if key not in self.storages:
            raw = bytearray(self.stored(f"data/{key}"))
            dtype = DTYPES[kind]
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[key]


def view(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Returns a tensor in a flat storage. Raises UnpicklingError if it lies outside of it, or repeats its values."""
    needed = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    inside = needed <= storage.numel() and offset >= 0 and min((*size, *stride, 0)) >= 0
    if 0 not in size and (not inside or math.prod(size) > storage.numel()):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} does not fit its storage")
    return storage.as_strided(tuple(size), tuple(stride), offset)


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """Returns the tensors among the attributes of a module and below them, by their dotted names.

    A module may stand in several places. Raises UnpicklingError if they have no end.
    """
    found: dict[str, Tensor] = {}
    waiting = deque([("", tree)])
    places = 0
    while waiting:
        prefix, module = waiting.popleft()
        places += 1
        if places > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise pickle.UnpicklingError(f"it has more than {MAX_MODULES} modules, or {MAX_DEPTH} inside each other")
        for name, value in vars(module).items() if isinstance(module, ModuleAttributes) else ():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, ModuleAttributes):
                waiting.append((f"{prefix}{name}.", value))
    return found
