"""Packed tars and a trained tokenizer, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_data import records

from priorclip.data_shards.pack.write_shards import PackPlan, pack


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 samples in 5 shards, the last one shorter."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(records(46), folder, PackPlan(prefix="train", shard_size=10))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from priorclip.data_shards import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [text for record in records(46) for text in record.captions]
    train_tokenizer(texts, folder, vocab_size=300, context_length=12)
    return folder
