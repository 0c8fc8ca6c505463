"""Streams of packed shards, and the comparison of their batches."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from priorclip.data_shards import ShardSet, ShardStream, load_tokenizer
from priorclip.data_shards.config import DataConfig


def config(shards: Path | str, **options: object) -> DataConfig:
    defaults: dict = {"image_size": 24, "workers": 0, "block_size": 4, "window_blocks": 3}
    return DataConfig(str(shards), **{**defaults, **options})


def stream_of(settings: DataConfig, tokenizer: str | None = None, batch: int = 8, **options: object) -> ShardStream:
    words = load_tokenizer(tokenizer, 12) if tokenizer else None
    return ShardStream(ShardSet(settings.shards), words, settings, global_batch=batch, **{"seed": 5, **options})


def take(stream: ShardStream, count: int) -> list[dict]:
    return list(itertools.islice(stream, count))


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert type(one[name]) is type(other[name]), name
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])), name
