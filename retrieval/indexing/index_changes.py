"""Adds images to an index, and removes some, without encoding the others again.

    add_images(AddConfig(index="runs/index", data="shards/new"))         # (120 added, 3 there already)
    remove_images(RemoveConfig(index="runs/index", scene="T32/*"))       # 57 removed

An image is there already if the index names its place: its file, or its tar and row. Its key may occur twice, because
two sets can use one name. Images keep their order, and new ones come last.

The new index is written beside the old one, which it then replaces. A search or server that has the old one open goes
on with it. One command at a time changes an index.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from priorclip.common.masking import masked
from priorclip.common.progress import counted
from priorclip.retrieval.commands import AddConfig, RemoveConfig
from priorclip.retrieval.embedding_index import EmbeddingIndex, encode_entries, require_index, write_folder
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.gallery import merge_skipped, open_gallery
from priorclip.retrieval.indexing.index_lock import changing
from priorclip.retrieval.places import Within
from priorclip.retrieval.search import format_location, require_own_model

MOST = 2000  # characters of the names of the data in index.json


def add_images(config: AddConfig) -> tuple[int, int]:
    """Encodes the gallery's images that the index does not have, and adds them.

    Returns:
        how many were added, and how many were there already
    Raises:
        BlockingIOError: another command changes the index
        OSError, ValueError: bad input, or a model that did not make the index; the message names the file or key
    """
    require_index(Path(config.index))
    with changing(Path(config.index)) as folder:
        index = EmbeddingIndex.load(folder)
        gallery = open_gallery(config.data, config.images, config.split, config.limit)
        encoder = Encoder.load(config.model or index.find_model(), config.device, config.precision)
        require_own_model(index, encoder)
        known = {format_location(entry) for entry in entries_of(index)}
        new = [place for place in range(len(gallery.source)) if format_location(gallery.location(place)) not in known]
        there = len(gallery.source) - len(new)
        if not new:
            return 0, there
        features, entries, skipped = encode_entries(config, encoder, gallery.keep(new), index.embeddings.dtype)
        about = index.about | {
            "images": len(index) + len(features),
            "data": names_of_data(index.about["data"], masked(config.data)),
            "skipped": merge_skipped(index.about.get("skipped", {}), skipped),
        }
        write_folder(folder, about, torch.cat([index.embeddings, features]), chain(entries_of(index), entries))
        return len(features), there


def remove_images(config: RemoveConfig) -> int:
    """Removes the images that meet all conditions, and returns their number.

    Raises:
        BlockingIOError: another command changes the index
        ValueError: no image meets them, or all do; or the index has no places for ``bbox``, ``time``, ``scene``
    """
    within = Within.parse(config.bbox, config.time, config.scene)
    require_index(Path(config.index))
    with changing(Path(config.index)) as folder:
        index = EmbeddingIndex.load(folder)
        gone = np.ones(len(index), bool)
        if within is not None:
            gone = np.isin(np.arange(len(index)), within.rows(index.columns))
        if config.image_keys:
            for row in np.flatnonzero(gone).tolist():
                key = index.entry(row)["key"]
                gone[row] = any(fnmatchcase(key, pattern) for pattern in config.image_keys)
        if not gone.any():
            raise ValueError(f"no image of the index {folder} is meant: see its keys with `retrieval search`")
        if gone.all():
            raise ValueError(f"all {len(index)} images of the index {folder} are meant: remove the folder instead")
        kept = np.flatnonzero(~gone)
        about = index.about | {"images": len(kept)}
        write_folder(
            folder, about, index.embeddings[torch.from_numpy(kept)], (index.entry(row) for row in kept.tolist())
        )
        return int(gone.sum())


def entries_of(index: EmbeddingIndex) -> Iterator[dict[str, Any]]:
    """Yields key, label and place of each image of an index."""
    return (index.entry(row) for row in counted(range(len(index)), "index entries", "image"))


def names_of_data(old: str, new: str) -> str:
    """Returns what the index was made of, for people: ``shards/a, shards/b``."""
    return old if new in old.split(", ") or len(old) + len(new) > MOST else f"{old}, {new}"
