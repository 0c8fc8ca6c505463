"""The hashes of many images: a worker pool computes them in parts, and they are read back as columns.

    records 0 .. 999      ->  .pack/prints/000000.npy
    records 1000 .. 1999  ->  .pack/prints/000001.npy    one row per image, see image_hashes.py

Five million images take 165 MB of SHA-256 and 40 MB of perceptual hashes in memory. Their thumbnails (1.3 GB) stay on
disk, because only those of the few candidates are read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from priorclip.common.files import write_bytes
from priorclip.common.progress import Progress
from priorclip.data_shards.dedupe.image_hashes import hash_images
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.pack.worker_pool import TaskShare, WorkerPool
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import Record, load

PART = 1000  # images per part


@dataclass(frozen=True)
class HashColumns:
    """Hashes of images 0 .. N-1, one array per column; a column that was not computed is zero.

    Attributes:
        parts: files or arrays with the rows of all columns, ``PART`` rows each except the last
        readable: (N,) whether the image can be decoded
        sha256: (N,) 32-byte strings
        hash: perceptual hashes, (N,), or (N, 8) with one per orientation
        textured: (N,) whether the image has enough contrast for a perceptual hash
    """

    parts: Sequence[Path | NDArray]
    readable: NDArray[np.bool_]
    sha256: NDArray[np.bytes_]
    hash: NDArray[np.uint64]
    textured: NDArray[np.bool_]

    @classmethod
    def of(cls, parts: Sequence[Path | NDArray]) -> HashColumns:
        columns: dict[str, list[NDArray]] = {"readable": [], "sha256": [], "hash": [], "textured": []}
        for part in parts:
            rows = load_rows(part)
            for name, column in columns.items():
                known = name in (rows.dtype.names or ())
                column.append(rows[name].copy() if known else np.zeros(len(rows), np.uint64))
        readable, sha256, hashes, textured = (np.concatenate(column) for column in columns.values())
        return cls(parts, readable, sha256.view("S32")[:, 0], hashes, textured.astype(bool))

    @classmethod
    def of_rows(cls, rows: NDArray) -> HashColumns:
        return cls.of([rows[first : first + PART] for first in range(0, len(rows), PART)])

    def __len__(self) -> int:
        return len(self.readable)

    def thumbnails(self, images: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the thumbnails (n, 16, 16) of these image numbers. It reads each part once."""
        wanted, places = np.unique(images, return_inverse=True)
        found = []
        for part in np.unique(wanted // PART).tolist():
            rows = load_rows(self.parts[part])
            found.append(rows["thumb"][wanted[wanted // PART == part] - part * PART])
        return np.concatenate(found)[places]


def load_rows(part: Path | NDArray) -> NDArray:
    return np.load(part, allow_pickle=False) if isinstance(part, Path) else part


def hash_records(
    records: Sequence[Record], folder: Path, kind: np.dtype, max_pixels: int, pool: WorkerPool, share: TaskShare
) -> HashColumns:
    """Hashes the images of the records and stores them in ``folder``. It skips parts that are stored already.

    Each task first hashes the parts of its share, then the unfinished parts of the other tasks, from the last part
    backwards. So each task gets all hashes, also if the other tasks do not run at the same time.
    """
    folder.mkdir(exist_ok=True)
    count = -(-len(records) // PART)
    paths = [folder / f"{part:06d}.npy" for part in range(count)]
    own = [part for part in range(count) if share.has(part)]
    rest = [part for part in reversed(range(count)) if not share.has(part)]
    with Progress(len(records), "hash images", "img") as progress:
        for parts in (own, rest):
            missing = [part for part in parts if not paths[part].exists()]
            jobs = (
                (paths[part], records[part * PART : (part + 1) * PART], kind, max_pixels)
                for part in missing
                if not paths[part].exists()  # another task may have written it since
            )
            for done in pool.run(hash_part, jobs, len(missing)):
                progress.update(done)
    return HashColumns.of(paths)


def hash_part(path: Path, records: Sequence[Record], kind: np.dtype, max_pixels: int) -> int:
    """Writes the hashes of these records and returns their number."""
    buffer = io.BytesIO()
    np.save(buffer, hash_in_memory(records, kind, max_pixels), allow_pickle=False)
    write_bytes(path, buffer.getvalue())
    return len(records)


def hash_in_memory(records: Sequence[Record], kind: np.dtype, max_pixels: int) -> NDArray:
    return hash_images((read_image(record) for record in records), len(records), kind, max_pixels)


def read_image(record: Record) -> bytes | BadSample:
    """Returns the image's bytes, or the error if it cannot be read."""
    try:
        image = load(record).image
    except BadSample as error:
        return error
    assert isinstance(image, bytes)
    return image


def hash_shard_range(shards: ShardSet, first: int, last: int, kind: np.dtype, max_pixels: int) -> tuple[int, NDArray]:
    """Returns (first, hashes) of the packed samples first .. last-1."""

    def image(sample: int) -> bytes | BadSample:
        try:
            return shards.read(sample).image
        except BadSample as error:
            return error

    return first, hash_images(map(image, range(first, last)), last - first, kind, max_pixels)


def hash_shards(shards: ShardSet, kind: np.dtype, max_pixels: int, pool: WorkerPool) -> HashColumns:
    """Hashes the images of packed samples, in their order."""
    starts = range(0, len(shards), PART)
    jobs = ((shards, first, min(first + PART, len(shards)), kind, max_pixels) for first in starts)
    parts: dict[int, NDArray] = {}
    with Progress(len(shards), "hash images", "img") as progress:
        for first, rows in pool.run(hash_shard_range, jobs, len(starts)):
            parts[first] = rows
            progress.update(len(rows))
    return HashColumns.of([parts[first] for first in starts])
