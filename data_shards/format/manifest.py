"""``manifest.json``: what a folder of shards holds, so that its length and classes are known without opening a shard.

    {"format": "data-shards", "version": 1, "samples": 2000, "captions": 10000, "bytes": ...,
     "classes": ["airport", ...], "class_counts": {"airport": 125, ...}, "fields": ["captions", "coarse_captions"],
     "skipped": {"unreadable image": 2}, "duplicates": {"exact": 3}, "excluded": {"near": 1},
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

NAME, FORMAT, VERSION = "manifest.json", "data-shards", 1
SHA256 = re.compile(r"(?:[0-9a-f]{64})?")  # empty: not known


@dataclass(frozen=True)
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
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_bytes(folder / NAME, text.encode() + b"\n")

    @classmethod
    def load(cls, folder: Path, shown: str | None = None) -> Manifest | None:
        """Reads the manifest of a folder; None if there is none. ``shown`` replaces its path in messages.

        Raises:
            ValueError: the file is damaged, of another program or version, or names a file outside its folder
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is not a manifest of data_shards: move it away, then run `data_shards index`")
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path} has version {version}; this program reads version {VERSION}")
        try:
            shards = [ShardEntry(**entry) for entry in content.pop("shards")]
            manifest = cls(shards=shards, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks or has an unknown field: {error}") from error
        for entry in shards:
            check_entry(entry, shown or str(path))
        return manifest


def check_entry(entry: ShardEntry, source: str) -> None:
    """Refuses an entry if its strings must not become paths. Raises ValueError, which names the manifest."""
    plain_name(entry.name, source)
    for digest in (entry.sha256, entry.index_sha256):
        if not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise ValueError(
                f"{source}: a hash of shard {entry.name!r} is not 64 hex digits: run `data_shards index --overwrite`"
            )


@dataclass
class ShardContent:
    """What one shard adds to the manifest, collected while it is written or read."""

    entry: ShardEntry
    captions: int
    class_counts: dict[str, int]
    fields: list[str]
    bad: list[dict[str, str]]


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
    for content in kept:
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
        fingerprint=fingerprint,
        options=options or {},
        **(counts or {}),
    )
