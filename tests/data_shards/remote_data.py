"""Opens the shards of the test server, and a secret that must not appear anywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from priorclip.data_shards import ShardSet

TAR = "train-000002.tar"


SECRET = "s3cr3tPASS"


def open_shards(spec: str | list[str], tmp_path: Path, **options: object) -> ShardSet:
    return ShardSet(spec, **{"cache": str(tmp_path / "cache"), "timeout": 30.0, **options})  # type: ignore[arg-type]


def sample_of(shards: ShardSet, index: int) -> dict:
    return {**dataclasses.asdict(shards.read(index)), "shard": ""}
