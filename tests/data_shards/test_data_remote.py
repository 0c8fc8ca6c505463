"""Remote shards from a real server: ranges, retries, caches shared by processes, streams that equal the local ones."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_server import Behaviour, RemoteServer, serving
from small_data import records, rows

from priorclip.data_shards import ShardSet, ShardStream, eval_batches, load_tokenizer
from priorclip.data_shards.config import DataConfig, byte_count
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.remote import chunk_cache, http_ranges, shard_files, urls
from priorclip.data_shards.remote.chunk_cache import ChunkCache
from priorclip.data_shards.remote.http_ranges import RemoteError, Version
from priorclip.data_shards.remote.read_ahead import GAP, LONGEST, merge_needs
from priorclip.data_shards.remote.shard_files import Access, LocalFile, RemoteFile

ROOT = Path(__file__).parents[2]
TAR = "train-000002.tar"


@pytest.fixture
def server(packed: Path, tmp_path: Path) -> Iterator[RemoteServer]:
    folder = tmp_path / "served"
    shutil.copytree(packed, folder / "train")
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, small chunks, and nothing remembered of hosts."""
    monkeypatch.setattr(http_ranges, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(shard_files, "CHUNK", 8192)
    monkeypatch.setattr(chunk_cache, "_warned_folders", set())
    monkeypatch.setattr(http_ranges, "_process", http_ranges._Process())


def opened(spec: str | list[str], tmp_path: Path, **options: object) -> ShardSet:
    return ShardSet(spec, **{"cache": str(tmp_path / "cache"), "timeout": 30.0, **options})  # type: ignore[arg-type]


def sample(shards: ShardSet, index: int) -> dict:
    return {**dataclasses.asdict(shards.read(index)), "shard": ""}


@pytest.mark.parametrize("limit", [0, "1MB"])
def test_a_remote_folder_reads_as_the_local_one(
    server: RemoteServer, packed: Path, tmp_path: Path, limit: int | str
) -> None:
    local, remote = ShardSet(str(packed)), opened(f"{server.url}/train/", tmp_path, cache_limit=limit)
    assert remote.sizes == local.sizes
    assert remote.classes == local.classes
    assert remote.fingerprint == local.fingerprint
    for index in (0, 41, 7, 45, 8):
        assert sample(remote, index) == sample(local, index)
        assert remote.captions(index) == local.captions(index)
    assert remote.name(41) == (f"{server.url}/train/train-000004.tar", local.key(41))
    size = sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert sum(row.sent for row in server.of(r"\.tar$")) < size  # of 46 samples, five
    assert {row.status for row in server.of(r"\.tar$")} == {206}
    assert len(server.of("manifest.json")) == 1
    assert len(server.of(r"\.idx$")) == 2  # of the two shards that were read


def test_without_a_cache_each_sample_travels_once_and_nothing_else(server: RemoteServer, tmp_path: Path) -> None:
    shards = opened(f"{server.url}/train/", tmp_path, cache_limit=0, read_ahead=0)
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
        shards = opened(f"{server.url}/train/", tmp_path)
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
    shards = opened(pattern, tmp_path, cache_limit=0)
    local = ShardSet(str(packed))
    assert (shards.sizes, shards.fingerprint) == (local.sizes, local.fingerprint)
    assert sample(shards, 33) == sample(local, 33)
    scanning = server.of(r"\.tar$")
    assert max(row.sent for row in scanning) < 20_000  # a sample at most, never a whole tar
    again = opened(pattern, tmp_path, cache_limit=0)
    assert again.sizes == shards.sizes
    assert {row.range for row in server.of(r"\.tar$")[len(scanning) :]} == {"bytes=0-0"}
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json.*data_shards index"):
        opened(f"{server.url}/train/", tmp_path)


def test_an_index_that_is_missing_or_of_another_tar_is_replaced_by_a_scan(
    server: RemoteServer, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = server.folder / "train"
    (folder / "train-000001.tar.idx").unlink()
    shutil.copy(folder / "train-000003.tar.idx", folder / "train-000002.tar.idx")
    shards, local = opened(f"{server.url}/train/", tmp_path), ShardSet(str(packed))
    for index in (13, 24):
        assert sample(shards, index) == sample(local, index)
    assert "has another SHA-256 than its manifest says" in caplog.text


# Failures -----------------------------------------------------------------------------------------------------------


def test_a_body_cut_in_the_middle_goes_on_where_it_stopped(server: RemoteServer, tmp_path: Path) -> None:
    data = (server.folder / "train" / TAR).read_bytes()
    file = RemoteFile(f"{server.url}/train/{TAR}", Access.from_options(str(tmp_path), 0, 60))
    assert file.size == len(data)
    server.behaviour = Behaviour(drop_every=2, drop_after=3000)
    server.count = 1
    assert file.pread(1000, 20_000) == data[1000:21_000]
    first, second = server.of(TAR)[1:]
    assert (first.range, first.sent) == ("bytes=1000-20999", 3000)
    assert (second.range, second.sent) == ("bytes=4000-20999", 17_000)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_when_it_says(server: RemoteServer, tmp_path: Path, status: int) -> None:
    shards = opened(f"{server.url}/train/", tmp_path)
    server.behaviour = Behaviour(statuses=[(status, {"Retry-After": "1"}), (status, {})])
    started = time.monotonic()
    assert shards.read(3).image
    assert time.monotonic() - started >= 1
    assert [row.status for row in server.of(r"\.tar$")][-3:-1] == [status, status]


def test_retry_after_as_a_date_and_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(http_ranges.time, "sleep", slept.append)
    http_ranges._pause_or_give_up("http://a/b", 1, http_ranges.Transient("x", 1e9))
    assert slept == [http_ranges.LONGEST_PAUSE]
    assert http_ranges._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (http_ranges._seconds(time.strftime("%a, %d %b 2099 07:28:00 GMT")) or 0) > 1000
    assert http_ranges._seconds("soon") is None


@pytest.mark.parametrize(("status", "reason"), [(403, "remote cannot be read"), (404, "shard is missing"), (410, "")])
def test_a_final_refusal_is_not_repeated_and_counts_as_a_bad_sample(
    server: RemoteServer, tmp_path: Path, status: int, reason: str
) -> None:
    shards = opened(f"{server.url}/train/", tmp_path)
    before = len(server.of(r"\.tar$"))
    server.behaviour = Behaviour(statuses=[(status, {})])
    with pytest.raises(BadSample, match=reason or "shard is missing"):
        shards.read(3)
    assert len(server.of(r"\.tar$")) == before + 1
    assert shards.read(3).image  # and nothing of the refusal is left


def test_a_server_that_goes_away_costs_samples_and_not_the_run(
    server: RemoteServer, tmp_path: Path, tokenizer_folder: Path
) -> None:
    shards = opened(f"{server.url}/train/", tmp_path, cache_limit=0)
    server.behaviour = Behaviour(statuses=[(503, {})] * 60)
    config = DataConfig("", image_size=24, workers=0, block_size=4, window_blocks=3, max_bad_share=1.0)
    stream = ShardStream(shards, None, config, global_batch=8, seed=5)
    batches = list(itertools.islice(stream, 5))
    assert [len(batch["image_ids"]) for batch in batches] == [8] * 5
    assert 1 <= stream.skipped["remote cannot be read"] <= 60 - http_ranges.ATTEMPTS  # then one attempt each
    server.shutdown()
    server.server_close()
    http_ranges._reset_after_fork()  # its threads would still answer on the connections that are open
    with pytest.raises(BadSample, match=r"remote cannot be read.*no connection"):
        shards.read(3)
    with pytest.raises(OSError, match="Is the address right"):
        opened(f"{server.url}/train/{TAR}", tmp_path / "other")


def test_a_server_that_trickles_is_given_up(server: RemoteServer, tmp_path: Path, monkeypatch) -> None:
    shards = opened(f"{server.url}/train/", tmp_path, timeout=0.3)
    shards.key(3)
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 2)
    server.behaviour = Behaviour(trickle=0.02)
    started = time.monotonic()
    with pytest.raises(BadSample, match="timeout"):
        shards.read(3)
    assert time.monotonic() - started < 60  # all of it would take minutes
    server.behaviour = Behaviour(latency=1.0)
    with pytest.raises(BadSample, match="timeout"):
        shards.read(3)


def test_a_server_without_ranges_is_fetched_whole_once(
    server: RemoteServer, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard_files._warned_hosts.clear()
    server.behaviour = Behaviour(ranges=False, drop_every=4, drop_after=2000)
    spec = [f"{server.url}/train/train-00000{number}.tar" for number in (1, 2)]
    for limit in (0, "1MB"):
        shards = opened(spec, tmp_path, cache_limit=limit)
        local = ShardSet(str(packed))
        assert [sample(shards, i) for i in range(20)] == [sample(local, i + 10) for i in range(20)]
    assert caplog.text.count("does not support range requests") == 1
    whole = [row for row in server.of(r"\.tar$") if row.range is None]
    assert 2 <= len(whole) <= 4  # each once, but for what was dropped
    files = sorted((tmp_path / "cache" / "whole").glob("*-whole"))
    assert sorted(path.read_bytes() for path in files) == sorted(
        (packed / f"train-00000{number}.tar").read_bytes() for number in (1, 2)
    )


@pytest.mark.parametrize("limit", [0, "1MB"])
def test_a_shard_that_changes_under_the_run_is_bad_data(server: RemoteServer, tmp_path: Path, limit: int | str) -> None:
    shards = opened(f"{server.url}/train/", tmp_path, cache_limit=limit)
    shards.read(20)
    path = server.folder / "train" / TAR
    data = bytearray(path.read_bytes())
    data[-2000] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadSample, match="shard has changed"):
        shards.read(29)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadSample, match="shard has changed"):
        shards.read(28)
    fresh = opened(f"{server.url}/train/", tmp_path, cache_limit=limit)  # shorter than its manifest says
    with pytest.raises(BadSample, match="its manifest says"):
        fresh.read(20)
    assert fresh.read(1).image


