"""Sizes in a manifest or an index are believed only within limits: no error of Python's own, no memory without end."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import DIGITS, HUGE, NESTED, fuzz, replaced
from small_data import encoded, picture, write_tar

from priorclip.data_shards import ShardSet
from priorclip.data_shards.format.index_reader import MAX_OF_SAMPLE, IndexReader
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.member_runs import MAX_MEMBER, adjacent_runs, byte_range
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.format.shard_index import MAX_MEMBERS, Member, ShardIndex, scan

ROOT = Path(__file__).parents[2]
GIGABYTES = 2  # more address space than a Python with numpy has: enough for any file here that is refused in time


@fuzz
@given(draw=st.data())
def test_any_value_in_a_manifest_is_read_or_named(packed: Path, tmp_path: Path, draw: st.DataObject) -> None:
    """What is read can be used: its shards have a name, and a number of samples that their bytes have room for."""
    content = replaced(draw, json.loads((packed / "manifest.json").read_text()))
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    try:
        manifest = Manifest.load(tmp_path)
    except ValueError as error:
        said = str(error)
    else:
        assert manifest is not None
        assert sum(entry.samples * 512 <= entry.bytes for entry in manifest.shards) == len(manifest.shards)
        assert {type(manifest.samples), type(manifest.captions), *map(type, manifest.class_counts.values())} == {int}
        return
    assert said.startswith(str(tmp_path / "manifest.json"))


@fuzz
@given(draw=st.data())
def test_any_value_in_the_first_line_of_an_index_is_read_or_named(
    packed: Path, tmp_path: Path, draw: st.DataObject
) -> None:
    path = tmp_path / "a.tar.idx"
    line, _, body = (packed / "train-000000.tar.idx").read_bytes().partition(b"\n")
    header = json.dumps(replaced(draw, json.loads(line))).encode()
    path.write_bytes(header + b"\n" + body)
    for read in (IndexReader, ShardIndex.load):
        try:
            index: Any = read(path)
            for sample in range(len(index)):
                with contextlib.suppress(ValueError):
                    index.members(sample)
        except ValueError as error:
            said = str(error)
            assert "a.tar.idx is damaged or not a shard index" in said


@fuzz
@given(start=st.integers(0, 400), data=st.binary(min_size=1, max_size=64))
def test_any_bytes_in_an_index_are_read_or_bad_samples(packed: Path, tmp_path: Path, start: int, data: bytes) -> None:
    folder = tmp_path / "shards"
    if not folder.exists():
        shutil.copytree(packed, folder)
    path = folder / "train-000001.tar.idx"
    whole = (packed / path.name).read_bytes()
    first = whole.index(b"\n") + 1 + start
    path.write_bytes((whole[:first] + data + whole[first + len(data) :])[: len(whole)])
    shards = ShardSet(str(folder))
    for sample in range(10, 20):
        with contextlib.suppress(BadSample):
            shards.read(sample)
    shards.close()


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("field", ["samples", "bytes"])
def test_huge_numbers_of_a_shard_are_refused(packed: Path, tmp_path: Path, number: float, field: str) -> None:
    content = json.loads((packed / "manifest.json").read_text())
    content["shards"][1][field] = number
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    if field == "bytes" and isinstance(number, int) and 0 < number < 2**43:
        assert Manifest.load(tmp_path) is not None  # a tar can have so many bytes
        return
    with pytest.raises(ValueError, match=rf"a shard: '{field}' must be a whole number"):
        Manifest.load(tmp_path)


def test_samples_without_room_are_refused(packed: Path, tmp_path: Path) -> None:
    """By the bytes in the manifest, by the bytes of the tar, and by the sum of all shards."""
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    first = content["shards"][0]

    def load(**fields: int) -> None:
        path.write_text(json.dumps({**content, "shards": [{**first, **fields}, *content["shards"][1:]]}))
        ShardSet(str(folder))

    with pytest.raises(ValueError, match=f"{MAX_MEMBERS - 1} samples"):
        load(samples=MAX_MEMBERS - 1)
    with pytest.raises(ValueError, match=f"no room for the {MAX_MEMBERS - 1} samples"):
        load(samples=MAX_MEMBERS - 1, bytes=1 << 42)
    many = [{**first, "name": f"{n}.tar", "samples": MAX_MEMBERS, "bytes": 1 << 42} for n in range(8193)]
    path.write_text(json.dumps({**content, "shards": many}))
    with pytest.raises(ValueError, match="names more than 68719476736 samples"):
        ShardSet(str(folder))


@pytest.mark.parametrize("text", [NESTED, DIGITS, f'{{"format": {NESTED}', f'{{"version": {DIGITS}}}', "", "\0", "7"])
def test_json_of_no_use_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json (is not JSON|must be a JSON object)"):
        Manifest.load(tmp_path)
    (tmp_path / "a.tar.idx").write_text(text + "\n")
    for read in (IndexReader, ShardIndex.load):
        with pytest.raises(ValueError, match=r"a\.tar\.idx is damaged or not a shard index"):
            read(tmp_path / "a.tar.idx")


def test_a_sample_has_no_more_members_and_bytes_than_one_can_have(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.idx"
    ShardIndex.build([Member("a", "jpg", 512, 1)] * MAX_OF_SAMPLE).save(path)
    assert len(IndexReader(path).members(0)) == MAX_OF_SAMPLE
    ShardIndex.build([Member("a", "jpg", 512, 1)] * (MAX_OF_SAMPLE + 1)).save(path)
    with pytest.raises(ValueError, match="is damaged"):
        IndexReader(path).members(0)
    ShardIndex.build([Member("k" * 70_000, "jpg", 512, 1)]).save(path)
    with pytest.raises(ValueError, match="is damaged"):
        IndexReader(path).key(0)


@given(sizes=st.lists(st.integers(0, MAX_MEMBER), max_size=8), gaps=st.lists(st.integers(0, 1 << 17), max_size=8))
def test_the_bytes_of_a_sample_are_bounded_together(sizes: list[int], gaps: list[int]) -> None:
    members, place = [], 512
    for size, gap in zip(sizes, gaps, strict=False):
        members.append(Member("a", "jpg", place, size))
        place += size + gap
    try:
        runs = adjacent_runs(members)
    except BadSample:
        assert sum(sizes) + sum(gaps) > MAX_MEMBER
    else:
        assert sum(byte_range(run)[1] - 512 for run in runs) <= MAX_MEMBER


ENDLESS = """
import resource, sys
from pathlib import Path
from priorclip.data_shards import ShardSet
from priorclip.data_shards.format.index_reader import IndexReader
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.shard_index import ShardIndex
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (%d << 30), -1))
try:
    print(%s)
