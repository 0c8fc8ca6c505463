"""Remote shards of a real server read as the local ones: samples, streams, evaluations, read ahead."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_data import TAR, open_shards, sample_of
from remote_server import Behaviour, RemoteServer, serving
from small_data import records

from priorclip.data_shards import ShardSet, ShardStream, eval_batches, load_tokenizer
from priorclip.data_shards.config import DataConfig, byte_count
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.remote import http_ranges, shard_files
from priorclip.data_shards.remote.http_ranges import RemoteError, Version
from priorclip.data_shards.remote.read_ahead import GAP, LONGEST, merge_needs
from priorclip.data_shards.remote.shard_files import Access, LocalFile, RemoteFile

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.mark.parametrize("limit", [0, "1MB"])
def test_a_remote_folder_reads_as_the_local_one(
    server: RemoteServer, packed: Path, tmp_path: Path, limit: int | str
) -> None:
    local, remote = ShardSet(str(packed)), open_shards(f"{server.url}/train/", tmp_path, cache_limit=limit)
    assert remote.sizes == local.sizes
    assert remote.classes == local.classes
    assert remote.fingerprint == local.fingerprint
    for index in (0, 41, 7, 45, 8):
        assert sample_of(remote, index) == sample_of(local, index)
        assert remote.captions(index) == local.captions(index)
    assert remote.name(41) == (f"{server.url}/train/train-000004.tar", local.key(41))
    size = sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert sum(row.sent for row in server.of(r"\.tar$")) < size  # five of 46 samples
    assert {row.status for row in server.of(r"\.tar$")} == {206}
    assert len(server.of("manifest.json")) == 1
    assert len(server.of(r"\.idx$")) == 2  # the two shards that were read


def test_without_a_cache_each_sample_travels_once_and_nothing_else(server: RemoteServer, tmp_path: Path) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path, cache_limit=0, read_ahead=0)
    before = len(server.of(r"\.tar$"))
    for index in range(len(shards)):
        shards.read(index)
    asked = server.of(r"\.tar$")[before:]
    assert len(asked) == len(shards)
    lengths = []
    for index in range(len(shards)):
        place, row = shards.locate(index)
        members = shards._members(place, row)
        lengths.append(members[-1].offset + members[-1].size - members[0].offset)
    assert sum(row.sent for row in asked) <= sum(lengths) + 512 * len(shards)
    assert not (tmp_path / "cache" / "chunks").exists()


def test_with_a_cache_each_byte_travels_once(server: RemoteServer, tmp_path: Path) -> None:
    for _ in range(2):
        shards = open_shards(f"{server.url}/train/", tmp_path)
        for index in np.random.default_rng(1).permutation(len(shards)).tolist():
            shards.read(index)
    sizes = sum(path.stat().st_size for path in (server.folder / "train").glob("*.tar"))
    asked = [row for row in server.of(r"\.tar$") if row.range != "bytes=0-0"]
    assert sum(row.sent for row in asked) <= sizes
    assert len({(row.path, row.range) for row in asked}) == len(asked)
    manifests = server.of("manifest.json")
    assert [row.status for row in manifests] == [200, 304]
    assert len(server.of(r"\.idx$")) == 5


def test_a_tar_without_manifest_is_scanned_once_a_node(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "SCAN_BLOCK", 4096)
    (server.folder / "train" / "manifest.json").unlink()
    pattern = f"{server.url}/train/train-{{000000..000004}}.tar"
    shards = open_shards(pattern, tmp_path, cache_limit=0)
    local = ShardSet(str(packed))
    assert (shards.sizes, shards.fingerprint) == (local.sizes, local.fingerprint)
    assert sample_of(shards, 33) == sample_of(local, 33)
    scanning = server.of(r"\.tar$")
    assert max(row.sent for row in scanning) < 20_000  # at most a sample, never a whole tar
    again = open_shards(pattern, tmp_path, cache_limit=0)
    assert again.sizes == shards.sizes
    assert {row.range for row in server.of(r"\.tar$")[len(scanning) :]} == {"bytes=0-0"}
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json.*data_shards index"):
        open_shards(f"{server.url}/train/", tmp_path)


def test_an_index_that_is_missing_or_of_another_tar_is_replaced_by_a_scan(
    server: RemoteServer, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = server.folder / "train"
    (folder / "train-000001.tar.idx").unlink()
    shutil.copy(folder / "train-000003.tar.idx", folder / "train-000002.tar.idx")
    shards, local = open_shards(f"{server.url}/train/", tmp_path), ShardSet(str(packed))
    for index in (13, 24):
        assert sample_of(shards, index) == sample_of(local, index)
    assert "has another SHA-256 than its manifest says" in caplog.text


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10 * LONGEST), st.integers(1, LONGEST)), max_size=30),
)
@settings(max_examples=60, deadline=None)
def test_spans_cover_what_is_needed_and_little_else(wanted: list[tuple[int, int, int]]) -> None:
    files = [RemoteFile(f"http://host/{number}.tar", Access.from_options("none", 0, 1)) for number in range(3)]
    spans = merge_needs([(files[number], offset, length) for number, offset, length in wanted])
    assert len(spans) == len(set(wanted))
    for number, offset, length in wanted:
        span = spans[id(files[number]), offset, length]
        assert span.file is files[number]
        assert span.start <= offset < offset + length <= span.end
        assert span.end - span.start <= max(LONGEST, length)
    for span in spans.values():
        own = [key for key, other in spans.items() if other is span]
        assert span.left == len(own)
        covered, gaps = span.start, 0
        for _, offset, length in sorted(own, key=lambda key: key[1]):
            gaps = max(gaps, offset - covered)
            covered = max(covered, offset + length)
        assert gaps <= GAP


@pytest.mark.parametrize("limit", [0, "1MB"])
def test_a_batch_is_asked_for_together(server: RemoteServer, tmp_path: Path, limit: int | str) -> None:
    """If each answer takes 50 ms, 40 samples one by one would take 2 s."""
    shards = open_shards(f"{server.url}/train/", tmp_path, cache_limit=limit, read_ahead=8)
    for first in range(0, 46, 10):
        shards.key(first)
    before = len(server.of(r"\.tar$"))
    server.behaviour = Behaviour(latency=0.05)
    order = np.random.default_rng(3).permutation(46)[:40].tolist()
    shards.prefetch(order)
    for index in order:
        shards.read(index)
    asked = server.of(r"\.tar$")[before:]
    if not limit:
        assert len(asked) < 20  # neighbours share a request
    wrong = open_shards(f"{server.url}/train/", tmp_path / "b", cache_limit=0)
    wrong.prefetch([1, 2, 3])
    assert [wrong.read(i).key for i in (3, 3, 44, 1)] == [shards.key(i) for i in (3, 3, 44, 1)]


def test_a_failed_read_ahead_costs_only_its_samples(server: RemoteServer, tmp_path: Path) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path, cache_limit=0)
    for first in (0, 10):
        shards.key(first)
    server.behaviour = Behaviour(statuses=[(404, {})], only="train-000001")
    shards.prefetch([0, 10])
    assert shards.read(0).image
    with pytest.raises(BadSample, match="shard is missing"):
        shards.read(10)
    assert shards.read(10).image


def stream(spec: str, cache: Path, tokenizer: Path, workers: int, limit: int | str, method: str) -> ShardStream:
    config = DataConfig(
        spec,
        image_size=24,
        workers=workers,
        block_size=4,
        window_blocks=3,
        start_method=method,
        cache=str(cache),
        cache_limit=limit,
        timeout=20.0,
    )
    words = load_tokenizer(str(tokenizer), 12)
    return ShardStream(ShardSet(spec, **config.access), words, config, global_batch=8, seed=5)


@pytest.mark.parametrize(
    ("workers", "limit", "method"), [(0, 0, "fork"), (0, "1MB", "fork"), (2, 0, "fork"), (2, "1MB", "fork")]
)
def test_batches_are_those_of_the_local_shards_while_connections_drop(
    server: RemoteServer,
    packed: Path,
    tmp_path: Path,
    tokenizer_folder: Path,
    workers: int,
    limit: int | str,
    method: str,
) -> None:
    expected = list(itertools.islice(stream(str(packed), tmp_path, tokenizer_folder, 0, 0, "fork"), 8))
    server.behaviour = Behaviour(drop_every=7, drop_after=700)
    options = (tmp_path / "cache", tokenizer_folder, workers, limit, method)
    first = stream(f"{server.url}/train/", *options)
    found = list(itertools.islice(first, 3))
    resumed = stream(f"{server.url}/train/", *options)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += list(itertools.islice(resumed, 5))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])), name
    assert not first.skipped + resumed.skipped
    dropped = [row for row in server.of(r"\.tar$") if row.status == 206 and row.sent == 700]
    assert len(dropped) >= 2


def test_evaluation_reads_remote_shards(
    server: RemoteServer, packed: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    words = load_tokenizer(str(tokenizer_folder), 12)
    local = eval_batches(ShardSet(str(packed)), words, 24, 16)
    remote = eval_batches(open_shards(f"{server.url}/train/", tmp_path, cache_limit=0), words, 24, 16)
    assert remote.captions == local.captions
    for one, other in zip(remote.images(), local.images(), strict=True):
        assert torch.equal(one["images"], other["images"])


def test_the_address_of_a_shard_opens_it_again(server: RemoteServer, tmp_path: Path) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path)
    again = open_shards(shards.files[2].address, tmp_path)
    assert sample_of(again, 4) == sample_of(shards, 24)


def test_numbers_of_bytes() -> None:
    assert byte_count("50GB") == 50 * 10**9
    assert byte_count("1.5 GiB") == 3 * 2**29
    assert (byte_count("0"), byte_count(7)) == (0, 7)
    for wrong in ("much", "5XB", "", "-1GB", "1e999"):
        with pytest.raises(ValueError, match="cache_limit"):
            DataConfig("a", cache_limit=wrong)
    with pytest.raises(ValueError, match="timeout"):
        DataConfig("a", timeout=0)
    with pytest.raises(ValueError, match="read_ahead"):
        DataConfig("a", read_ahead=-1)


def test_a_local_shard_with_a_stale_handle_is_opened_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(str(packed))
    shards.read(3)
    real, failures = LocalFile.pread, [116]

    def stale(self: LocalFile, offset: int, length: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Stale file handle")
        return real(self, offset, length)

    monkeypatch.setattr(LocalFile, "pread", stale)
    assert shards.read(3).image
    failures += [116, 116]
    with pytest.raises(BadSample, match="cannot be read"):
        shards.read(3)
    assert shards.read(3).image


def test_a_local_shard_that_becomes_shorter_and_comes_back(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    shards = ShardSet(str(folder))
    whole = (folder / TAR).read_bytes()
    os.truncate(folder / TAR, len(whole) // 2)
    with pytest.raises(BadSample, match="cut short"):
        shards.read(29)
    (folder / TAR).unlink()
    with pytest.raises(BadSample, match="missing"):
        shards.read(29)
    (folder / TAR).write_bytes(whole)
    assert shards.read(29).image


def test_no_byte_is_read_twice_over_the_network_while_packing_is_large(tmp_path: Path) -> None:
    """One sample larger than several chunks."""
    folder = tmp_path / "served" / "train"
    pack(records(3), folder, PackPlan(prefix="train", shard_size=3))
    with serving(tmp_path / "served") as server:
        shards, local = open_shards(f"{server.url}/train/", tmp_path), ShardSet(str(folder))
        assert [sample_of(shards, i) for i in range(3)] == [sample_of(local, i) for i in range(3)]
    with pytest.raises(RemoteError, match="range requests"):
        list(http_ranges.fetch_range("http://host/a", 5, 5, Version(99, ranges=False), 1))