def test_two_backends_with_their_own_etags_are_one_file() -> None:
    one, other = Version(9, '"a"', "Mon"), Version(9, '"b"', "Mon")
    assert one.same(other)
    assert not one.same(dataclasses.replace(other, modified="Tue"))
    assert not Version(9, '"a"').same(Version(9, '"b"'))
    assert not one.same(dataclasses.replace(one, size=8))


# Secrets ------------------------------------------------------------------------------------------------------------

SECRET = "s3cr3tPASS"


def test_no_secret_leaves_the_request(
    server: RemoteServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 2)
    url = server.url.replace("http://", f"http://me:{SECRET}@") + f"/train/{TAR}?part=1&X-Amz-Signature={SECRET}"
    shards = opened(url, tmp_path)
    assert server.of(TAR)[0].headers["authorization"].startswith("Basic ")
    book = tmp_path / "quarantine.jsonl"
    config = DataConfig("", image_size=24, workers=0, max_bad_share=1.0, quarantine=str(book))
    server.behaviour = Behaviour(statuses=[(503, {}), (403, {}), (404, {})])
    stream = ShardStream(shards, None, config, global_batch=2)
    next(iter(stream))
    assert rows(book)
    texts = [caplog.text, book.read_text(), *map(str, (tmp_path / "cache").rglob("*"))]
    texts += [str(shards.files[0]), shards.files[0].address, str(shards.spec)]
    server.behaviour = Behaviour(statuses=[(404, {})], only="train")
    with pytest.raises(OSError) as error:
        opened(url.replace(TAR, "absent.tar"), tmp_path)
    for text in (*texts, str(error.value)):
        assert SECRET not in text
    assert urls.unsigned_url(url) == f"{server.url}/train/{TAR}?part=1"


