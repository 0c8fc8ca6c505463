"""Evaluation images that are in the training data, as they are or re-encoded, resized, turned or mirrored.

    pack ... --exclude dataset_rsitmd.json --exclude-images RSITMD/images     leaves them out
    leakage --shards data/train --exclude dataset_rsitmd.json ...             says whether there are any

    {"key": "p/0413", "evaluation": "airport_12", "from": "dataset_rsitmd.json", "kind": "near", "distance": 4,
     "correlation": 0.993, "transformation": "rotated by 90 degrees"}

An image of the evaluation is compared with every training image in all eight orientations, see fingerprint.py.
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

from priorclip.data_shards.dedupe.hash_columns import PART, Prints, prints_in_memory, prints_of_shards
from priorclip.data_shards.dedupe.image_hashes import EXACT, LOOK, MIN_CORRELATION, SYMMETRIC, SYMMETRIES, correlation
from priorclip.data_shards.dedupe.near_hashes import near_pairs
from priorclip.data_shards.pack.packers import Crew
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources import Record, csv, imagefolder, karpathy

DEFAULT_DISTANCE = 8  # of 64 bits
ALL_SPLITS = "all"
NAMED = 3  # unreadable images that an error names


@dataclass(frozen=True)
class Evaluation:
    """The images to keep out: ``keys`` and the set that each is ``origin`` from, their fingerprints, the distance up
    to which an image is the same (None: equal bytes only)."""

    keys: list[str]
    origin: list[str]
    prints: Prints
    distance: int | None

    @property
    def digest(self) -> str:
        """Changes with any of the images, and with how they are compared."""
        return hashlib.sha256(self.prints.sha256.tobytes() + repr(self.distance).encode()).hexdigest()

    @property
    def kind(self) -> np.dtype:
        """What is needed of the images that are compared with these."""
        return EXACT if self.distance is None else LOOK


@dataclass(frozen=True)
class Leak:
    """Training image ``image`` is the evaluation's image ``evaluated``; ``turn`` is its place in SYMMETRIES."""

    image: int
    evaluated: int
    kind: str
    distance: int = 0
    correlation: float = 1.0
    turn: int = 0


def read_evaluation(
    sets: Sequence[str],
    folders: Sequence[str],
    splits: Sequence[str],
    distance: int | None,
    max_pixels: int,
    team: Crew,
) -> Evaluation:
    """Fingerprints of evaluation sets.

    Args:
        sets: Karpathy JSON or CSV files, folders of images, folders or tars of packed shards
        folders: image folder of each JSON and CSV, or one for all
        splits: splits that are taken of a JSON or CSV that has splits; "all" takes all
        distance: bits of 64 up to which two images are the same; None compares bytes only
        max_pixels: larger images are refused
        team: takes the fingerprints

    Raises:
        ValueError: a set needs a folder, or has an image that cannot be read, or none at all
    """
    keys: list[str] = []
    origin: list[str] = []
    rows: list[NDArray] = []
    annotated = [name for name in sets if Path(name).suffix.lower() in (".json", ".csv")]
    if annotated and len(folders) not in (1, len(annotated)):
        raise ValueError(
            f"--exclude {','.join(annotated)} needs --exclude-images: the folder of their images, one for all or one "
            f"each, not {len(folders)}"
        )
    if not sets:
        raise ValueError("--exclude names no set of evaluation images")
    kind = EXACT if distance is None else SYMMETRIC
    for name in sets:
        if name in annotated:
            place = annotated.index(name)
            records = annotated_records(Path(name), folders[min(place, len(folders) - 1)], splits)
            found, names = prints_in_parts(records, kind, max_pixels, team), [record.key for record in records]
        elif is_packed(Path(name)):
            shards = ShardSet(name)
            found = np.concatenate([*prints_of_shards(shards, kind, max_pixels, team).parts])
            names = [shards.key(sample) for sample in range(len(shards))]
        else:
            records = imagefolder(name)
            found, names = prints_in_parts(records, kind, max_pixels, team), [record.key for record in records]
        complain(name, names, found)
        rows.append(found)
        keys += names
        origin += [Path(name).name] * len(names)
    return Evaluation(keys, origin, Prints.of_rows(np.concatenate(rows)), distance)


def annotated_records(path: Path, images: str, splits: Sequence[str]) -> list[Record]:
    """Records of the splits wanted; of a file without splits all."""
    records = csv(path, images) if path.suffix.lower() == ".csv" else karpathy(path, images)
    known = {record.split for record in records}
    if known == {None} or ALL_SPLITS in splits:
        return records
    kept = [record for record in records if record.split in splits]
    if not kept:
        raise ValueError(
            f"{path} has no record of the split {' or '.join(splits)}: choose by --exclude-split from "
            f"{', '.join(sorted(map(str, known)))}, or all"
        )
    return kept


