"""Finds the same picture twice in one pack, by its bytes or its perceptual hash, and drops or merges the second.

    r0 dock.jpg   "a dock"      r1 copy.jpg  "boats"      r2 dock_q50.jpg  "a pier"
    --duplicates drop                       r0 "a dock"                      r2 "a pier"
    --duplicates merge                      r0 "a dock", "boats"             r2 "a pier"
    --duplicates merge --near-duplicates 6  r0 "a dock", "boats", "a pier"

The first record of each picture stays, so that the result does not depend on the number of processes. A near duplicate
is close to a record that stays: if a is near b and b is near c, but a is not near c, then a and c stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from priorclip.common.output import get_logger
from priorclip.data_shards.dedupe.hash_columns import HashColumns
from priorclip.data_shards.dedupe.image_hashes import MIN_CORRELATION, correlation
from priorclip.data_shards.dedupe.near_hashes import near_pairs
from priorclip.data_shards.format.class_names import normalized
from priorclip.data_shards.format.sample import BadSample, captions_of
from priorclip.data_shards.sources import Place, Record, load

log = get_logger(__name__)

MODES = ("keep", "drop", "merge")
CAPTION_FIELDS = ("coarse_captions",)  # lists of texts in Record.extra, merged like the captions


@dataclass(frozen=True)
class Duplicate:
    """Record number ``image`` shows the same picture as record ``kept``, which stays; ``distance`` counts hash bits."""

    image: int
    kept: int
    kind: str
    distance: int


def find_duplicates(hashes: HashColumns, distance: int | None, candidates: NDArray[np.bool_]) -> list[Duplicate]:
    """Returns the duplicates among the candidates, in record order. Without a distance only exact ones count."""
    images = np.nonzero(candidates & hashes.readable)[0]
    _, first, inverse = np.unique(hashes.sha256[images], return_index=True, return_inverse=True)
    same = dict(zip(images.tolist(), images[first[inverse]].tolist(), strict=True))
    near = find_near_duplicates(hashes, images[np.unique(first)], distance) if distance is not None else {}
    found = []
    for image, original in same.items():
        kept, bits = near.get(original, (original, 0))
        if kept != image:
            found.append(Duplicate(image, kept, "exact" if kept == original else "near", bits))
    return found


def find_near_duplicates(hashes: HashColumns, images: NDArray[np.int64], distance: int) -> dict[int, tuple[int, int]]:
    """Maps each near duplicate to (first near image that stays, number of different hash bits)."""
    images = images[hashes.textured[images]]
    parts = list(confirm_pairs(hashes, images, distance))
    left, right, bits = (np.concatenate(column) for column in zip(*parts, strict=True)) if parts else ((), (), ())
    order = np.lexsort((left, right)) if parts else ()
    gone: dict[int, tuple[int, int]] = {}
    for place in order:
        earlier, later = int(left[place]), int(right[place])
        if earlier not in gone and later not in gone:
            gone[later] = earlier, int(bits[place])
    return gone


def confirm_pairs(
    hashes: HashColumns, images: NDArray[np.int64], distance: int
) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    for i, j, bits in near_pairs(hashes.hash[images], None, distance):
        left, right = images[i], images[j]
        same = correlation(hashes.thumbnails(left), hashes.thumbnails(right)) >= MIN_CORRELATION
        yield left[same], right[same], bits[same]


def duplicate_rows(records: Sequence[Record], found: Sequence[Duplicate], merged: bool) -> list[dict[str, Any]]:
    """Returns the lines of duplicates.jsonl. If the labels of the two records differ, the line has both.

    If records are merged, a record without labels gets those of its first duplicate with labels.
    """
    rows = []
    inherited: dict[int, Record] = {}
    for item in found:
        gone, kept = records[item.image], records[item.kept]
        row: dict[str, Any] = {"key": gone.key, "kept": kept.key, "kind": item.kind, "distance": item.distance}
        if merged and gone.scenes and not kept.scenes:
            kept = inherited.setdefault(item.kept, gone)
        if gone.scenes and kept.scenes and {*map(normalized, gone.scenes)} != {*map(normalized, kept.scenes)}:
            several = "labels" in gone.extra or "labels" in kept.extra
            row |= (
                {"labels": gone.scenes, "kept_labels": kept.scenes}
                if several
                else {"label": gone.label, "kept_label": kept.label}
            )
        rows.append(row)
    return rows


def count_duplicates(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Counts duplicates by kind, and those whose labels differ from the record that stays."""
    counts = Counter(row["kind"] for row in rows)
    counts["label_conflicts"] = sum("label" in row or "labels" in row for row in rows)
    return dict(sorted(counts.items()))


def merge_duplicates(records: Sequence[Record], found: Sequence[Duplicate]) -> list[Record]:
    """Returns all records, in which those that stay have the captions of their duplicates. The input is not changed."""
    gone: dict[int, list[Record]] = {}
    for item in found:
        gone.setdefault(item.kept, []).append(records[item.image])
    merged = list(records)
    for kept, others in gone.items():
        merged[kept] = replace(records[kept], image=MergedPlace(records[kept].image, tuple(others)))
    return merged


@dataclass(frozen=True, slots=True)
class MergedPlace:
    """The place of an image with duplicates: ``image`` is its own place, the records ``gone`` are merged into it.

    The merge happens when the record is read, because some places know the captions only then.
    """

    image: Path | Place | bytes
    gone: tuple[Record, ...]

    def load(self, record: Record) -> Record:
        found = load(replace(record, image=self.image))
        for gone in self.gone:
            try:
                found = merge_texts(found, load(gone))
            except BadSample as error:
                log.warning("%s, a duplicate of %s, can no longer be read: %s", gone.key, record.key, error)
                found = merge_texts(found, gone)
        return found


def merge_texts(kept: Record, gone: Record) -> Record:
    """Returns ``kept`` with the captions of ``gone`` added, and with the labels of ``gone`` if it has none."""
    extra = dict(kept.extra)
    for name in CAPTION_FIELDS:
        if texts := [*captions_of(kept.extra, name), *captions_of(gone.extra, name)]:
            extra[name] = list(dict.fromkeys(texts))
    label = kept.label
    if not kept.scenes:
        label = gone.label
        extra |= {"labels": gone.extra["labels"]} if "labels" in gone.extra else {}
    return replace(kept, captions=list(dict.fromkeys([*kept.captions, *gone.captions])), label=label, extra=extra)
