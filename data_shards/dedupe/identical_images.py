"""Finds images that training and evaluation shards have in common, byte for byte, by the hashes in the indices.

    warn_of_shared_images(ShardSet("data/rsicd-train"), ShardSet("data/rsitmd-test"))     # reads no image

It reads only the indices, so it is fast enough for the start of every training. `data_shards leakage` finds copies that
are re-encoded, resized or turned; `pack --exclude` leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from priorclip.common.output import get_logger
from priorclip.data_shards.format.sample import IMAGE_MEMBERS
from priorclip.data_shards.format.shard_index import ShardIndex, index_path
from priorclip.data_shards.remote.shard_files import LocalFile
from priorclip.data_shards.shards import ShardSet

if TYPE_CHECKING:
    from priorclip.data_shards.stream.batch_fetcher import SampleSource

log = get_logger(__name__)

NAMED = 5
NONE = np.zeros(0, "S32")


def warn_of_shared_images(training: SampleSource, held_out: SampleSource, rank: int = 0) -> list[str]:
    """Warns on rank 0 if images of ``held_out`` are in ``training``; returns their keys. It reads local shards only."""
    if rank or not isinstance(training, ShardSet) or not isinstance(held_out, ShardSet):
        return []
    parts = list(image_digests(held_out))
    digests = np.concatenate([NONE, *(digests for digests, _ in parts)])
    samples = np.concatenate([np.zeros(0, np.int64), *(samples for _, samples in parts)])
    known = np.unique(digests)
    # One shard at a time, because sorting the digests of all of RS5M takes seconds and memory.
    found = [own[contained_in(own, known)] for own, _ in image_digests(training)]
    there = np.isin(digests, np.concatenate([NONE, *found]))
    keys = [held_out.key(sample) for sample in np.unique(samples[there]).tolist()]
    if keys:
        log.warning(
            "%d of the %d images of %s are also in the training data %s, byte for byte: %s%s. Pack the training data "
            "with --exclude, and search for altered copies with `python -m data_shards leakage`",
            len(keys), len(held_out), ", ".join(held_out.spec), ", ".join(training.spec), ", ".join(keys[:NAMED]),
            ", ..." if len(keys) > NAMED else "",
        )  # fmt: skip
    return keys


def contained_in(values: NDArray[np.bytes_], known: NDArray[np.bytes_]) -> NDArray[np.bool_]:
    """Returns a mask of the values that are in ``known``, which is sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values


def image_digests(shards: ShardSet) -> Iterator[tuple[NDArray[np.bytes_], NDArray[np.int64]]]:
    """Yields for each shard the SHA-256 (N,) of its images and the sample number of each, if its index has them."""
    first = 0
    for file, size in zip(shards.files, shards.sizes, strict=True):
        if isinstance(file, LocalFile) and index_path(file.path).is_file():
            index = ShardIndex.load(index_path(file.path))
            if index.sha256 is not None and len(index) == size:
                kinds = [kind for kind, extension in enumerate(index.extensions) if extension in IMAGE_MEMBERS]
                rows = np.flatnonzero(np.isin(index.kind, kinds))
                digests = np.ascontiguousarray(index.sha256[rows]).view("S32")[:, 0]
                yield digests, first + np.searchsorted(index.first, rows, side="right").astype(np.int64) - 1
        first += size
