"""Adds images to an index, and removes some, without encoding the others again.

    add_images(AddConfig(index="runs/index", data="shards/new"))         # (120 added, 3 there already)
    remove_images(RemoveConfig(index="runs/index", scene="T32/*"))       # 57 removed
    make_approximate(ApproximateConfig(index="runs/index"))              # Cells, or None if they were removed

An image is there already if the index names its place: its file, or its tar and row. Its key may occur twice, because
two sets can use one name. Images keep their order, and new ones come last. The approximate part of an index gets the
new images and loses the others, and its recall is measured again; after a growth by half it is made anew.

The new index is written beside the old one, which it then replaces. A search or server that has the old one open goes
on with it. One command at a time changes an index.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from priorclip.common.masking import masked
from priorclip.common.progress import counted
from priorclip.retrieval.commands import AddConfig, ApproximateConfig, RemoveConfig
from priorclip.retrieval.embedding_index import EmbeddingIndex, encode_entries, require_index, write_cells, write_folder
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.gallery import merge_skipped, open_gallery
from priorclip.retrieval.indexing.cell_training import CAPTIONS, changed, evenly, make_cells, require_faiss
from priorclip.retrieval.indexing.cells import Cells
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
        embeddings = torch.cat([index.embeddings, features])
        cells = None if index.cells is None else changed(index.cells.with_rows(features), embeddings)
        write_folder(folder, about, embeddings, entries, cells, (index, np.arange(len(index))))
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
        if config.image_keys or config.shards:
            for row in np.flatnonzero(gone).tolist():
                gone[row] = is_meant(index.entry(row), config)
        if not gone.any():
            raise ValueError(f"no image of the index {folder} is meant: see its keys with `retrieval search`")
        if gone.all():
            raise ValueError(f"all {len(index)} images of the index {folder} are meant: remove the folder instead")
        kept = np.flatnonzero(~gone)
        about = index.about | {"images": len(kept)}
        embeddings = index.embeddings[torch.from_numpy(kept)]
        cells = None if index.cells is None else changed(index.cells.without_rows(kept), embeddings)
        write_folder(folder, about, embeddings, [], cells, (index, kept))
        return int(gone.sum())


def is_meant(entry: dict[str, Any], config: RemoveConfig) -> bool:
    """Tells whether an image has one of the keys, and is from one of the shards, as far as these are given."""
    shard = entry.get("shard", "")
    names = (shard, shard.rpartition("/")[2])
    is_key = any(fnmatchcase(entry["key"], pattern) for pattern in config.image_keys)
    is_shard = bool(shard) and any(fnmatchcase(name, pattern) for name in names for pattern in config.shards)
    return (is_key or not config.image_keys) and (is_shard or not config.shards)


def make_approximate(config: ApproximateConfig, texts: list[str] | None = None) -> Cells | None:
    """Makes the approximate part of an index anew from its embeddings, or removes it. A damaged one is replaced.

    Args:
        texts: measure the recall with these; None takes the texts of the part that is there, or noisy images

    Raises:
        BlockingIOError: another command changes the index
        ValueError: faiss is missing, or the model of ``texts`` did not make the index
    """
    require_index(Path(config.index))
    with changing(Path(config.index)) as folder:
        index = EmbeddingIndex.load(folder, exact=True)
        if config.remove:
            write_cells(folder, index.about, None)
            return None
        require_faiss("an approximate index")
        queries = None
        if texts is not None:
            encoder = Encoder.load(config.model or index.find_model(), config.device, config.precision)
            require_own_model(index, encoder)
            queries = encoder.embed_texts(evenly(texts))
        elif index.about.get("approximate", {}).get("queries") == CAPTIONS:
            with contextlib.suppress(ValueError):  # it is damaged, and so are its texts
                queries = Cells.load(folder, index.about["approximate"], *index.embeddings.shape).queries.float()
        cells = make_cells(index.embeddings, queries, CAPTIONS, config.recall)
        write_cells(folder, index.about, cells)
        return cells


def entries_of(index: EmbeddingIndex) -> Iterator[dict[str, Any]]:
    """Yields key, label and place of each image of an index."""
    return (index.entry(row) for row in counted(range(len(index)), "index entries", "image"))


def names_of_data(old: str, new: str) -> str:
    """Returns what the index was made of, for people: ``shards/a, shards/b``."""
    return old if new in old.split(", ") or len(old) + len(new) > MOST else f"{old}, {new}"