# The node's copy ----------------------------------------------------------------------------------------------------

RANK = """
import hashlib, sys
from pathlib import Path
from priorclip.data_shards import ShardSet
from priorclip.data_shards.remote import shard_files
from priorclip.data_shards.remote.chunk_cache import file_lock
import numpy as np
shard_files.CHUNK = 8192
url, cache, limit, seed = sys.argv[1:]
chunks = Path(cache, "chunks")
print("ready", flush=True)
sys.stdin.readline()
shards = ShardSet(url, cache=cache, cache_limit=int(limit), timeout=20.0)
most = 0
for sample in np.random.default_rng(int(seed)).permutation(len(shards)).tolist():
    data = shards.read(sample)
    assert hashlib.sha256(data.image).hexdigest() == data.info["sha256"]
    with file_lock(chunks / ".bytes", 60):  # nobody counts, adds or drops a chunk meanwhile
        sizes = [path.stat().st_size for path in chunks.glob("*-*") if path.exists()]
    most = max(most, sum(sizes))
print(most)
"""


def ranks(server: RemoteServer, cache: Path, limit: int, count: int = 3) -> list[int]:
    """Real processes that read everything, each in its own order; the most bytes that each saw in the cache."""
    command = [sys.executable, "-c", textwrap.dedent(RANK), f"{server.url}/train/", str(cache), str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(seed)], env=environment, **pipes) for seed in range(count)]
    assert [process.stdout.readline() for process in running if process.stdout] == ["ready\n"] * count
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return [int(output) for output in outputs]


