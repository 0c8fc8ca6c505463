"""Images that training and evaluation shards share byte for byte, by the hashes that packing left in their indices.

    warn_of_shared(ShardSet("data/rsicd-train"), ShardSet("data/rsitmd-test"))     # reads no image

It reads the indices alone, so that every training does it. What is re-encoded, resized or turned is found by
`data_shards leakage`, and kept out by `pack --exclude`.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from data_shards.index import ShardIndex
from data_shards.sample import IMAGE_MEMBERS
from data_shards.shards import ShardSet, index_path
from data_shards.store import LocalFile

log = logging.getLogger(__name__)

NAMED = 5


def warn_of_shared(training: ShardSet, held_out: ShardSet) -> list[str]:
    """Warn where images of ``held_out`` are in ``training``; returns their keys. Remote shards are not looked at."""
    digests, samples = image_digests(held_out)
    there = np.isin(digests, image_digests(training)[0])
    keys = [held_out.key(sample) for sample in np.unique(samples[there]).tolist()]
    if keys:
        log.warning(
            "%d of the %d images of %s are in the training data %s, byte for byte: %s%s. Pack it with --exclude, and "
            "look for altered copies by `python -m data_shards leakage`",
            len(keys), len(held_out), ", ".join(held_out.spec), ", ".join(training.spec), ", ".join(keys[:NAMED]),
            ", ..." if len(keys) > NAMED else "",
        )  # fmt: skip
    return keys


def image_digests(shards: ShardSet) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """SHA-256 (N,) of the images whose index has it, and the sample of each."""
    digests, samples = [np.zeros(0, "S32")], [np.zeros(0, np.int64)]
    first = 0
    for file, size in zip(shards.files, shards.sizes, strict=True):
        if isinstance(file, LocalFile) and index_path(file.path).is_file():
            index = ShardIndex.load(index_path(file.path))
            if index.sha256 is not None and len(index) == size:
                kinds = [kind for kind, extension in enumerate(index.extensions) if extension in IMAGE_MEMBERS]
                rows = np.flatnonzero(np.isin(index.kind, kinds))
                digests.append(np.ascontiguousarray(index.sha256[rows]).view("S32")[:, 0])
                samples.append(first + np.searchsorted(index.first, rows, side="right").astype(np.int64) - 1)
        first += size
    return np.concatenate(digests), np.concatenate(samples)
