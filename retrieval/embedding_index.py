"""An index of image embeddings, which ``search`` and ``serve`` read.

    INDEX/index.json              format, model and its SHA-256, data, number of images, width
          embeddings.safetensors  "embeddings" (N, d) float16 or float32, L2-normalised
          images.jsonl            a line an image: {"key", "label", "path"} or {"key", "label", "shard", "sample"},
                                  of a tile, or an image whose pack kept columns, also "place", "kept_columns"
                                  (data_shards/format/place.py) and "caption"
          places.safetensors      of these: where and when they are, to search in a part of them (places.py)
          cells.safetensors       of a large index: its approximate part (indexing/cells.py)

    index = EmbeddingIndex.load("runs/index")
    scores, rows = index.nearest(encoder.text("a river"), k=10)
    index.entry(rows[0]), index.read_image(rows[0])
    index.nearest(query, k=10, rows=Within.parse(bbox="8,48,9,49").rows(index.columns))

Embeddings and lines are memory-mapped, so an index of millions of images opens at once. A search compares every
embedding (nearest_rows.py), or, in an index with an approximate part, those of some cells; scores are exact in both.
The folder is written beside its place and then renamed. Somebody else may have written an index: image_places.py says
which files it may name.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from priorclip.common.files import folder_aside
from priorclip.common.masking import masked
from priorclip.common.output import get_logger
from priorclip.common.progress import counted
from priorclip.common.safe_paths import UnsafePath
from priorclip.common.untrusted_json import (
    check_object,
    list_of,
    map_of,
    null_or,
    parse_object,
    read_object,
    text,
    whole,
)
from priorclip.data_shards.format.place import COLUMNS, check_columns, check_place, columns_of_info, place_of_info
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.stream.batch_fetcher import prefetch_samples
from priorclip.data_shards.stream.evaluation_batches import READ_TOGETHER
from priorclip.model.encoders.weight_file import check_readable
from priorclip.retrieval.commands import IndexConfig
from priorclip.retrieval.encoder import EncodedImages, Encoder, find_skip_reasons
from priorclip.retrieval.gallery import Gallery, Skipped, open_gallery, refuse_too_many
from priorclip.retrieval.identity import model_hash
from priorclip.retrieval.image_places import ImagePlaces
from priorclip.retrieval.indexing.cell_training import CAPTIONS, QUERIES, evenly, make_cells, require_faiss
from priorclip.retrieval.indexing.cells import Cells, check_about
from priorclip.retrieval.indexing.index_lock import changing
from priorclip.retrieval.indexing.index_parts import IndexParts
from priorclip.retrieval.nearest_rows import nearest_of, nearest_rows
from priorclip.retrieval.places import PLACES, SCENES, PlaceColumns
from priorclip.retrieval.shared_encoding import is_first
from priorclip.retrieval.test_set_options import TestSetConfig

log = get_logger(__name__)


def told(check: Callable[[dict[str, Any]], None]) -> Callable[[Any, str], None]:
    """Returns a check of an object, whose errors name where it stands."""

    def call(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object")
        try:
            check(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    return call


FORMAT, VERSION = "priorclip-image-index", 1
ABOUT, EMBEDDINGS, IMAGES = "index.json", "embeddings.safetensors", "images.jsonl"
MAX_ABOUT, MAX_LINE = 1 << 26, 1 << 16  # bytes of index.json, and of a line of images.jsonl
KEPT = ("scene", "window", "footprint", "gsd", "acquired")  # of an image's place; the rest is in its KEY.json
MAX_CAPTION = 1000  # characters of a caption that an index keeps
KEY = {"key": text(MAX_LINE), "label": null_or(text(MAX_LINE))}
IN_FILE = {"path": text(MAX_LINE)}
IN_SHARD = {"shard": text(MAX_LINE), "sample": whole(1 << 40)}
TOLD = {"caption": null_or(text(MAX_LINE)), "place": told(check_place), COLUMNS: told(check_columns)}
VERSIONED = {"format": text(), "version": whole(1 << 31)}
ABOUT_FIELDS = {
    "images": whole(1 << 40),
    "width": whole(1 << 20),
    "model": text(),
    "model_sha256": text(64),
    "data": text(MAX_LINE),
    "skipped": map_of(list_of(text(MAX_LINE))),
    "approximate": check_about,
}
OPTIONAL = ("skipped", "approximate")


class EmbeddingIndex:
    """An index in a folder.

    Attributes:
        folder: its path
        about: the content of index.json
        embeddings: (N, d), mapped from the file
        places: the files that the index may name
        columns: where and when the images are; None if they have no place
        cells: the approximate part; None if the index has none, or only exact searches are wanted
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        embeddings: Tensor,
        lines: bytes | mmap.mmap,
        places: ImagePlaces | None = None,
        columns: PlaceColumns | None = None,
        cells: Cells | None = None,
    ) -> None:
        self.folder, self.about, self.embeddings, self._lines = folder, about, embeddings, lines
        self.places, self.columns, self.cells = places or ImagePlaces(folder), columns, cells
        self._ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))

    @classmethod
    def load(cls, folder: str | Path, data: Sequence[str] = (), exact: bool = False) -> EmbeddingIndex:
        """Opens an index. If it is replaced meanwhile, the result is the old one or the new one.

        Args:
            folder: that ``build_index`` wrote
            data: folders, files and shards whose images the index may show, besides those near it
            exact: do not read the approximate part, so that every search compares every embedding

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged; the message names it
        """
        folder = Path(folder)
        while True:  # another process may replace the folder between two of its files
            before = folder_state(folder)
            try:
                index = cls._read(folder, data, exact)
            except (OSError, ValueError):
                if folder_state(folder) == before:
                    raise
            else:
                if folder_state(folder) == before:
                    return index

    @classmethod
    def _read(cls, folder: Path, data: Sequence[str], exact: bool) -> EmbeddingIndex:
        require_index(folder)
        about = read_about(folder)
        check_readable(folder / EMBEDDINGS)
        try:
            embeddings = load_file(folder / EMBEDDINGS)["embeddings"]
        except Exception as error:  # safetensors' own error is no subclass of ValueError
            raise ValueError(f"{folder / EMBEDDINGS} cannot be read: {error}") from error
        with open(folder / IMAGES, "rb") as handle:
            lines = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(handle.fileno()).st_size else b""
        columns = PlaceColumns.load(folder, about["images"])
        index = cls(folder, about, embeddings, lines, ImagePlaces(folder, data), columns)
        if not len(embeddings) == len(index._ends) == about["images"] or embeddings.shape[1] != about["width"]:
            raise ValueError(
                f"{folder} is damaged: index.json has {about['images']} images of width {about['width']}, but the "
                f"embeddings have the shape {tuple(embeddings.shape)} and images.jsonl {len(index._ends)} lines. Make "
                f"the index again"
            )
        if "approximate" in about and not exact:
            index.cells = Cells.load(folder, about["approximate"], about["images"], about["width"])
        return index

    def __len__(self) -> int:
        return len(self.embeddings)

    def find_model(self) -> Path:
        """Returns the export folder that the index names: a local folder, never a hub id. Raises ValueError.

        It may lie anywhere, because loading an export runs no code and shows no file.
        """
        name = self.about["model"]
        with contextlib.suppress(UnsafePath):
            folder = self.places.resolve(name)
            if name.startswith("/") and folder.is_dir():
                return folder
        raise ValueError(f"the index {self.folder} names the model {name!r}, which is no folder here: give --model")

    def entry(self, row: int) -> dict[str, Any]:
        """Returns ``key``, ``label`` and the place of an image. Raises IndexError, and ValueError for a bad line."""
        if not 0 <= row < len(self):
            raise IndexError(f"image {row} is outside the {len(self)} of {self.folder}")
        return check_entry(self.line(row)[:MAX_LINE], f"{self.folder / IMAGES}, line {row + 1}")

    def line(self, row: int) -> bytes:
        """Returns what images.jsonl says of an image, as it is there."""
        start = int(self._ends[row - 1]) + 1 if row else 0
        return self._lines[start : int(self._ends[row])]

    def nearest(
        self, query: Tensor, k: int, rows: NDArray[np.int64] | None = None, exact: bool = False
    ) -> tuple[list[float], list[int]]:
        """Returns cosine similarities and rows of the k embeddings most similar to ``query`` (d,), best first.

        Equal scores are in the order of the rows. An index with an approximate part compares the rows of some cells,
        and may miss some of the best; within ``rows`` every row is compared. Raises ValueError if the query has another
        width.

        Args:
            query: (d,)
            k: number of results
            rows: compare only these rows, in ascending order; None compares all
            exact: compare every row, also if the index has an approximate part
        """
        if query.shape != self.embeddings.shape[1:]:
            raise ValueError(
                f"the query has {query.numel()} values, but the embeddings in {self.folder} have "
                f"{self.embeddings.shape[1]}: they come from different models"
            )
        if rows is None and self.cells is not None and not exact:
            rows = self.cells.candidates(query, k)
        return nearest_rows(self.embeddings, query, k) if rows is None else nearest_of(self.embeddings, query, k, rows)

    def way_of_search(self, limited: bool = False, exact: bool = False) -> dict[str, Any]:
        """Returns how ``nearest`` searches: {"search": "exact"}, or "approximate" with its "recall_at_10".

        Args:
            limited: in some of the rows
            exact: see ``nearest``
        """
        if self.cells is None or limited or exact:
            return {"search": "exact"}
        return {"search": "approximate", "recall_at_10": self.cells.about["recall_at_10"]}

    def read_image(self, row: int) -> bytes:
        """Returns the encoded bytes of an image from its place in the index.

        Raises:
            UnsafePath: the index names a file that it may not name
            OSError, BadSample: the image is missing, or another image is in its place
        """
        return self.places.read(self.entry(row))


