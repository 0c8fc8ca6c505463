"""A record: one image before packing, with its captions and scenes, and the place its bytes come from.

    Record("airport/12", ImageFile("AID", "airport/12.jpg"), [], "airport")
    Record("000001234", TarMember("pub11-train-0003.tar", ...), ["a harbour from above"])
    load(record).image                                                  # bytes

A record holds a place, not pixels: five million of them are what packing keeps in memory, so both have slots. A layout
whose images lie in another way brings its own :class:`Place`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from priorclip.data_shards.format.class_names import unique_classes
from priorclip.data_shards.format.sample import BadSample, Sample, captions_of
from priorclip.data_shards.sources.names import find_image, sample_key


@runtime_checkable
class Place(Protocol):
    """Where the bytes of an image are. ``repr`` names the image without its folder: it goes into fingerprints."""

    def load(self, record: Record) -> Record:
        """The record with bytes in ``image``, and with what else is only known now. Raises BadSample."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file; ``folder`` is one string that all records of a source share. What exists is looked up when it is read.

    Args:
        folder: of the data set
        name: relative to it, as the annotation writes it
    """

    folder: str = field(repr=False)
    name: str

    @property
    def path(self) -> Path:
        """The file that ``find_image`` finds. Raises BadSample if the name is refused."""
        return find_image(Path(self.folder), self.name)

    def load(self, record: Record) -> Record:
        return replace(record, image=read_file(self.path))

    def __str__(self) -> str:
        return os.path.join(self.folder, self.name)


@dataclass(slots=True)
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
        extra: further fields of KEY.json; ``labels`` is the list of scenes of a multi-label image
    """

    key: str
    image: Path | Place | bytes
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    split: str | None = None
    source: str = ""
    url: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The file of the image. None if it is not a file of its own, or if its name is refused."""
        if isinstance(self.image, Path):
            return self.image
        with suppress(BadSample):
            return self.image.path if isinstance(self.image, ImageFile) else None
        return None

    @property
    def scenes(self) -> list[str]:
        """Every scene class of the image: the label, or several of a multi-label image."""
        return list(self.extra.get("labels") or ([] if self.label is None else [self.label]))


class RecordSet:
    """Records as a source of samples: evaluates and trains on an annotation file without packing it.

    Attributes:
        sizes: one number, as all records are one shard
        classes: the labels, sorted, each in one spelling
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.sizes = [len(self.records)]
        self.classes = unique_classes({record.label for record in self.records if record.label is not None})
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
        record = load(record) if getattr(record.image, "describes", False) else record
        info = {**record.extra, "captions": record.captions}
        return Sample(record.key, b"", captions_of(info, "captions"), record.label, info, record.source)

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        """Captions of one record. Raises BadSample where it has none."""
        return self.text(sample).texts(caption_field)


def load(record: Record) -> Record:
    """The record with the bytes of its image; a synthetic scene is drawn, which gives its captions and label too.

    Raises BadSample where the image is missing, unreadable or empty.
    """
    if isinstance(record.image, bytes):
        return record
    loaded = replace(record, image=read_file(record.image)) if isinstance(record.image, Path) else _placed(record)
    if not loaded.image:
        raise BadSample("empty image", str(record.image))
    return loaded


def _placed(record: Record) -> Record:
    assert isinstance(record.image, Place), f"{record.key}: {type(record.image).__name__} is no place of an image"
    return record.image.load(record)


def read_file(path: Path) -> bytes:
    """Bytes of a file. Raises BadSample where it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadSample("missing file", str(path)) from error
    except OSError as error:
        raise BadSample("unreadable file", str(error)) from error


def keep_split(records: list[Record], split: str | None, path: Path) -> list[Record]:
    """Records of a split; ValueError that names the splits there are where it has none."""
    kept = [record for record in records if split is None or record.split == split]
    if not kept:
        splits = sorted({str(record.split) for record in records})
        raise ValueError(f"{path} has no record of the split {split!r}; it has: {', '.join(splits) or 'no record'}")
    return kept


def join_sets(groups: Sequence[list[Record]]) -> list[Record]:
    """Records of several data sets in one list: their keys begin with the data set's name, so that none collide.

    Two sets of one name become ``rsicd`` and ``rsicd-2``. A single set keeps its keys.
    """
    if len(groups) == 1:
        return groups[0]
    taken: set[str] = set()
    joined: list[Record] = []
    for records in groups:
        base = sample_key(f"{records[0].source or 'set'}.x") if records else "set"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        for record in records:
            record.key = f"{name}/{record.key}"
        joined += records
    return joined
