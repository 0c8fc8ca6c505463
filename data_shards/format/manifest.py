"""``manifest.json``: what a folder of shards holds, so that its length and classes are known without opening a shard.

    {"format": "data-shards", "version": 1, "samples": 2000, "captions": 10000, "bytes": ...,
     "classes": ["airport", ...], "class_counts": {"airport": 125, ...}, "fields": ["captions", "coarse_captions"],
     "skipped": {"unreadable image": 2}, "duplicates": {"exact": 3}, "excluded": {"near": 1},
     "scaled": {"percentiles 2 to 98 of the valid pixels of each image": 7},
     "fingerprint": "...", "options": {...},
     "shards": [{"name": "train-000000.tar", "samples": 1000, "bytes": ..., "sha256": "...", "index_sha256": "..."}]}

It holds no date and no absolute path, so that the same input gives the same bytes. Somebody else may have written it,
so the name of a shard must be a file under the manifest's folder and a hash must be one: other values are refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from priorclip.common.files import write_bytes
from priorclip.common.safe_paths import plain_name
from priorclip.common.untrusted_json import anything, check_object, list_of, map_of, read_object, text, whole
from priorclip.data_shards.format.shard_index import MAX_MEMBERS
from priorclip.data_shards.format.tar import BLOCK, MAX_TAR

NAME, FORMAT, VERSION = "manifest.json", "data-shards", 1
SHA256 = re.compile(r"(?:[0-9a-f]{64})?")  # empty: not known
MAX_BYTES = 1 << 26  # of a manifest; a shard takes 250
MAX_SAMPLES = 1 << 36  # of a manifest


def digest(value: Any, where: str) -> None:
    """Checks a SHA-256 as 64 hex digits; empty if it is not known."""
    if not isinstance(value, str) or not SHA256.fullmatch(value):
        raise ValueError(f"{where} is not 64 hex digits: run `data_shards index --overwrite`")


COUNT = whole(1 << 62)
ENTRY = {
    "name": text(),
    "samples": whole(MAX_MEMBERS),
    "bytes": whole(MAX_TAR),
    "sha256": digest,
    "index_sha256": digest,
}
FIELDS = {
    "samples": COUNT,
    "captions": COUNT,
    "bytes": COUNT,
    "classes": list_of(text(MAX_BYTES)),
    "class_counts": map_of(COUNT),
    "fields": list_of(text(MAX_BYTES)),
    "shards": list_of(anything),  # see check_entry
    "skipped": map_of(COUNT),
    "duplicates": map_of(COUNT),
    "excluded": map_of(COUNT),
    "scaled": map_of(COUNT),
    "fingerprint": text(),
    "options": map_of(anything),
}
OPTIONAL = ("skipped", "duplicates", "excluded", "scaled", "fingerprint", "options")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tar: its name in the folder, its sizes and the SHA-256 of the tar and of its .idx as 64 hex digits."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Counts, classes and shards of a folder. ``classes`` is sorted: a label's id is its index there."""

    samples: int
    captions: int
    bytes: int
    classes: list[str]
    class_counts: dict[str, int]
    fields: list[str]
    shards: list[ShardEntry]
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    scaled: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        fields = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if not self.scaled:
            del fields["scaled"]  # so that a folder of pictures has the manifest that older versions read and write
        content = json.dumps(fields, indent=1, ensure_ascii=False)
        write_bytes(folder / NAME, content.encode() + b"\n")

    @classmethod
    def load(cls, folder: Path, shown: str | None = None) -> Manifest | None:
        """Reads the manifest of a folder; None if there is none. ``shown`` replaces its path in messages.

        Raises:
            ValueError: the file is damaged, of another program or version, names a file outside its folder, or has a
                number beyond its limit
        """
        path = folder / NAME
        try:
            content = read_object(path, MAX_BYTES)
        except FileNotFoundError:
            return None
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a manifest of data_shards: move it away, then run `data_shards index`")
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path} has version {version!r:.20}; this program reads version {VERSION}")
        source = shown or str(path)
        check_object(content, FIELDS, source, OPTIONAL)
        for entry in content["shards"]:
            check_entry(entry, source)
        if sum(entry["samples"] for entry in content["shards"]) > MAX_SAMPLES:
            raise ValueError(f"{source} names more than {MAX_SAMPLES} samples")
        return cls(**{**content, "shards": [ShardEntry(**entry) for entry in content["shards"]]})


def check_entry(entry: dict[str, Any], source: str) -> None:
    """Refuses an entry whose strings must not become paths, or with more samples than its tar has room for.

    Raises ValueError, which names the manifest.
    """
    if isinstance(entry, dict) and "name" in entry:
        plain_name(entry["name"], source)
    check_object(entry, ENTRY, f"{source}, a shard")
    if entry["samples"] > entry["bytes"] // BLOCK:
        raise ValueError(
            f"{source}: shard {entry['name']!r} of {entry['bytes']} bytes has no room for {entry['samples']} samples: "
            f"run `data_shards index --overwrite`"
        )


@dataclass
class ShardContent:
    """What one shard adds to the manifest, collected while it is written or read."""

    entry: ShardEntry
    captions: int
    class_counts: dict[str, int]
    fields: list[str]
    bad: list[dict[str, str]]
    captioned: int = 0  # samples with KEY.txt, see client_files.py
    scaled: dict[str, int] = field(default_factory=dict)


def combine_contents(
    contents: Iterable[ShardContent],
    fingerprint: str = "",
    options: dict[str, Any] | None = None,
    counts: Mapping[str, dict[str, int]] | None = None,
) -> Manifest:
    """Returns the manifest of the shards, in the given order, without shards that have no sample.

    ``counts`` holds ``duplicates`` and ``excluded``: records that were left out on purpose, counted by kind.
    """
    kept = list(contents)
    classes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    scaled: Counter[str] = Counter()
    for content in kept:
        scaled.update(content.scaled)
        classes.update(content.class_counts)
        skipped.update(row["reason"] for row in content.bad)
    shards = [content.entry for content in kept if content.entry.samples]
    return Manifest(
        samples=sum(entry.samples for entry in shards),
        captions=sum(content.captions for content in kept),
        bytes=sum(entry.bytes for entry in shards),
        classes=sorted(classes),
        class_counts=dict(sorted(classes.items())),
        fields=sorted({name for content in kept for name in content.fields}),
        shards=shards,
        skipped=dict(sorted(skipped.items())),
        scaled=dict(sorted(scaled.items())),
        fingerprint=fingerprint,
        options=options or {},
        **(counts or {}),
    )