def require_index(folder: Path) -> None:
    """Raises FileNotFoundError, which names the file that is missing, if a folder is no index."""
    for name in (ABOUT, EMBEDDINGS, IMAGES):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no image index, because it has no {name}: make one with `retrieval index`"
            )


def folder_state(folder: Path) -> tuple[int, ...] | None:
    """Returns what differs between a folder and the one that replaces it; None if there is no folder."""
    try:
        state = folder.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_ctime_ns


def check_entry(line: bytes, source: str) -> dict[str, Any]:
    """Returns the entry in a line of images.jsonl. Raises ValueError, which names ``source``, if it is malformed."""
    try:
        entry = parse_object(line, source)
        check_object(entry, KEY | (IN_FILE if "path" in entry else IN_SHARD), source, others=True)
        check_object(entry, TOLD, source, optional=TOLD, others=True)
    except ValueError as error:
        raise ValueError(f"{error}: make the index again with `retrieval index`") from error
    return entry


def read_about(folder: Path) -> dict[str, Any]:
    """Returns the content of index.json. Raises ValueError, which names the file and the field, if it is malformed."""
    about = read_object(folder / ABOUT, MAX_ABOUT)
    check_object(about, VERSIONED, folder / ABOUT, others=True)
    if (about["format"], about["version"]) != (FORMAT, VERSION):
        raise ValueError(f"{folder / ABOUT} has another version: make the index again with `retrieval index`")
    check_object(about, ABOUT_FIELDS, folder / ABOUT, optional=OPTIONAL, others=True)
    return about