def is_packed(path: Path) -> bool:
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def prints_in_parts(records: Sequence[Record], kind: np.dtype, max_pixels: int, team: Crew) -> NDArray:
    """Fingerprints of the records, (len(records),)."""
    starts = range(0, len(records), PART // 10)
    jobs = ((first, records[first : first + PART // 10], kind, max_pixels) for first in starts)
    found = dict(team.run(numbered_prints, jobs, len(starts)))
    return np.concatenate([found[first] for first in starts])


def numbered_prints(first: int, records: Sequence[Record], kind: np.dtype, max_pixels: int) -> tuple[int, NDArray]:
    return first, prints_in_memory(records, kind, max_pixels)


def complain(name: str, keys: Sequence[str], rows: NDArray) -> None:
    """ValueError where an image could not be read: it could not be kept out of the training data."""
    unreadable = np.nonzero(~rows["readable"])[0]
    if len(unreadable):
        some = ", ".join(keys[place] for place in unreadable[:NAMED])
        raise ValueError(
            f"{len(unreadable)} of the {len(rows)} evaluation images of {name} cannot be read, so that nothing can be "
            f"compared with them: {some}{', ...' if len(unreadable) > NAMED else ''}. Is the image folder right?"
        )


def find_leaks(prints: Prints, evaluation: Evaluation) -> list[Leak]:
    """The images that are one of the evaluation, in their order, each with what it is most like."""
    best: dict[int, Leak] = {}
    for leak in (*exact_leaks(prints, evaluation), *near_leaks(prints, evaluation)):
        known = best.get(leak.image)
        if known is None or rank(leak) < rank(known):
            best[leak.image] = leak
    return [best[image] for image in sorted(best)]


def rank(leak: Leak) -> tuple:
    """Order of the reasons to leave an image out: the plainest first; never a matter of chance."""
    return leak.kind, leak.distance, -leak.correlation, leak.evaluated, leak.turn


def exact_leaks(prints: Prints, evaluation: Evaluation) -> Iterator[Leak]:
    digests, first = np.unique(evaluation.prints.sha256, return_index=True)
    place = np.searchsorted(digests, prints.sha256).clip(max=len(digests) - 1)
    for image in np.nonzero(prints.readable & (digests[place] == prints.sha256))[0].tolist():
        yield Leak(image, int(first[place[image]]), "exact")


def near_leaks(prints: Prints, evaluation: Evaluation) -> Iterator[Leak]:
    if evaluation.distance is None:
        return
    evaluated = np.nonzero(evaluation.prints.textured)[0]
    images = np.nonzero(prints.readable & prints.textured)[0]
    hashes = evaluation.prints.hash[evaluated]
    for i, j, bits in near_pairs(hashes.reshape(-1), prints.hash[images], evaluation.distance):
        left, turn, right = evaluated[i // len(SYMMETRIES)], i % len(SYMMETRIES), images[j]
        likeness = correlation(turned(evaluation.prints.thumbs(left), turn), prints.thumbs(right))
        for place in np.nonzero(likeness >= MIN_CORRELATION)[0].tolist():
            yield Leak(
                int(right[place]), int(left[place]), "near", int(bits[place]), float(likeness[place]), int(turn[place])
            )


def turned(thumbs: NDArray[np.uint8], turn: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Thumbnails (n, 16, 16), each turned as its entry of ``turn`` says."""
    result = np.empty_like(thumbs)
    for number, function in enumerate(SYMMETRIES.values()):
        result[turn == number] = function(thumbs[turn == number])
    return result


def rows_of_leaks(keys: Mapping[int, str], leaks: Iterable[Leak], evaluation: Evaluation) -> list[dict[str, Any]]:
    """Lines of excluded.jsonl; ``keys`` are those of the training images."""
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


def leaks_of_shards(
    shards: ShardSet, evaluation: Evaluation, max_pixels: int, team: Crew
) -> tuple[list[dict[str, Any]], int]:
    """(lines of excluded.jsonl for the samples that are evaluation images, samples that could not be read)."""
    prints = prints_of_shards(shards, evaluation.kind, max_pixels, team)
    leaks = find_leaks(prints, evaluation)
    keys = {leak.image: shards.key(leak.image) for leak in leaks}
    return rows_of_leaks(keys, leaks, evaluation), int((~prints.readable).sum())
