"""An index of image embeddings: what ``search`` and ``serve`` read.

    INDEX/index.json              format, model and its SHA-256, data, number of images, width
          embeddings.safetensors  "embeddings" (N, d) float16 or float32, L2-normalised
          images.jsonl            a line an image: {"key", "label", "path"} or {"key", "label", "shard", "sample"}

    index = EmbeddingIndex.load("runs/index")
    scores, rows = index.nearest(encoder.text("a river"), k=10)
    index.entry(rows[0]), index.read_image(rows[0])

Embeddings and lines are mapped, not loaded: an index of millions of images opens at once. Scores are exact: every
embedding is compared, a chunk at a time. The folder is written aside and renamed into place.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from priorclip.common.files import folder_aside, sha256_of
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.shards import ShardSet
from priorclip.retrieval.commands import IndexConfig
from priorclip.retrieval.encoder import EncodedImages, Encoder, find_skip_reasons
from priorclip.retrieval.gallery import Gallery, open_gallery, refuse_too_many

log = logging.getLogger(__name__)

FORMAT, VERSION = "priorclip-image-index", 1
ABOUT, EMBEDDINGS, IMAGES = "index.json", "embeddings.safetensors", "images.jsonl"
CHUNK = 1 << 18  # embeddings compared at once: 512 MiB of float32 at 512 values each


class EmbeddingIndex:
    """An index in a folder.

    Attributes:
        folder: where it lies
        about: what index.json says
        embeddings: (N, d), mapped from the file
    """

    def __init__(self, folder: Path, about: dict[str, Any], embeddings: Tensor, lines: bytes | mmap.mmap) -> None:
        self.folder, self.about, self.embeddings, self._lines = folder, about, embeddings, lines
        self._ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))

    @classmethod
    def load(cls, folder: str | Path) -> EmbeddingIndex:
        """Open an index. Raises FileNotFoundError or ValueError that names the file which is missing or damaged."""
        folder = Path(folder)
        for name in (ABOUT, EMBEDDINGS, IMAGES):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} is no image index: it has no {name}; make one with `retrieval index`"
                )
        about = read_about(folder)
        try:
            embeddings = load_file(folder / EMBEDDINGS)["embeddings"]
        except Exception as error:  # safetensors' own error is no subclass of ValueError
            raise ValueError(f"{folder / EMBEDDINGS} cannot be read: {error}") from error
        with open(folder / IMAGES, "rb") as handle:
            lines = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(handle.fileno()).st_size else b""
        index = cls(folder, about, embeddings, lines)
        if not len(embeddings) == len(index._ends) == about["images"] or embeddings.shape[1] != about["width"]:
            raise ValueError(
                f"{folder} is damaged: index.json speaks of {about['images']} images of width {about['width']}, there "
                f"are embeddings {tuple(embeddings.shape)} and {len(index._ends)} lines; make it anew"
            )
        return index

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def model(self) -> str:
        """Export folder of the model that made the index."""
        return self.about["model"]

    def entry(self, row: int) -> dict[str, Any]:
        """``key``, ``label`` and the place of an image. Raises IndexError outside the index."""
        if not 0 <= row < len(self):
            raise IndexError(f"image {row} is outside the {len(self)} of {self.folder}")
        start = int(self._ends[row - 1]) + 1 if row else 0
        return json.loads(self._lines[start : int(self._ends[row])])

    def nearest(self, query: Tensor, k: int) -> tuple[list[float], list[int]]:
        """Cosine similarities and rows of the k embeddings most like ``query`` (d,), best first; ties by row.

        Raises ValueError where the query has another width.
        """
        if query.shape != self.embeddings.shape[1:]:
            raise ValueError(
                f"the query has {query.numel()} values, the embeddings in {self.folder} {self.embeddings.shape[1]}: "
                f"they are of different models"
            )
        best: list[tuple[float, int]] = []
        for start in range(0, len(self), CHUNK):
            scores = (self.embeddings[start : start + CHUNK].float() @ query.float()).clamp(-1, 1)  # float16 rounds
            values, rows = scores.topk(min(k, len(scores)))
            best += zip((-values).tolist(), (rows + start).tolist(), strict=True)
            best = sorted(best)[:k]
        return [-score for score, _ in best], [row for _, row in best]

    def read_image(self, row: int) -> bytes:
        """Encoded bytes of an image, from where it lay when the index was made.

        Raises:
            OSError, BadSample: it is not there any more, or another image is in its place
        """
        entry = self.entry(row)
        if "path" in entry:
            return Path(entry["path"]).read_bytes()
        sample = open_shard(entry["shard"]).read(entry["sample"])
        if sample.key != entry["key"]:
            raise BadSample("shard has changed", f"{entry['shard']} holds {sample.key} in place of {entry['key']}")
        return sample.image


@lru_cache(maxsize=256)
def open_shard(path: str) -> ShardSet:
    return ShardSet([path])


def read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        known = about["format"] == FORMAT and about["version"] == VERSION and "model" in about
        about["images"], about["width"] = int(about["images"]), int(about["width"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ABOUT} does not describe an image index: {error}") from error
    if not known:
        raise ValueError(f"{folder / ABOUT} is of another version: make the index anew with `retrieval index`")
    return about


def build_index(config: IndexConfig) -> EmbeddingIndex:
    """Encode the gallery's images and write the index folder; images that cannot be used are left out and logged.

    Raises:
        FileExistsError: the output folder is there, without ``overwrite`` or not an index
        OSError, ValueError: bad input; the message names the file or key
    """
    output = Path(config.output)
    refuse_existing(output, config.overwrite)
    gallery = open_gallery(config.data, config.images, config.split, config.limit)
    encoder = Encoder.load(config.model, config.device, config.precision)
    batches = encoder.batches(gallery, config)
    images = encoder.images(batches, getattr(torch, config.dtype))
    skipped = find_skip_reasons(gallery, images.usable, encoder.image_size, config.max_pixels)
    refuse_too_many(skipped, len(gallery.source), config.max_bad_share)
    features = images.features[images.usable] if skipped else images.features
    about = {
        "format": FORMAT,
        "version": VERSION,
        "images": len(features),
        "width": features.shape[1],
        "model": str(Path(config.model).resolve()),
        "model_sha256": model_hash(Path(config.model)),
        "data": config.data,
        "split": gallery.split,
        "dtype": config.dtype,
        "skipped": skipped,
    }
    write_folder(output, about, features, image_entries(gallery, images, batches.classes))
    return EmbeddingIndex.load(output)


def refuse_existing(output: Path, overwrite: bool) -> None:
    """A folder that is no index is never replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / ABOUT).is_file() or not (output / EMBEDDINGS).is_file():
        raise FileExistsError(f"--output {output} exists and is no image index: name a new folder")
    if not overwrite:
        raise FileExistsError(f"--output {output} holds an index: name another folder, or replace it by --overwrite")


def write_folder(output: Path, about: dict[str, Any], embeddings: Tensor, entries: Iterable[dict[str, Any]]) -> None:
    """Write the three files aside, fsync, and rename the folder into place."""
    with folder_aside(output) as aside:
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (aside / ABOUT).write_text(text, encoding="utf-8", errors="backslashreplace")
        save_file({"embeddings": embeddings.contiguous()}, aside / EMBEDDINGS)
        with open(aside / IMAGES, "w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(entry) + "\n" for entry in entries)


def image_entries(gallery: Gallery, images: EncodedImages, classes: list[str]) -> Iterator[dict[str, Any]]:
    """Key, scene and place of each image that can be used."""
    for sample in images.usable.nonzero().flatten().tolist():
        label = int(images.labels[sample])
        scene = classes[label] if label >= 0 else None
        yield {"key": gallery.source.name(sample)[1], "label": scene, **gallery.location(sample)}


def model_hash(folder: Path) -> str:
    """SHA-256 of an export folder's weights: embeddings of other weights do not compare."""
    return sha256_of(folder / "model.safetensors")