def build_index(config: IndexConfig) -> EmbeddingIndex:
    """Writes an index and opens it. Raises as ``write_index``."""
    write_index(config)
    return EmbeddingIndex.load(config.output, [place for place in (config.data, config.images) if place])


def write_index(config: IndexConfig) -> None:
    """Encodes the gallery's images and writes the index folder. Leaves out unusable images and logs them.

    Several ranks share the images (shared_encoding.py), and rank 0 writes. A killed run goes on
    (indexing/index_parts.py).

    Raises:
        FileExistsError: the output folder exists, and is no index or may not be replaced
        BlockingIOError: another command makes or changes the index
        OSError, ValueError: bad input; the message names the file or key
    """
    output = Path(config.output)
    refuse_existing(output, config.overwrite)
    with changing(output) if is_first() else contextlib.nullcontext():
        write_entries(config, output)


def write_entries(config: IndexConfig, output: Path) -> None:
    """The work of ``write_index``, while no other command writes ``output``."""
    if config.approximate == "always":
        require_faiss("--approximate always")
    gallery = open_gallery(config.data, config.images, config.split, config.limit)
    encoder = Encoder.load(config.model, config.device, config.precision)
    parts = IndexParts.of(config, gallery, encoder.folder, encoder.device.type)
    dtype = getattr(torch, config.dtype)
    features, entries, skipped = encode_entries(config, encoder, gallery, dtype, parts)
    if not is_first():
        return
    about = {
        "format": FORMAT,
        "version": VERSION,
        "images": len(features),
        "width": features.shape[1],
        "model": str(encoder.folder.resolve()),
        "model_sha256": model_hash(encoder.folder),
        "data": masked(config.data),
        "split": gallery.split,
        "dtype": config.dtype,
        "skipped": skipped,
    }
    cells = None
    if wants_cells(config, len(features)):
        cells = make_cells(features, caption_queries(encoder, gallery), CAPTIONS, config.recall)
    write_folder(output, about, features, entries, cells)
    parts.remove()


