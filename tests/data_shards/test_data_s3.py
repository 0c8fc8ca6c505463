"""Shards in S3 from a real server (moto): reads, streams with workers, clear errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from priorclip.data_shards import DataConfig, ShardSet, ShardStream
from priorclip.data_shards.inspect.sizes import check_sizes
from priorclip.data_shards.stream.workers import start_data_forkserver

BUCKET = "rs5m"


@pytest.fixture
def s3(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Uploads the packed shards to s3://rs5m/train/ and returns that URL."""
    start_data_forkserver()  # before the credentials exist: workers must see those that are set when they start
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for path in packed.iterdir():
        client.upload_file(str(path), BUCKET, f"train/{path.name}")
    yield f"s3://{BUCKET}/train/"
    server.stop()


def stream(spec: str, tmp_path: Path, limit: str, workers: int = 0) -> ShardStream:
    cache = str(tmp_path / "cache")
    config = DataConfig(spec, image_size=24, workers=workers, cache=cache, cache_limit=limit, timeout=60)
    return ShardStream(
        ShardSet(spec, cache=cache, cache_limit=limit, timeout=60), None, config, global_batch=8, seed=3, epochs=1
    )


@pytest.mark.parametrize(("limit", "workers"), [("0", 0), ("1MB", 2)])
def test_an_epoch_from_s3_is_the_local_one(s3: str, packed: Path, tmp_path: Path, limit: str, workers: int) -> None:
    local = list(stream(str(packed), tmp_path, limit))
    remote = list(stream(s3, tmp_path, limit, workers))
    assert len(local) == len(remote) == 5
    assert check_sizes(s3).bytes == check_sizes(str(packed)).bytes
    assert "nothing/train" in check_sizes(f"s3://{BUCKET}/nothing/train-{{0..1}}.tar").problems.popitem()[0]
    for ours, theirs in zip(local, remote, strict=True):
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["image_ids"], theirs["image_ids"])


def test_a_pattern_names_single_objects(s3: str, packed: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    shards = ShardSet(s3 + "train-{000001..000002}.tar", cache=cache, cache_limit=0, timeout=60)
    assert len(shards) == 20
    assert shards.read(13).image == ShardSet(str(packed)).read(23).image


def test_a_missing_object_is_named_without_the_signature(s3: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nothing\.tar") as error:
        ShardSet(f"s3://{BUCKET}/train/nothing.tar", cache=str(tmp_path / "cache"), timeout=60)
    assert "Signature" not in str(error.value)
    assert "404" in str(error.value)
