"""This node's copies of remote shards: shared by processes, limited in size, safe if a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from remote_data import open_shards, sample_of
from remote_server import Behaviour, RemoteServer

from priorclip.data_shards import ShardSet
from priorclip.data_shards.remote import chunk_cache, shard_files
from priorclip.data_shards.remote.chunk_cache import ChunkCache
from priorclip.data_shards.remote.shard_files import Access

pytestmark = pytest.mark.usefixtures("quick_retries")


ROOT = Path(__file__).parents[2]


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
            "import sys, time\nfrom pathlib import Path\n"
            "from priorclip.data_shards.remote.chunk_cache import claim_part\n"
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


def test_a_process_without_progress_is_replaced(tmp_path: Path) -> None:
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


def test_a_chunk_that_another_process_finishes_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = os.open, tmp_path / "a"

    def finished_meanwhile(place: Path, *arguments: int) -> int:
        path.write_bytes(b"whole")
        return real(place, *arguments)

    monkeypatch.setattr(os, "open", finished_meanwhile)
    with chunk_cache.claim_part(path, 9) as part:
        assert part is None
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_parts_of_a_killed_process_are_evicted(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 30, 1)
    (tmp_path / "dead.part").write_bytes(bytes(25))
    with chunk_cache.claim_part(tmp_path / "slow", 9) as slow:
        assert slow is not None
        slow.truncate(15)  # announced
        for name in "abc":
            os.close(cache.open(name, 10, lambda: [bytes(10)]) or 0)
            assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != ".bytes") <= 30
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["c"]


def test_a_stopped_process_blocks_no_other(
    server: RemoteServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ChunkCache(tmp_path, 100, patience=0.2)
    with chunk_cache.file_lock(tmp_path / ".bytes", 1):
        handle = cache.open("a", 5, lambda: [b"whole"])
    assert handle is not None
    os.close(handle)
    assert "going on without the lock" in caplog.text
    open_shards(f"{server.url}/train/", tmp_path)
    (lock,) = (tmp_path / "cache").rglob(".lock")
    with chunk_cache.file_lock(lock, 1):
        access = Access(tmp_path / "cache", 0, 0.1, 8192)
        assert shard_files.fetch_manifest(f"{server.url}/train/", access) is not None


def test_the_least_recently_used_chunk_goes_and_an_open_one_still_reads(tmp_path: Path) -> None:
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


def test_a_full_disk_causes_one_warning_and_the_run_goes_on(
    server: RemoteServer,
    packed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    shards = open_shards(f"{server.url}/train/", tmp_path)
    local = ShardSet(str(packed))
    indices = [shards.key(i) for i in (0, 10, 20, 30, 40)]
    assert indices
    monkeypatch.setattr(chunk_cache, "write", full)
    assert [sample_of(shards, i) for i in range(0, 46, 5)] == [sample_of(local, i) for i in range(0, 46, 5)]
    assert caplog.text.count("no room in") == 1
    assert not list((tmp_path / "cache" / "chunks").glob("*-*"))
