"""Annotation files and folders -> records: one image with its captions and its scene label.

    csv(file, images)            columns filename, caption and/or label, split; several rows of a file are its captions
    karpathy(file, images)       RSICD, RSITMD, UCM, Sydney: {"images": [{"filename", "split", "sentences": [...]}]}
    imagefolder(folder)          airport/12.jpg has the label "airport"
    synthetic(count, seed, size) drawn scenes, see data_shards.synthetic

A record holds a path, not pixels: a list of five million of them is what packing keeps in memory.
"""

from __future__ import annotations

import csv as csv_module
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_shards.sample import BadSample, Sample, captions_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
FILE_COLUMNS = ("filename", "file_name", "file", "filepath", "image", "path", "img_name")
CAPTION_COLUMNS = ("caption", "captions", "raw", "text", "title", "sentence")
LABEL_COLUMNS = ("label", "class", "scene", "category")


@dataclass(frozen=True)
class Drawing:
    """A synthetic scene that is drawn when it is read; ``wording`` fine, coarse or both, JPEG ``quality``."""

    seed: int
    index: int
    size: int
    wording: str = "both"
    quality: int = 90


@dataclass
class Record:
    """One image before packing.

    Args:
        key: name of the sample: the file's relative path without suffix
        image: its bytes, or where they come from
        captions: may be empty where there is a label (see templates)
        label: scene class or None
        split: train, test, ... or None
        source: name of the data set
        url: where the image came from, if known
        extra: further fields of KEY.json
    """

    key: str
    image: Path | Drawing | bytes
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    split: str | None = None
    source: str = ""
    url: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class RecordSet:
    """Records as a source of samples: evaluates and trains on an annotation file without packing it.

    Attributes:
        sizes: one number, as all records are one shard
        classes: the labels, sorted
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.sizes = [len(self.records)]
        self.classes = sorted({record.label for record in self.records if record.label is not None})
        if not self.records:
            raise ValueError("there are no records: is the split right?")

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        text = "\n".join(record.key for record in self.records)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def name(self, sample: int) -> tuple[str, str]:
        record = self.records[sample]
        return record.source or str(record.image), record.key

    def key(self, sample: int) -> str:
        return self.records[sample].key

    def read(self, sample: int) -> Sample:
        """Bytes, captions and label. Raises BadSample where the file is missing or empty."""
        record = load(self.records[sample])
        assert isinstance(record.image, bytes)
        info = {**record.extra, "captions": record.captions}
        return Sample(record.key, record.image, captions_of(info, "captions"), record.label, info, record.source)

    def text(self, sample: int) -> Sample:
        """Captions and label without the image."""
        record = self.records[sample]
        record = load(record) if isinstance(record.image, Drawing) else record
        info = {**record.extra, "captions": record.captions}
        return Sample(record.key, b"", captions_of(info, "captions"), record.label, info, record.source)

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        """Captions of one record. Raises BadSample where it has none."""
        return self.text(sample).texts(caption_field)


def karpathy(
    json_file: str | Path, images: str | Path, split: str | None = None, labels: str | Path | None = None
) -> list[Record]:
    """Records of a Karpathy JSON.

    Args:
        json_file: ``{"dataset": ..., "images": [{"filename", "split", "sentences": [{"raw"}], "label"?}]}``
        images: folder that the file names are relative to
        split: keep this one; None keeps all
        labels: CSV with the columns filename and label; without it a label is the record's ``label`` or the file
            name's stem (``airport_1.jpg`` -> ``airport``; ``00815.jpg`` has none)
    """
    path = Path(json_file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Karpathy JSON with a list 'images': {error}") from error
    table = label_table(labels) if labels else {}
    source = content.get("dataset") or path.stem
    records = [_karpathy_record(entry, Path(images), table, source, path) for entry in entries]
    return keep_split(records, split, path)


def _karpathy_record(entry: dict, images: Path, table: dict[str, str], source: str, path: Path) -> Record:
    try:
        name = str(Path(entry.get("filepath", "")) / entry["filename"])
        sentences = entry.get("sentences", [])
        captions = [row.get("raw") or " ".join(row["tokens"]) for row in sentences]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: an entry of 'images' lacks {error}: {str(entry)[:120]}") from error
    label = table.get(name) or table.get(Path(name).name) or entry.get("label") or stem_label(name)
    return Record(
        sample_key(name),
        find_image(images, name),
        [caption.strip() for caption in captions if caption.strip()],
        label,
        entry.get("split"),
        source,
        entry.get("url"),
    )


def csv(file: str | Path, images: str | Path, split: str | None = None) -> list[Record]:
    """Records of a CSV with a header; rows of the same file are captions of one sample, in their order.

    Raises ValueError that lists the columns found where none names the file, or neither caption nor label is there.
    """
    path, folder = Path(file), Path(images)
    records: dict[str, Record] = {}
    for row, columns in csv_rows(path):
        name = row[columns["file"]]
        record = records.get(name)
        if record is None:
            record = Record(sample_key(name), find_image(folder, name), source=path.stem)
            record.split = row.get("split") or None
            record.url = row.get("url") or None
            records[name] = record
        caption = (row.get(columns["caption"]) or "").strip()
        if caption:
            record.captions.append(caption)
        record.label = record.label or (row.get(columns["label"]) or "").strip() or None
    return keep_split(list(records.values()), split, path)


def csv_rows(path: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Rows of a CSV, and which column is the file, the caption and the label ("" where there is none)."""
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv_module.DictReader(handle)
        found = list(reader.fieldnames or [])
        columns = {
            "file": _column(found, FILE_COLUMNS),
            "caption": _column(found, CAPTION_COLUMNS),
            "label": _column(found, LABEL_COLUMNS),
        }
        if not columns["file"] or not (columns["caption"] or columns["label"]):
            raise ValueError(
                f"{path} needs a column for the file ({', '.join(FILE_COLUMNS)}) and one for the caption or the label "
                f"({', '.join(CAPTION_COLUMNS + LABEL_COLUMNS)}); it has: {', '.join(found) or 'no header'}"
            )
        for number, row in enumerate(reader, 2):
            if not row.get(columns["file"]):
                raise ValueError(f"{path}, line {number}: no file name")
            yield row, columns


