"""Finished parts of an index that is being made, so that a killed run goes on and does not begin again.

    runs/index                          does not exist before the index is finished
    runs/.index.parts/part-000000.safetensors   rows of some whole batches, named by the lowest number of them
                      part-000064.safetensors   "batches" (b,), "places" (n,), "features" (n, d), "labels" (n,)

    parts = IndexParts.of(config, gallery, encoder.folder, "cpu")
    parts.done()                        numbers of the batches that an earlier run has encoded
    parts.add(7, Rows(places, features, labels))    written together with others, after ``every`` images
    parts.flush()                       the rest
    parts.kept                          the rows of the earlier run, on rank 0
    parts.remove()                      after the index is written

A part is whole or absent. It carries a hash of everything that its rows depend on: weights and configuration, device,
precision, batch size, limit of pixels, number format, and the samples with size and time of their files. A part with
another hash, or a damaged one, is removed. A batch has the same images in both runs, so the index is the same to the
last byte, also if the second run has another number of ranks.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from priorclip.common.files import file_aside, is_stale, temporary_paths
from priorclip.common.output import get_logger
from priorclip.retrieval.commands import IndexConfig
from priorclip.retrieval.gallery import Gallery
from priorclip.retrieval.identity import data_digest, model_digest
from priorclip.retrieval.shared_encoding import is_first, of_first_rank

log = get_logger(__name__)

VERSION = 1
NAMES = ("batches", "places", "features", "labels")


@dataclass(frozen=True)
class Rows:
    """Usable images of a batch.

    Args:
        places: (n,) int64, the index of each image in the gallery
        features: (n, d)
        labels: (n,) int64, -1 if it is unknown
    """

    places: Tensor
    features: Tensor
    labels: Tensor


class IndexParts:
    """The parts of one index. Every rank has one of these for the same folder.

    Args:
        folder: of the parts
        identity: a hash of what the rows depend on
        every: a part is written when it has at least so many images
    """

    def __init__(self, folder: Path, identity: str, every: int) -> None:
        self.folder, self.identity, self.every = folder, identity, every
        self.kept: list[Rows] = []
        self._waiting: dict[int, Rows] = {}

    @classmethod
    def of(cls, config: IndexConfig, gallery: Gallery, model: Path, device: str) -> IndexParts:
        """Returns the parts of the index that ``config`` asks for, of an export folder on a kind of device."""
        output = Path(config.output)
        options = (config.batch_size, config.max_pixels, config.dtype, config.precision, device)
        words = f"{VERSION} {options} {torch.__version__} {data_digest(gallery, None)}"
        return cls(output.with_name(f".{output.name}.parts"), model_digest(model, words), config.keep_every)

    def done(self) -> frozenset[int]:
        """Reads the parts on rank 0 and returns on all ranks the numbers of the batches in them."""
        batches: set[int] = set()
        if is_first():
            for path in sorted(self.folder.glob("part-*.safetensors")):
                batches |= self._read(path, batches)
            for path in filter(is_stale, temporary_paths(self.folder)):
                path.unlink(missing_ok=True)
            if batches:
                count = sum(len(rows.places) for rows in self.kept)
                log.info("%d images in %d batches were encoded by an earlier run", count, len(batches))
        return frozenset(of_first_rank(batches))

    def add(self, batch: int, rows: Rows) -> None:
        """Takes the rows of a batch."""
        self._waiting[batch] = rows
        if sum(len(each.places) for each in self._waiting.values()) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        if not self._waiting:
            return
        found = list(self._waiting.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "batches": torch.tensor(list(self._waiting)),
            "places": torch.cat([rows.places for rows in found]),
            "features": torch.cat([rows.features for rows in found]),
            "labels": torch.cat([rows.labels for rows in found]),
        }
        digest = digest_of(tensors)
        with file_aside(self.folder / f"part-{min(self._waiting):06d}.safetensors") as aside:
            save_file(tensors, aside, {"identity": self.identity, "digest": digest})
        self._waiting.clear()

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path, before: set[int]) -> set[int]:
        """Keeps the rows of a part, and returns its batches. Removes a part that does not belong to this index."""
        reason = "is of another model, other options or other images"
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in NAMES}
            batches = set(tensors["batches"].tolist())
            if about.get("identity") == self.identity and not batches & before:
                if about.get("digest") == digest_of(tensors):
                    self.kept.append(Rows(*(tensors[name] for name in NAMES[1:])))
                    return batches
                reason = "is damaged"
        except Exception:  # safetensors' own error is no subclass of ValueError
            reason = "is damaged"
        log.warning("%s %s: it is removed, and its images are encoded again", path, reason)
        path.unlink(missing_ok=True)
        return set()


def digest_of(tensors: dict[str, Tensor]) -> str:
    """Returns a hash of the tensors' names, shapes and bytes."""
    found = hashlib.sha256()
    for name in NAMES:
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