def test_ranks_that_share_a_cold_cache_fetch_everything_once(server: RemoteServer, tmp_path: Path) -> None:
    server.behaviour = Behaviour(latency=0.005)
    ranks(server, tmp_path / "cache", 10**9)
    asked = [row for row in server.of(r"\.tar$") if row.range != "bytes=0-0"]
    assert len({(row.path, row.range) for row in asked}) == len(asked)
    assert [row.status for row in server.of("manifest.json")].count(200) == 1
    assert len(server.of(r"\.idx$")) == 5
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_ranks_that_share_a_small_cache_keep_to_its_limit(server: RemoteServer, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in (server.folder / "train").glob("*.tar"))
    limit = total // 4
    most = ranks(server, tmp_path / "cache", limit)
    assert limit / 2 < max(most) <= limit  # chunks on their way included
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert sum(row.sent for row in server.of(r"\.tar$")) > total  # what went had to come again


def test_a_killed_holder_does_not_block(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom pathlib import Path\nfrom priorclip.data_shards.remote.chunk_cache import claim_part\n"
            "with claim_part(Path(sys.argv[1]), 9) as part:\n    part.write(b'half')\n    print('held', flush=True)\n"
            "    time.sleep(600)",
            str(tmp_path / "a"),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    found: list[bytes] = []

    def read() -> None:
        handle = ChunkCache(tmp_path, 100, patience=300).open("a", 5, lambda: [b"whole"])
        assert handle is not None
        found.append(os.pread(handle, 9, 0))
        os.close(handle)

    waiting = threading.Thread(target=read)
    waiting.start()
    time.sleep(0.3)
    assert not found
    holder.send_signal(signal.SIGKILL)
    waiting.join(60)
    holder.wait()
    assert found == [b"whole"]


def test_a_holder_without_progress_is_passed_over(tmp_path: Path) -> None:
    with chunk_cache.claim_part(tmp_path / "a", 9) as slow:
        assert slow is not None
        handle = ChunkCache(tmp_path, 100, patience=0.2).open("a", 5, lambda: [b"whole"])
        assert handle is not None
        os.close(handle)
        with chunk_cache.claim_part(tmp_path / "b", 9) as others:
            os.replace(tmp_path / "b.part", tmp_path / "a.part")  # as if the next one were fetching it by now
            chunk_cache.write(slow, [b"late"])
            chunk_cache.publish(slow, tmp_path / "a")
            assert others is not None
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert (tmp_path / "a.part").exists()


def test_a_chunk_finished_between_a_look_and_an_opening_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, path = os.open, tmp_path / "a"

    def finished_meanwhile(place: Path, *arguments: int) -> int:
        path.write_bytes(b"whole")
        return real(place, *arguments)

    monkeypatch.setattr(os, "open", finished_meanwhile)
    with chunk_cache.claim_part(path, 9) as part:
        assert part is None
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_goes_when_room_is_made(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 30, 1)
    (tmp_path / "dead.part").write_bytes(bytes(25))
    with chunk_cache.claim_part(tmp_path / "slow", 9) as slow:
        assert slow is not None
        slow.truncate(15)  # announced
        for name in "abc":
            os.close(cache.open(name, 10, lambda: [bytes(10)]) or 0)
            assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != ".bytes") <= 30
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["c"]