def _column(found: list[str], names: tuple[str, ...]) -> str:
    lower = {name.strip().lower(): name for name in reversed(found)}
    return next((lower[name] for name in names if name in lower), "")


def imagefolder(images: str | Path, split: str | None = None) -> list[Record]:
    """Records of a folder: the label is the folder that holds the image.

    With ``split`` the images below ``IMAGES/SPLIT/`` are taken, where there is such a folder.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    if split is not None and not (folder / split).is_dir():
        raise FileNotFoundError(f"--split {split}: the image folder has no sub-folder {folder / split}")
    root = folder / split if split is not None else folder
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise FileNotFoundError(f"no image ({', '.join(IMAGE_SUFFIXES)}) below {root}")
    records = []
    for path in found:
        relative = path.relative_to(root)
        label = path.parent.name if len(relative.parts) > 1 else stem_label(path.name)
        records.append(Record(sample_key(relative.as_posix()), path, [], label, split, folder.name))
    return records


def synthetic(
    count: int, seed: int, size: int, captions: str = "both", first_index: int = 0, quality: int = 90
) -> list[Record]:
    """Records of drawn scenes; the picture and its captions are made when a record is read.

    Args:
        count: scenes
        seed: of the generator
        size: side in pixels
        captions: fine, coarse, or both (``captions`` fine, ``coarse_captions`` beside them)
        first_index: the first scene's index, so that other sets of the same seed do not overlap
        quality: of the JPEG
    """
    if captions not in ("fine", "coarse", "both"):
        raise ValueError(f"captions: fine, coarse or both, not {captions!r}")
    return [
        Record(f"scene-{index:08d}", Drawing(seed, index, size, captions, quality), source="synthetic")
        for index in range(first_index, first_index + count)
    ]


def load(record: Record) -> Record:
    """The record with the bytes of its image; a synthetic scene is drawn, which gives its captions and label too.

    Raises BadSample where the file is missing, unreadable or empty.
    """
    if isinstance(record.image, bytes):
        return record
    if isinstance(record.image, Drawing):
        return _drawn(record, record.image)
    try:
        data = record.image.read_bytes()
    except FileNotFoundError as error:
        raise BadSample("missing file", str(record.image)) from error
    except OSError as error:
        raise BadSample("unreadable file", str(error)) from error
    if not data:
        raise BadSample("empty image", str(record.image))
    return replace(record, image=data)


def _drawn(record: Record, drawing: Drawing) -> Record:
    from PIL import Image

    from data_shards.synthetic import draw_scene

    scene = draw_scene(drawing.seed, drawing.index, drawing.size)
    extra: dict[str, Any] = {"attributes": scene.attributes}
    if drawing.wording == "both":
        extra["coarse_captions"] = list(scene.coarse)
    captions = list(scene.coarse if drawing.wording == "coarse" else scene.fine)
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=drawing.quality)
    return replace(record, image=buffer.getvalue(), captions=captions, label=scene.label, extra=extra)


def keep_split(records: list[Record], split: str | None, path: Path) -> list[Record]:
    """Records of a split; ValueError that names the splits there are where it has none."""
    kept = [record for record in records if split is None or record.split == split]
    if not kept:
        splits = sorted({str(record.split) for record in records})
        raise ValueError(f"{path} has no record of the split {split!r}; it has: {', '.join(splits) or 'no record'}")
    return kept


def label_table(path: str | Path) -> dict[str, str]:
    """File name -> label of a CSV with these two columns."""
    return {row[columns["file"]]: row[columns["label"]] for row, columns in csv_rows(Path(path)) if columns["label"]}


def stem_label(name: str) -> str | None:
    """``airport_1.jpg`` -> ``airport``, ``denseresidential12.tif`` -> ``denseresidential``; None for bare numbers."""
    stem = re.sub(r"[\s_\-]*\(?\d+\)?$", "", Path(name).stem)
    return stem.lower() if re.search(r"[A-Za-z]", stem) else None


def sample_key(name: str) -> str:
    """A file's relative path -> key: no suffix, no dot in the base name (where a key would end), no way upwards."""
    parts = [part for part in Path(name.replace("\\", "/")).parts if part not in ("/", ".", "..")]
    parts[-1] = Path(parts[-1]).stem.replace(".", "_") or "_"
    return "/".join(parts)


def find_image(folder: Path, name: str) -> Path:
    """The image's path, also where annotation and files disagree on the folder or the suffix (RSITMD: tif, jpg).

    Returns the literal path where nothing fits: packing then counts it as a missing file.
    """
    literal = folder / name
    if literal.exists():
        return literal
    flat = folder / Path(name).name
    for path in (flat, *(literal.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)):
        if path.exists():
            return path
    return literal
