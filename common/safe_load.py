"""Loads the files of a checkpoint without running code that somebody wrote into them.

    state = load_tensors(path)                       # torch.load(weights_only=True)
    with only_safe_loads(): engine.load_checkpoint() # the same for torch.load in the code of DeepSpeed
    refuse_unsafe(checkpoint)                        # UnsafeFile: ... is refused because it holds posix.system ...
    refuse_bomb(path)                                # UnsafeFile: ... would take more memory than its size

A `.pt` file is a pickle, and a pickle can call any function of any module. Checksums do not help, because whoever
writes the file also writes its checksum. So we accept only tensors, plain values, and the few classes that DeepSpeed
saves, which are below. torch is imported when a function runs.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

# What zipfile raises for a damaged archive.
NO_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError)
HELD = re.compile(r"GLOBAL (\S+)")


class UnsafeFile(ValueError):
    """A file of a checkpoint holds something that could run code."""


def refuse_bomb(path: Path) -> None:
    """Refuses a zip archive whose files are compressed or overlap, because a small one could fill the memory.

    torch compresses nothing. Raises UnsafeFile; a file that is no zip archive passes.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
    except NO_ARCHIVE as error:
        raise UnsafeFile(f"{path} is damaged: {error}") from error
    if not all(map(is_stored, files)) or sum(file.file_size for file in files) > path.stat().st_size:
        raise UnsafeFile(f"{path} is refused because it would take more memory than its size, as no file of torch does")


def is_stored(file: zipfile.ZipInfo) -> bool:
    """Tells whether a file in an archive has its own size, without compression."""
    return file.compress_type == zipfile.ZIP_STORED and file.compress_size == file.file_size


def deepspeed_classes() -> list[Any]:
    """Returns the classes of DeepSpeed that its checkpoints hold: numbers by name, without code that loading runs."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def only_safe_loads() -> Iterator[None]:
    """Within it, every ``torch.load`` of this process accepts only tensors, plain values and `deepspeed_classes`.

    DeepSpeed asks for ``weights_only=False``, which is overruled.

    Raises:
        UnsafeFile: a file holds something else; its name is in the message
    """
    import torch

    torch_load = torch.load

    def load(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, str | os.PathLike):
            refuse_bomb(Path(file))
        try:
            return torch_load(file, *args, **{**options, "weights_only": True})
        except pickle.UnpicklingError as error:
            raise UnsafeFile(refusal(file, str(error))) from None

    with torch.serialization.safe_globals(deepspeed_classes()):
        torch.load = cast(Any, load)
        try:
            yield
        finally:
            torch.load = torch_load


def refusal(file: object, error: str) -> str:
    """Returns the message for a file that torch refused."""
    found = HELD.search(error)
    held = found[1] if found else "something that is no tensor or plain value"
    return (
        f"{file} is refused because it holds {held}, which could run code. A run never writes that: somebody else"
        f" changed the checkpoint. Remove {Path(str(file)).parent}, or restore it from your own copy"
    )


def load_tensors(path: Path, mmap: bool = False) -> Any:
    """Returns the content of a file of a checkpoint on the CPU.

    Args:
        path: the file
        mmap: leave the values on the disk until they are used

    Raises:
        UnsafeFile: it could run code
    """
    import torch

    with only_safe_loads():
        return torch.load(path, map_location="cpu", mmap=mmap)


def refuse_unsafe(folder: Path) -> None:
    """Reads the structure, but not the values, of every ``.pt`` file under the folder.

    Raises:
        UnsafeFile: one of them could run code, or is no file of torch
    """
    for path in sorted(folder.rglob("*.pt")):
        try:
            load_tensors(path, mmap=True)
        except (RuntimeError, EOFError) as error:
            raise UnsafeFile(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
