"""Ranks the images of an index by their similarity to a text, an image, or one of its own images."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from priorclip.data_shards.format.place import COLUMNS
from priorclip.retrieval.embedding_index import EmbeddingIndex
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.identity import model_hash
from priorclip.retrieval.image_gate import ImageGate
from priorclip.retrieval.places import Within

TOGETHER = 32  # texts that the model encodes at once, before others may use it


@dataclass(frozen=True)
class Hit:
    """One result.

    Args:
        rank: 1 for the best
        score: cosine similarity, -1 to 1
        row: row of the image in the index
        key: key of the sample
        label: scene class or None
        where: file, or tar and row
        caption: first caption of an image with a place or kept columns, or None
        place: scene, window, footprint, gsd, acquired, as far as they are known
        columns: what the image's row of a table had in the columns that `data_shards pack --keep-columns` named
    """

    rank: int
    score: float
    row: int
    key: str
    label: str | None
    where: str
    caption: str | None = None
    place: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)


class Searcher:
    """An index with the model that made it. Several threads may call it.

    Raises:
        ValueError: the model is not the one that made the index
    """

    def __init__(self, index: EmbeddingIndex, encoder: Encoder) -> None:
        require_own_model(index, encoder)
        self.index, self.encoder = index, encoder
        self.gate = ImageGate()
        self._lock = threading.Lock()  # of the model; images are decoded and embeddings are compared outside of it

    def by_text(self, text: str, k: int, within: Within | None = None, exact: bool = False) -> list[Hit]:
        """Returns the k images most similar to a text, within the limits.

        ``exact`` compares all images, also if the index has an approximate part. Raises ValueError for a blank text,
        and for limits if the index has no places.
        """
        with self._lock:
            query = self.encoder.text(text)
        return self._hits(query, k, within, exact)

    def by_texts(
        self, texts: Sequence[str], k: int, within: Within | None = None, exact: bool = False
    ) -> Iterator[list[Hit]]:
        """Yields as ``by_text`` for each text. The model encodes some texts at a time. Raises as ``by_text``."""
        rows = None if within is None else within.rows(self.index.columns)
        for start in range(0, len(texts), TOGETHER):
            with self._lock:
                queries = self.encoder.embed_texts(texts[start : start + TOGETHER])
            for query in queries:
                yield self._hits_among(query, k, rows, exact)

    def by_image(self, data: bytes, k: int, within: Within | None = None, exact: bool = False) -> list[Hit]:
        """Returns the k images most similar to an encoded image. Raises BadSample if it cannot be read."""
        with self.gate.reading(lambda: data):
            pixels = self.encoder.decode(data)
        with self._lock:
            query = self.encoder.feature(pixels)
        return self._hits(query, k, within, exact)

    def by_row(self, row: int, k: int, within: Within | None = None, exact: bool = False) -> list[Hit]:
        """Returns the k images most similar to an image of the index, itself included. Raises IndexError."""
        self.index.entry(row)
        return self._hits(self.index.embeddings[row].float(), k, within, exact)

    def belief(self, row: int, side: int) -> Image.Image:
        """Returns the belief map of an image of the index over its centred square. Raises IndexError."""
        with self.image(row) as data:
            pixels, square = self.encoder.decode(data), self.encoder.decode(data, side)
        with self._lock:
            return self.encoder.belief(pixels, square)

    def image(self, row: int) -> AbstractContextManager[bytes]:
        """Yields the encoded bytes of an image of the index, as soon as there is room to decode it.

        Raises what ``EmbeddingIndex.read_image`` raises, and BadSample if it is no image or has too many pixels.
        """
        return self.gate.reading(lambda: self.index.read_image(row))

    def _hits(self, query: Tensor, k: int, within: Within | None, exact: bool) -> list[Hit]:
        return self._hits_among(query, k, None if within is None else within.rows(self.index.columns), exact)

    def _hits_among(self, query: Tensor, k: int, rows: NDArray[np.int64] | None, exact: bool) -> list[Hit]:
        found = zip(*self.index.nearest(query, k, rows, exact), strict=True)
        return [self._hit(rank, score, row) for rank, (score, row) in enumerate(found, 1)]

    def _hit(self, rank: int, score: float, row: int) -> Hit:
        entry = self.index.entry(row)
        told = entry.get("caption"), entry.get("place", {}), entry.get(COLUMNS, {})
        return Hit(rank, score, row, entry["key"], entry["label"], format_location(entry), *told)


def require_own_model(index: EmbeddingIndex, encoder: Encoder) -> None:
    """Raises ValueError if the encoder has other weights than the model that made the index."""
    if model_hash(encoder.folder) != index.about["model_sha256"]:
        raise ValueError(
            f"the index {index.folder} was made with other weights than those in {encoder.folder}: make it again "
            f"with `retrieval index`, or name the right model with --model"
        )


def format_location(entry: dict[str, Any]) -> str:
    """Returns ``/data/harbour_1.jpg``, or ``/data/test-000000.tar#17``."""
    return entry["path"] if "path" in entry else f"{entry['shard']}#{entry['sample']}"
