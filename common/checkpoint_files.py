"""The files of a checkpoint that this project adds to those of DeepSpeed, for resuming a run and for exporting it.

    checkpoints/step_00000100/checksums.json            SHA-256 of each file, step, world size, ZeRO stage, evaluation
    checkpoints/step_00000100/buffers_rank_00000.pt     batch-norm statistics of a rank; DeepSpeed keeps those of rank 0
    checkpoints/step_00000100/averages_rank_00000.pt    the rank's piece of the moving average, if the run has one
    checkpoints/step_00000100/generators_rank_00000.pt  states of the rank's random number generators

Both readers find, verify and join them by the same functions (common/checkpoint_record.py reads checksums.json). torch
is imported when a function runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from priorclip.common.checkpoint_record import CHECKSUMS, load_record
from priorclip.common.checkpoint_record import read_record as read_record
from priorclip.common.files import sha256_of
from priorclip.common.safe_load import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["buffers", "averages", "generators"]
NAME = re.compile(r"step_(\d{8,})")


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints in ``checkpoints``, newest first. They can still be damaged.

    Raises:
        OSError: the folder cannot be listed, or is a link to a place that is not there
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return []
    return sorted((folder / name for name in names if NAME.fullmatch(name)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def find_damage(checkpoint: Path) -> str | None:
    """Compares the record and all files with their checksums. Returns the first problem, or None."""
    try:
        record = load_record(checkpoint)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    return find_damaged_file(checkpoint, record["sha256"])


def find_damaged_file(folder: Path, sums: Mapping[str, str]) -> str | None:
    """Compares files with their SHA-256 by name. Returns the first problem, or None."""
    for name, sha256 in sorted(sums.items()):
        try:
            if sha256_of(folder / name) != sha256:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def rank_file(kind: Kind, rank: int) -> str:
    """Returns the name of a file that each rank writes."""
    return f"{kind}_rank_{rank:05d}.pt"


def load_ranks(checkpoint: Path, kind: Kind) -> list[dict[str, Tensor]]:
    """Returns the content of that file of each rank; an empty list if the checkpoint has none.

    Raises:
        UnsafeFile: a file could run code
    """
    own = re.compile(rf"{kind}_rank_\d{{5,}}\.pt")
    return [load_tensors(path) for path in sorted(checkpoint.iterdir()) if own.fullmatch(path.name)]


def average_buffers(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the mean over ranks of each batch-norm statistic, and the largest of each count."""
    import torch

    ranks = load_ranks(checkpoint, "buffers")
    stacked = {name: torch.stack([rank[name] for rank in ranks]) for name in (ranks[0] if ranks else ())}
    return {name: values.mean(0) if values.is_floating_point() else values.amax(0) for name, values in stacked.items()}


def join_pieces(pieces: Sequence[Tensor], count: int) -> Tensor:
    """Returns a flat tensor of ``count`` values from the pieces of all ranks.

    Without ZeRO each piece is the whole tensor. Otherwise they follow each other, and ZeRO 3 pads the last one.
    """
    import torch

    flat = [piece.flatten() for piece in pieces]
    return flat[0] if flat[0].numel() == count else torch.cat(flat)[:count]
