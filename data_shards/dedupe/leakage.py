"""Finds evaluation images in the training data: exact copies, and re-encoded, resized, turned or mirrored ones.

    pack ... --exclude dataset_rsitmd.json --exclude-images RSITMD/images     leaves them out
    leakage --shards data/train --exclude dataset_rsitmd.json ...             lists them

    {"key": "p/0413", "evaluation": "airport_12", "from": "dataset_rsitmd.json", "kind": "near", "distance": 4,
     "correlation": 0.993, "transformation": "rotated by 90 degrees"}

Each evaluation image is compared with every training image in all eight orientations, see image_hashes.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.common.progress import Progress
from priorclip.data_shards.dedupe.hash_columns import PART, HashColumns, hash_in_memory, hash_shards
from priorclip.data_shards.dedupe.image_hashes import (
    EXACT,
    MIN_CORRELATION,
    PERCEPTUAL,
    SYMMETRIC,
    SYMMETRIES,
    correlation,
)
from priorclip.data_shards.dedupe.near_hashes import near_pairs
from priorclip.data_shards.pack.worker_pool import WorkerPool
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import Record, csv, imagefolder, karpathy

DEFAULT_DISTANCE = 8  # of 64 bits
ALL_SPLITS = "all"
NAMED = 3  # unreadable images that an error names


@dataclass(frozen=True)
class EvaluationImages:
    """The evaluation images that must stay out of the training data.

    Args:
        keys: key of each image
        origin: name of the data set of each image
        hashes: hashes of the images
        distance: an image with at most this many different bits is the same; None compares bytes only
    """

    keys: list[str]
    origin: list[str]
    hashes: HashColumns
    distance: int | None

    @property
    def digest(self) -> str:
        """Returns a digest of the images and of the distance."""
        return hashlib.sha256(self.hashes.sha256.tobytes() + repr(self.distance).encode()).hexdigest()

    @property
    def kind(self) -> np.dtype:
        """Returns the hashes that training images need for the comparison."""
        return EXACT if self.distance is None else PERCEPTUAL


@dataclass(frozen=True)
class Leak:
    """Training image ``image`` shows evaluation image ``evaluated`` (numbers); ``turn`` is an index in SYMMETRIES."""

    image: int
    evaluated: int
    kind: str
    distance: int = 0
    correlation: float = 1.0
    turn: int = 0


def read_evaluation_images(
    sets: Sequence[str],
    folders: Sequence[str],
    splits: Sequence[str],
    distance: int | None,
    max_pixels: int,
    pool: WorkerPool,
) -> EvaluationImages:
    """Reads evaluation sets and hashes their images.

    Args:
        sets: Karpathy JSON or CSV files, folders of images, folders or tars of packed shards
        folders: image folder of each JSON and CSV file, or one for all
        splits: splits to take from a JSON or CSV file that has splits; "all" takes all
        distance: two images are the same if at most this many of 64 bits differ; None compares bytes only
        max_pixels: larger images are an error
        pool: computes the hashes

    Raises:
        ValueError: a set has no image folder, no image, or an image that cannot be read
    """
    keys: list[str] = []
    origin: list[str] = []
    rows: list[NDArray] = []
    annotated = [name for name in sets if Path(name).suffix.lower() in (".json", ".csv")]
    if annotated and len(folders) not in (1, len(annotated)):
        raise ValueError(
            f"--exclude {','.join(annotated)} needs --exclude-images: one image folder for all files or one for each, "
            f"not {len(folders)}"
        )
    if not sets:
        raise ValueError("--exclude is empty: name a set of evaluation images")
    kind = EXACT if distance is None else SYMMETRIC
    for name in sets:
        if name in annotated:
            place = annotated.index(name)
            records = read_annotated(Path(name), folders[min(place, len(folders) - 1)], splits)
            found, names = hash_in_parts(records, kind, max_pixels, pool), [record.key for record in records]
        elif is_packed(Path(name)):
            shards = ShardSet(name)
            found = np.concatenate([*hash_shards(shards, kind, max_pixels, pool).parts])
            names = [shards.key(sample) for sample in range(len(shards))]
        else:
            records = imagefolder(name)
            found, names = hash_in_parts(records, kind, max_pixels, pool), [record.key for record in records]
        check_readable(name, names, found)
        rows.append(found)
        keys += names
        origin += [Path(name).name] * len(names)
    return EvaluationImages(keys, origin, HashColumns.of_rows(np.concatenate(rows)), distance)


def read_annotated(path: Path, images: str, splits: Sequence[str]) -> list[Record]:
    """Returns the records of the given splits, or all records if the file has no splits."""
    records = csv(path, images) if path.suffix.lower() == ".csv" else karpathy(path, images)
    known = {record.split for record in records}
    if known == {None} or ALL_SPLITS in splits:
        return records
    kept = [record for record in records if record.split in splits]
    if not kept:
        raise ValueError(
            f"{path} has no record of the split {' or '.join(splits)}: set --exclude-split to one of "
            f"{', '.join(sorted(map(str, known)))}, or to all"
        )
    return kept


def is_packed(path: Path) -> bool:
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def hash_in_parts(records: Sequence[Record], kind: np.dtype, max_pixels: int, pool: WorkerPool) -> NDArray:
    """Returns the hashes of the records, shape (len(records),)."""
    starts = range(0, len(records), PART // 10)
    jobs = ((first, records[first : first + PART // 10], kind, max_pixels) for first in starts)
    found: dict[int, NDArray] = {}
    with Progress(len(records), "hash evaluation images", "img") as progress:
        for first, rows in pool.run(hash_numbered_part, jobs, len(starts)):
            found[first] = rows
            progress.update(len(rows))
    return np.concatenate([found[first] for first in starts])


def hash_numbered_part(first: int, records: Sequence[Record], kind: np.dtype, max_pixels: int) -> tuple[int, NDArray]:
    return first, hash_in_memory(records, kind, max_pixels)


def check_readable(name: str, keys: Sequence[str], rows: NDArray) -> None:
    """Raises ValueError if an image cannot be read, because pack could not exclude it."""
    unreadable = np.nonzero(~rows["readable"])[0]
    if len(unreadable):
        some = ", ".join(keys[place] for place in unreadable[:NAMED])
        raise ValueError(
            f"{len(unreadable)} of the {len(rows)} evaluation images of {name} cannot be read, so pack cannot exclude "
            f"them: {some}{', ...' if len(unreadable) > NAMED else ''}. Is the image folder right?"
        )


def find_leaks(training: HashColumns, evaluation: EvaluationImages) -> list[Leak]:
    """Returns a leak for each training image that shows an evaluation image: the closest match, in image order."""
    best: dict[int, Leak] = {}
    for leak in (*find_exact_leaks(training, evaluation), *find_near_leaks(training, evaluation)):
        known = best.get(leak.image)
        if known is None or leak_order(leak) < leak_order(known):
            best[leak.image] = leak
    return [best[image] for image in sorted(best)]


def leak_order(leak: Leak) -> tuple:
    """Returns the sort key of a leak: exact before near, then closest first. It is deterministic."""
    return leak.kind, leak.distance, -leak.correlation, leak.evaluated, leak.turn


def find_exact_leaks(training: HashColumns, evaluation: EvaluationImages) -> Iterator[Leak]:
    digests, first = np.unique(evaluation.hashes.sha256, return_index=True)
    place = np.searchsorted(digests, training.sha256).clip(max=len(digests) - 1)
    for image in np.nonzero(training.readable & (digests[place] == training.sha256))[0].tolist():
        yield Leak(image, int(first[place[image]]), "exact")


def find_near_leaks(training: HashColumns, evaluation: EvaluationImages) -> Iterator[Leak]:
    if evaluation.distance is None:
        return
    evaluated = np.nonzero(evaluation.hashes.textured)[0]
    images = np.nonzero(training.readable & training.textured)[0]
    hashes = evaluation.hashes.hash[evaluated]
    for i, j, bits in near_pairs(hashes.reshape(-1), training.hash[images], evaluation.distance):
        left, turn, right = evaluated[i // len(SYMMETRIES)], i % len(SYMMETRIES), images[j]
        likeness = correlation(turn_thumbnails(evaluation.hashes.thumbnails(left), turn), training.thumbnails(right))
        for place in np.nonzero(likeness >= MIN_CORRELATION)[0].tolist():
            yield Leak(
                int(right[place]), int(left[place]), "near", int(bits[place]), float(likeness[place]), int(turn[place])
            )


def turn_thumbnails(thumbnails: NDArray[np.uint8], turn: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns the thumbnails (n, 16, 16), each transformed by SYMMETRIES entry number ``turn``."""
    result = np.empty_like(thumbnails)
    for number, function in enumerate(SYMMETRIES.values()):
        result[turn == number] = function(thumbnails[turn == number])
    return result


def leak_rows(keys: Mapping[int, str], leaks: Iterable[Leak], evaluation: EvaluationImages) -> list[dict[str, Any]]:
    """Returns the lines of excluded.jsonl; ``keys`` maps training image numbers to keys."""
    return [
        {
            "key": keys[leak.image],
            "evaluation": evaluation.keys[leak.evaluated],
            "from": evaluation.origin[leak.evaluated],
            "kind": leak.kind,
            "distance": leak.distance,
            "correlation": round(leak.correlation, 3),
            "transformation": list(SYMMETRIES)[leak.turn],
        }
        for leak in leaks
    ]


def count_leaks(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(row["kind"] for row in rows).items()))


def find_leaks_in_shards(
    shards: ShardSet, evaluation: EvaluationImages, max_pixels: int, pool: WorkerPool
) -> tuple[list[dict[str, Any]], int]:
    """Returns the leaks of packed shards, as lines of excluded.jsonl, and the number of unreadable samples."""
    training = hash_shards(shards, evaluation.kind, max_pixels, pool)
    leaks = find_leaks(training, evaluation)
    keys = {leak.image: shards.key(leak.image) for leak in leaks}
    return leak_rows(keys, leaks, evaluation), int((~training.readable).sum())