def wants_cells(config: IndexConfig, count: int) -> bool:
    """Tells whether an index of ``count`` images gets an approximate part; logs if faiss is missing for it."""
    if config.approximate != "auto":
        return config.approximate == "always"
    if count < config.approximate_from:
        return False
    try:
        require_faiss("an approximate index")
    except ValueError as error:
        log.warning("%d images get no approximate index, so every search compares all of them: %s", count, error)
        return False
    return True


def caption_queries(encoder: Encoder, gallery: Gallery) -> Tensor | None:
    """Returns the features (Q, d) of different captions at even distances, or None without captions."""
    captions = []
    step = max(1, len(gallery.source) // (2 * QUERIES))  # twice as many, because captions may be equal or missing
    for sample in range(0, len(gallery.source), step):
        with contextlib.suppress(ValueError):  # BadSample too
            captions += gallery.source.captions(sample, "captions")[:1]
    return encoder.embed_texts(evenly(captions)) if captions else None


def encode_entries(
    config: TestSetConfig,
    encoder: Encoder,
    gallery: Gallery,
    dtype: torch.dtype,
    parts: IndexParts | None = None,
) -> tuple[Tensor, Iterator[dict[str, Any]], Skipped]:
    """Encodes the images of a gallery that can be used.

    Returns:
        their features (N, d), what an index says of each, and the others' keys by reason
    Raises:
        ValueError: too many images cannot be used
    """
    batches = encoder.batches(gallery, config)
    images = encoder.images(batches, dtype, parts)
    skipped = find_skip_reasons(gallery, images.usable, encoder, config.max_pixels)
    refuse_too_many(skipped, len(gallery.source), config.max_bad_share)
    features = images.features[images.usable] if skipped else images.features
    return features, image_entries(gallery, images, batches.classes), skipped


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raises FileExistsError if ``output`` is an index without ``overwrite``, or another folder with files."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / ABOUT).is_file() or not (output / EMBEDDINGS).is_file():
        raise FileExistsError(f"--output {output} exists and is no image index: name a new folder")
    if not overwrite:
        raise FileExistsError(f"--output {output} holds an index: name another folder, or replace it with --overwrite")


def write_folder(
    output: Path,
    about: dict[str, Any],
    embeddings: Tensor,
    entries: Iterable[dict[str, Any]],
    cells: Cells | None = None,
    kept: tuple[EmbeddingIndex, NDArray[np.int64]] | None = None,
) -> None:
    """Writes the files into a temporary folder, calls fsync, and renames the folder.

    Args:
        output: the folder
        about: index.json
        embeddings: (N, d)
        entries: of the images; with ``kept``, of the images after those
        cells: the approximate part
        kept: another index, and its rows that come first; their lines are copied and not read
    """
    with folder_aside(output) as aside:
        write_about(aside, about, cells)
        save_file({"embeddings": embeddings.contiguous()}, aside / EMBEDDINGS)
        places = []
        with open(aside / IMAGES, "wb") as handle:
            if kept is not None:
                handle.writelines(kept[0].line(row) + b"\n" for row in kept[1].tolist())
            for entry in entries:
                handle.write(json.dumps(entry).encode() + b"\n")
                places.append(entry.get("place", {}))
        columns = PlaceColumns.of(places)
        if kept is not None:
            old = None if kept[0].columns is None else kept[0].columns.part(kept[1])
            columns = PlaceColumns.joined([(old, len(kept[1])), (columns, len(places))])
        if columns is not None:
            columns.save(aside)


def write_about(folder: Path, about: dict[str, Any], cells: Cells | None) -> None:
    """Writes index.json, and the approximate part of which it has the checksum."""
    about = {name: value for name, value in about.items() if name != "approximate"}
    if cells is not None:
        about["approximate"] = cells.save(folder).about
    content = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (folder / ABOUT).write_text(content, encoding="utf-8", errors="backslashreplace")


def write_cells(folder: Path, about: dict[str, Any], cells: Cells | None) -> None:
    """Gives an index another approximate part, or none. Its other files stay the same files."""
    with folder_aside(folder) as aside:
        for name in (EMBEDDINGS, IMAGES, PLACES, SCENES):
            if (folder / name).is_file():
                link_or_copy(folder / name, aside / name)
        write_about(aside, about, cells)


def link_or_copy(path: Path, other: Path) -> None:
    """Gives a file a second name, or makes a copy where the file system has no such names."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def image_entries(gallery: Gallery, images: EncodedImages, classes: list[str]) -> Iterator[dict[str, Any]]:
    """Yields key, scene and place of each usable image."""
    usable = images.usable.nonzero().flatten().tolist()
    packed, lost = isinstance(gallery.origin, ShardSet), 0
    for number, sample in enumerate(counted(usable, "index entries", "image")):
        if packed and number % READ_TOGETHER == 0:
            prefetch_samples(gallery.source, usable[number : number + READ_TOGETHER], images=False)
        label = int(images.labels[sample])
        scene = classes[label] if label >= 0 else None
        entry = {"key": gallery.source.name(sample)[1], "label": scene, **gallery.location(sample)}
        told = told_of(gallery, sample) if packed else {}
        lost += told is None
        yield entry | (told or {})
    if lost:
        log.warning(
            "%d images have a malformed place or malformed kept columns in KEY.json, so the index has neither for them",
            lost,
        )


def told_of(gallery: Gallery, sample: int) -> dict[str, Any] | None:
    """Returns "place", "kept_columns" and "caption" of an image.

    Returns nothing for an image without place and kept columns, and None if they are malformed.
    """
    try:
        text = gallery.source.text(sample)
        place, columns = place_of_info(text.info), columns_of_info(text.info)
    except ValueError:  # BadSample too
        return None
    if not (place or columns):
        return {}
    caption = text.captions[0][:MAX_CAPTION] if text.captions else None
    told = {"place": {name: place[name] for name in place if name in KEPT}, "caption": caption}
    told |= {COLUMNS: columns} if columns else {}
    return told if len(json.dumps(told)) < MAX_LINE // 2 else None
