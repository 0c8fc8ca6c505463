"""A record: one image before packing, with its captions, its scenes and the place of its bytes.

    Record("airport/12", ImageFile("AID", "airport/12.jpg"), [], "airport")
    Record("000001234", TarMember("pub11-train-0003.tar", ...), ["a harbour from above"])
    load(record).image                                                  # bytes

A record holds a place, not pixels, because packing keeps five million records in memory. So both classes have slots. A
layout that stores images in another way has its own :class:`Place`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from priorclip.common.untrusted_json import read_regular
from priorclip.data_shards.format.class_names import unique_classes
from priorclip.data_shards.format.member_runs import MAX_MEMBER
from priorclip.data_shards.format.sample import BadSample, Sample, captions_of
from priorclip.data_shards.sources.names import find_image, sample_key


@runtime_checkable
class Place(Protocol):
    """Where the bytes of an image are. ``repr`` names the image without its folder, because fingerprints contain it."""

    def load(self, record: Record) -> Record:
        """Returns the record with the bytes in ``image`` and all fields that only now are known. Raises BadSample."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file, which is searched when it is read. All records of a source share the string ``folder``.

    Args:
        folder: folder of the images
        name: name in the annotation, relative to the folder
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


@dataclass(frozen=True, slots=True)
class Missing:
    """The place of an image that is known to be missing or unreadable, with the reason."""

    reason: str
    detail: str

    def load(self, record: Record) -> Record:
        raise BadSample(self.reason, self.detail)


@dataclass(slots=True)
class Record:
    """One image before packing.

    Args:
        key: name of the sample: relative path of the file without suffix
        image: bytes of the image, or their place
        captions: may be empty if there is a label (see templates.py)
        label: scene class or None
        split: train, test, ... or None
        source: name of the data set
        url: source of the image, if known
        extra: other fields of KEY.json; ``labels`` lists the scenes of a multi-label image
        members: further files of the sample by extension, which streaming does not read: ``mask.png``
    """

    key: str
    image: Path | Place | bytes
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    split: str | None = None
    source: str = ""
    url: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] | None = None

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
        """The scene classes of the image: its label, or several for a multi-label image."""
        return list(self.extra.get("labels") or ([] if self.label is None else [self.label]))


class RecordSet:
    """Records as a source of samples, so that a run can evaluate or train on an annotation file without packing.

    Attributes:
        sizes: one number, because all records are one shard
        classes: sorted labels, one spelling per class
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.sizes = [len(self.records)]
        self.classes = unique_classes({record.label for record in self.records if record.label is not None})
        if not self.records:
            raise ValueError("there are no records: check the split")

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
        """Reads bytes, captions and label. Raises BadSample if the file is missing or empty."""
        record = load(self.records[sample])
        assert isinstance(record.image, bytes)
        info = {**record.extra, "captions": record.captions}
        return Sample(record.key, record.image, captions_of(info, "captions"), record.label, info, record.source)

    def text(self, sample: int) -> Sample:
        """Reads captions and label without the image."""
        record = self.records[sample]
        record = load(record) if getattr(record.image, "describes", False) else record
        info = {**record.extra, "captions": record.captions}
        return Sample(record.key, b"", captions_of(info, "captions"), record.label, info, record.source)

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        """Returns the captions of one record. Raises BadSample if it has none."""
        return self.text(sample).texts(caption_field)


def load(record: Record) -> Record:
    """Returns the record with the bytes of its image. Drawing a synthetic scene also gives its captions and label.

    Raises:
        BadSample: the image is missing, unreadable or empty
    """
    if isinstance(record.image, bytes):
        return record
    loaded = replace(record, image=read_file(record.image)) if isinstance(record.image, Path) else _placed(record)
    if not loaded.image:
        raise BadSample("empty image", str(record.image))
    return loaded


def _placed(record: Record) -> Record:
    assert isinstance(record.image, Place), f"{record.key}: {type(record.image).__name__} is not a Place"
    return record.image.load(record)


def read_file(path: Path) -> bytes:
    """Returns the bytes of an image file. Never waits for a named pipe, and does not read a device without end.

    Raises BadSample if it is missing, cannot be read, is no regular file or larger than a sample can be.
    """
    try:
        return read_regular(path, MAX_MEMBER)
    except FileNotFoundError as error:
        raise BadSample("missing file", str(path)) from error
    except (OSError, ValueError) as error:
        raise BadSample("unreadable file", str(error)) from error


def keep_split(records: list[Record], split: str | None, path: Path) -> list[Record]:
    """Returns the records of a split. Raises ValueError, which lists the splits, if there are none."""
    kept = [record for record in records if split is None or record.split == split]
    if not kept:
        splits = sorted({str(record.split) for record in records})
        raise ValueError(f"{path} has no record of the split {split!r}; it has: {', '.join(splits) or 'no record'}")
    return kept


def join_sets(groups: Sequence[list[Record]]) -> list[Record]:
    """Joins the records of several data sets. Each key gets the name of its data set as prefix, so that none collide.

    Two sets with the same name become ``rsicd`` and ``rsicd-2``. A single set keeps its keys.
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