def test_nobody_waits_for_ever_for_a_stopped_process(
    server: RemoteServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ChunkCache(tmp_path, 100, patience=0.2)
    with chunk_cache.file_lock(tmp_path / ".bytes", 1):
        handle = cache.open("a", 5, lambda: [b"whole"])
    assert handle is not None
    os.close(handle)
    assert "going on without the lock" in caplog.text
    opened(f"{server.url}/train/", tmp_path)
    (lock,) = (tmp_path / "cache").rglob(".lock")
    with chunk_cache.file_lock(lock, 1):
        access = Access(tmp_path / "cache", 0, 0.1, 8192)
        assert shard_files.fetch_manifest(f"{server.url}/train/", access) is not None


def test_the_chunk_used_longest_ago_goes_and_an_open_one_still_reads(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 30, 1)
    handles = {}
    for number, name in enumerate("abc"):
        handles[name] = cache.open(name, 10, lambda name=name: [name.encode() * 10])
        os.utime(tmp_path / name, (number, number))
    again = cache.open("a", 10, list)  # used now
    assert again is not None
    os.close(cache.open("d", 10, lambda: [b"d" * 10]) or 0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".bytes") == ["a", "d"]
    assert os.pread(handles["b"], 10, 0) == b"b" * 10
    os.close(cache.open("b", 10, lambda: [b"b" * 10]) or 0)  # and comes again
    for handle in (*handles.values(), again):
        os.close(handle)


def test_a_full_disk_is_said_once_and_the_run_goes_on(
    server: RemoteServer,
    packed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    shards = opened(f"{server.url}/train/", tmp_path)
    local = ShardSet(str(packed))
    indices = [shards.key(i) for i in (0, 10, 20, 30, 40)]
    assert indices
    monkeypatch.setattr(chunk_cache, "write", full)
    assert [sample(shards, i) for i in range(0, 46, 5)] == [sample(local, i) for i in range(0, 46, 5)]
    assert caplog.text.count("no room in") == 1
    assert not list((tmp_path / "cache" / "chunks").glob("*-*"))


# Reading ahead ------------------------------------------------------------------------------------------------------


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
    """With every answer 50 ms late, 40 samples one by one would take 2 s."""
    shards = opened(f"{server.url}/train/", tmp_path, cache_limit=limit, read_ahead=8)
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
        assert len(asked) < 20  # neighbours travel together
    wrong = opened(f"{server.url}/train/", tmp_path / "b", cache_limit=0)
    wrong.prefetch([1, 2, 3])
    assert [wrong.read(i).key for i in (3, 3, 44, 1)] == [shards.key(i) for i in (3, 3, 44, 1)]


def test_what_is_read_ahead_fails_for_its_samples_alone(server: RemoteServer, tmp_path: Path) -> None:
    shards = opened(f"{server.url}/train/", tmp_path, cache_limit=0)
    for first in (0, 10):
        shards.key(first)
    server.behaviour = Behaviour(statuses=[(404, {})], only="train-000001")
    shards.prefetch([0, 10])
    assert shards.read(0).image
    with pytest.raises(BadSample, match="shard is missing"):
        shards.read(10)
    assert shards.read(10).image


# Whole streams ------------------------------------------------------------------------------------------------------


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
    remote = eval_batches(opened(f"{server.url}/train/", tmp_path, cache_limit=0), words, 24, 16)
    assert remote.captions == local.captions
    for one, other in zip(remote.images(), local.images(), strict=True):
        assert torch.equal(one["images"], other["images"])


def test_the_address_of_a_shard_opens_it_again(server: RemoteServer, tmp_path: Path) -> None:
    shards = opened(f"{server.url}/train/", tmp_path)
    again = opened(shards.files[2].address, tmp_path)
    assert sample(again, 4) == sample(shards, 24)


# Other schemes ------------------------------------------------------------------------------------------------------


def signature_checker(secret: str):
    """Of a pre-signed S3 request, by AWS's description of Signature Version 4; not by the code that signs."""

    def check(target: str, headers: dict[str, str]) -> int | None:
        parts = urlsplit(target)
        fields = dict(parse_qsl(parts.query, keep_blank_values=True))
        given = fields.pop("X-Amz-Signature", "")
        if not given:
            return 403
        query = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(fields.items()))
        signed = fields["X-Amz-SignedHeaders"].split(";")
        lines = "".join(f"{name}:{headers[name].strip()}\n" for name in signed)
        request = "\n".join(("GET", parts.path, query, lines, ";".join(signed), "UNSIGNED-PAYLOAD"))
        _, day, region, service, last = fields["X-Amz-Credential"].split("/")
        text = "\n".join(
            (
                "AWS4-HMAC-SHA256",
                fields["X-Amz-Date"],
                "/".join((day, region, service, last)),
                hashlib.sha256(request.encode()).hexdigest(),
            )
        )
        key = f"AWS4{secret}".encode()
        for piece in (day, region, service, last):
            key = hmac.new(key, piece.encode(), hashlib.sha256).digest()
        return None if hmac.new(key, text.encode(), hashlib.sha256).hexdigest() == given else 403

    return check


def test_s3_requests_are_signed_with_the_users_credentials(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "credentials"
    keys.write_text("[lab]\naws_access_key_id = me\naws_secret_access_key = right\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.behaviour = Behaviour(check=signature_checker("right"))
    with pytest.raises(OSError, match=r"403.*credentials"):  # without a profile: unsigned
        opened(f"s3://train/{TAR}", tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    shards = opened("s3://train/", tmp_path)
    assert sample(shards, 27) == sample(ShardSet(str(packed)), 27)
    assert shards.name(27)[0] == f"s3://train/{TAR}"
    server.behaviour.check = signature_checker("changed")
    with pytest.raises(BadSample, match="403"):
        shards.read(0)


def test_the_hub_and_google_are_asked_at_their_addresses(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed, server.folder / "datasets/me/scenes/resolve/v1/train")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    expected = sample(ShardSet(str(packed)), 27)
    assert sample(opened("hf://datasets/me/scenes@v1/train/", tmp_path), 27) == expected
    assert server.of("resolve")[0].headers["authorization"] == f"Bearer hf_{SECRET}"
    assert sample(opened("gs://train/", tmp_path / "b"), 27) == expected
    with pytest.raises(OSError, match="OWNER/NAME"):
        opened("hf://datasets/me/", tmp_path)
    with pytest.raises(ValueError, match="ftp"):
        opened("ftp://host/a.tar", tmp_path)


def test_a_token_does_not_follow_a_redirection_to_another_host(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    with serving(hub) as front:
        place = f"{server.url.replace('127.0.0.1', 'localhost')}/train/{TAR}"
        front.behaviour = Behaviour(statuses=[(302, {"Location": place})] * 99)
        url = front.url.replace("http://", f"http://me:{SECRET}@") + f"/{TAR}"
        shards = opened(url, tmp_path, cache_limit=0)
        assert sample(shards, 4) == sample(ShardSet(str(packed)), 24)
        assert all("authorization" in row.headers for row in front.of(TAR))
        assert all("authorization" not in row.headers for row in server.of(TAR))
        assert len(front.of(TAR)) == 1  # later requests go straight to where the first was sent


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(OSError, match=r"pip install 'priorclip-pretraining\[s3\]'"):
        opened("s3://bucket/a.tar", tmp_path)


# Files and options --------------------------------------------------------------------------------------------------


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
        shards, local = opened(f"{server.url}/train/", tmp_path), ShardSet(str(folder))
        assert [sample(shards, i) for i in range(3)] == [sample(local, i) for i in range(3)]
    with pytest.raises(RemoteError, match="range requests"):
        list(http_ranges.fetch_range("http://host/a", 5, 5, Version(99, ranges=False), 1))
