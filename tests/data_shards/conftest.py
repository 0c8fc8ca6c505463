"""Packed tars and a trained tokenizer, made once; a server of shards; a time limit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_streams import LIMIT_SECONDS
from remote_server import RemoteServer, serving
from small_data import records

from priorclip.data_shards import load_tokenizer
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.remote import chunk_cache, http_ranges, shard_files


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


@pytest.fixture(scope="session")
def words(tokenizer_folder: Path) -> object:
    """The trained tokenizer, for texts of 12 tokens."""
    return load_tokenizer(str(tokenizer_folder), 12)


@pytest.fixture
def server(packed: Path, tmp_path: Path) -> Iterator[RemoteServer]:
    """A server of the packed shards, in its folder train."""
    folder = tmp_path / "served"
    shutil.copytree(packed, folder / "train")
    with serving(folder) as running:
        yield running


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, small chunks, and no memory of earlier hosts."""
    monkeypatch.setattr(http_ranges, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(shard_files, "CHUNK", 8192)
    monkeypatch.setattr(chunk_cache, "_warned_folders", set())
    monkeypatch.setattr(http_ranges, "_process", http_ranges._Process())


@pytest.fixture
def time_limit() -> Iterator[None]:
    """A test that hangs fails."""

    def hung(*_: object) -> None:
        raise TimeoutError(f"not done after {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(LIMIT_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
