"""Packed tars: `--source webdataset`, such as RS5M's published shards and the output of img2dataset.

    pub11-train-0000.tar     000123.img_content 000123.img_name 000123.caption
    00000.tar                000000012.jpg 000000012.txt 000000012.json       img2dataset, with 00000.parquet beside it

A record holds the tar and the number of the sample. Texts are read first; the image and the other fields of KEY.json
are read with the record. img2dataset's ``width`` and ``sha256`` describe the image as it was stored. Packing writes its
own and keeps ``original_width``, ``original_height``, ``exif`` ... A sample without image, or whose ``status`` is not
"success", is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from priorclip.common.output import get_logger
from priorclip.common.safe_paths import find_danger
from priorclip.data_shards.format.place import COLUMNS
from priorclip.data_shards.format.sample import BadSample, Sample, captions_of
from priorclip.data_shards.remote.shard_files import LocalFile
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.sources.kept_columns import KeptColumns
from priorclip.data_shards.sources.names import safe_key
from priorclip.data_shards.sources.parquet import SUCCESS, column_rows
from priorclip.data_shards.sources.record import Missing, Place, Record

log = get_logger(__name__)

OURS = ("captions", "caption", "label", "source", "url", "width", "height", "sha256", "key", "status", "error_message")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A sample of a tar: its number in the shard set ``spec``, which each process opens once.

    ``kept`` are fields of its KEY.json that become its place and kept columns.
    """

    spec: tuple[str, ...] = field(repr=False)
    key: str
    sample: int
    kept: KeptColumns | None = None

    def load(self, record: Record) -> Record:
        found = opened_set(self.spec).read(self.sample)
        extra = other_fields(found)
        if self.kept is not None:
            facts = self.kept.facts(found.info)
            before = extra.get(COLUMNS)
            facts[COLUMNS] = {**(before if isinstance(before, dict) else {}), **facts[COLUMNS]}
            extra |= facts
        return replace(record, image=found.image, extra=extra)


@lru_cache(maxsize=4)
def opened_set(spec: tuple[str, ...]) -> ShardSet:
    return ShardSet(list(spec))


def webdataset(
    spec: str | Sequence[str], caption_field: Sequence[str] | None = None, kept: KeptColumns | None = None
) -> list[Record]:
    """Reads tar shards.

    Args:
        spec: as in ShardSet: folder, braceexpand pattern, URL, or a list of them
        caption_field: lists in KEY.json that become the captions; None takes ``captions``, .txt or .caption
        kept: fields of KEY.json that become the place and the kept columns; a sample may lack them

    Raises:
        OSError, ValueError: as ShardSet, for example if a shard is missing; or no sample has a field of ``kept``
    """
    pieces = (spec,) if isinstance(spec, str) else tuple(spec)
    shards = opened_set(pieces)
    if not shards.has_manifest:
        log.warning("%s has no index, so each worker reads all its headers: run `data_shards index` first", pieces[0])
    seen: set[str] = set()
    records = [_record(shards, pieces, sample, caption_field, kept, seen) for sample in range(len(shards))]
    if kept is not None and records:
        kept.require(seen, f"KEY.json of {pieces[0]}")
    for file in shards.files:
        if isinstance(file, LocalFile):
            report_failures(file.path.with_suffix(".parquet"))
    return records


def _record(
    shards: ShardSet,
    spec: tuple[str, ...],
    sample: int,
    caption_field: Sequence[str] | None,
    kept: KeptColumns | None,
    seen: set[str],
) -> Record:
    key = shards.key(sample)
    key = safe_key(key) if find_danger(key) else key
    try:
        found = shards.text(sample)
        captions = found.captions
        if caption_field:
            captions = [text for name in caption_field for text in captions_of(found.info, name)]
    except BadSample as error:
        return Record(key, Missing(error.reason, error.detail))
    seen.update(found.info)
    place: Place = TarMember(spec, key, sample, kept)
    status = found.info.get("status")
    if status not in SUCCESS:
        place = Missing("not downloaded", str(found.info.get("error_message") or status))
    source = found.info.get("source")
    url = found.info.get("url")
    name = source if isinstance(source, str) and source else set_name(found.shard)
    extra = {"labels": scenes} if (scenes := labels_of(found)) else {}
    return Record(key, place, captions, found.label, None, name, url if isinstance(url, str) else None, extra)


def labels_of(sample: Sample) -> list[str]:
    """Returns the labels of a multi-label image; [] if the field is not a list of names."""
    value = sample.info.get("labels")
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else []


def set_name(shard: str) -> str:
    """Returns ``pub11`` for ``data/pub11-train-0003.tar`` and ``laion`` for ``laion/00012.tar``."""
    path = Path(shard)
    name = re.sub(r"[-_]?(train|validation|val|test)?[-_]?\d*$", "", path.name.split(".")[0])
    return name or path.parent.name


def other_fields(sample: Sample) -> dict:
    return {name: value for name, value in sample.info.items() if name not in OURS}


def report_failures(side: Path) -> None:
    """Logs how many images img2dataset could not download, from the Parquet file beside the tar."""
    if not side.is_file():
        return
    try:
        failed = sum(row["status"] not in SUCCESS for row in column_rows(side, ("status",)))
    except ValueError as error:
        log.info("%s is ignored: %s", side, error)
        return
    if failed:
        log.warning("%s: %d images were not downloaded", side, failed)