except (ValueError, OSError) as error:
    print("refused:", error)
"""


def refused(call: str) -> str:
    """Runs a call with little memory and returns what it says; it takes less than 30 seconds."""
    code = ENDLESS % (GIGABYTES, call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.startswith("refused: "), done.stdout + done.stderr
    return done.stdout


def to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def to_pipe(path: Path) -> None:
    os.mkfifo(path)


def to_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("make", [to_zeros, to_pipe, to_sparse])
def test_files_without_end_are_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "manifest.json")
    make(tmp_path / "a.tar.idx")
    assert "manifest.json" in refused(f"Manifest.load(Path({str(tmp_path)!r}))")
    assert "a.tar.idx" in refused(f"IndexReader(Path({str(tmp_path / 'a.tar.idx')!r}))")
    if make is not to_sparse:  # a gigabyte of it is read
        assert "a.tar.idx" in refused(f"ShardIndex.load(Path({str(tmp_path / 'a.tar.idx')!r}))")


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that sends every file without end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - begun < 50:
                    self.wfile.write(b" " * (1 << 20))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_server_that_sends_a_manifest_without_end_is_refused(endless: str, tmp_path: Path) -> None:
    said = refused(f"ShardSet({endless + '/train/'!r}, cache={str(tmp_path / 'cache')!r})")
    assert "manifest.json is larger than a file of its kind can be" in said


def test_a_tar_has_a_limit_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server could invent headers without end."""
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": encoded(picture(1)) for n in range(4)})
    assert len(scan(path)) == 4
    monkeypatch.setattr("priorclip.data_shards.format.shard_index.MAX_MEMBERS", 3)
    with pytest.raises(ValueError, match=r"a\.tar has more than 3 members"):
        scan(path)
