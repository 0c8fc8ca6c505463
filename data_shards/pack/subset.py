"""Smaller training sets for scaling studies: fewer images, scenes or captions, and scenes of unequal size.

    --limit 1000                          the first 1,000 images of the shuffled order
    --scenes 5 --limit 1000               1,000 images of 5 scenes, 200 each
    --zipf 1 --limit 500                  500 images whose scenes have sizes as 1, 1/2, 1/3, ...
    --captions-kept 2                     two of each image's captions

Everything follows from --seed. With one seed, the smaller of two subsets lies in the larger one: its images with
--limit, its scenes with --scenes, its captions with --captions-kept. And the scene that is largest with --zipf is the
same for every exponent, so that only the sizes differ.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from priorclip.data_shards.order.hashing import hash_integers, permutation
from priorclip.data_shards.sources.record import Record

SCENE_ORDER, CAPTION_ORDER = 11, 12


def scenes_in_order(records: Sequence[Record], seed: int) -> list[str]:
    """Returns the scenes in the order in which subsets take them. Raises ValueError if an image has no known one."""
    bare = next((record for record in records if record.label is None), None)
    if bare is not None:
        raise ValueError(
            f"the scene of {bare.key} is not known, and a subset by scenes needs it of all: if packing finds it out, "
            "pack the images first, and take the subset of the shards with --source webdataset"
        )
    names = sorted({record.label for record in records if record.label is not None})
    return [names[place] for place in permutation(hash_integers(seed, SCENE_ORDER), len(names))]


def first_scenes(records: list[Record], count: int, seed: int) -> list[Record]:
    """Returns the images of the first ``count`` scenes. Raises ValueError if there are not so many."""
    names = scenes_in_order(records, seed)
    if not 1 <= count <= len(names):
        raise ValueError(f"--scenes must be between 1 and {len(names)}, the number of scenes, not {count}")
    kept = set(names[:count])
    return [record for record in records if record.label in kept]


def zipf_sizes(total: int, scenes: int, exponent: float) -> list[int]:
    """Returns the sizes of scenes, total r^-exponent / sum, rounded so that their sum is ``total``.

    Rounding gives the scenes with the largest remainder one more: exponent 0, total 10 -> [4, 3, 3] for 3 scenes.
    """
    weights = np.arange(1, scenes + 1, dtype=np.float64) ** -exponent
    exact = total * weights / weights.sum()
    sizes = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - sizes), kind="stable")
    sizes[order[: total - sizes.sum()]] += 1
    return [int(size) for size in sizes]


def keep_sizes(records: list[Record], total: int, exponent: float, seed: int) -> list[Record]:
    """Returns ``total`` images, the first ones of each scene, in their order. Exponent 0 balances the scenes.

    Raises:
        ValueError: a scene has fewer images than it needs, or would have none; the message says how many there can be
    """
    names = scenes_in_order(records, seed)
    sizes = zipf_sizes(total, len(names), exponent)
    there = Counter(record.label for record in records)
    for name, size in zip(names, sizes, strict=True):
        if not 1 <= size <= there[name]:
            raise ValueError(
                f"--limit {total} with --zipf {exponent:g} gives the scene {name!r} {size} images, and it has "
                f"{there[name]}: every scene needs 1 or more, so change --limit, or take another --seed"
            )
    left = dict(zip(names, sizes, strict=True))
    kept = []
    for record in records:
        assert record.label is not None
        if left[record.label]:
            left[record.label] -= 1
            kept.append(record)
    return kept


def keep_captions(records: Sequence[Record], count: int, seed: int) -> None:
    """Leaves each record ``count`` captions, drawn by its key, in their order; one that has fewer keeps them all.

    Raises ValueError if captions are not known before packing.
    """
    if count < 1:
        raise ValueError(f"--captions-kept must be at least 1, not {count}")
    if not any(record.captions for record in records):
        raise ValueError(
            "--captions-kept: no image has captions before it is packed: pack the images first, and take the subset of "
            "the shards with --source webdataset"
        )
    for record in records:
        key = int.from_bytes(hashlib.sha256(record.key.encode("utf-8", "surrogateescape")).digest()[:8], "little")
        drawn = permutation(hash_integers(seed, CAPTION_ORDER, key), len(record.captions))[:count]
        record.captions = [record.captions[place] for place in sorted(drawn.tolist())]
