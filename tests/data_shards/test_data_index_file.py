"""Indices read in place give the same answers as in memory, take no memory, and damage is an error."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorclip.data_shards import ShardSet
from priorclip.data_shards.format.index_reader import IndexReader
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.format.shard_index import Member, ShardIndex

KEYS = st.lists(st.text(st.characters(exclude_characters="\0./"), max_size=6), min_size=1, max_size=8, unique=True)


def index_of(keys: list[str], hashed: bool) -> ShardIndex:
    digest = bytes(32) if hashed else None
    return ShardIndex.build(
        [
            Member(key, extension, 512 * (3 * row + part), 7 + row, digest)
            for row, key in enumerate(keys)
            for part, extension in enumerate(("jpg", "json", "txt")[: 1 + row % 3])
        ]
    )


@settings(deadline=None, max_examples=50)
@given(keys=KEYS, hashed=st.booleans())
def test_reading_in_place_is_reading_whole(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], hashed: bool
) -> None:
    path = tmp_path_factory.mktemp("index") / "a.tar.idx"
    index_of(keys, hashed).save(path)
    whole, stored = ShardIndex.load(path, hashes=False), IndexReader(path)
    assert len(stored) == len(whole) == len(keys)
    for sample in reversed(range(len(whole))):
        assert stored.key(sample) == whole.key(sample) == keys[sample]
        assert stored.members(sample) == whole.members(sample)
    with pytest.raises(IndexError):
        stored.key(len(keys))


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.idx"
    index_of([str(number) for number in range(9)], hashed=False).save(path)
    data = path.read_bytes()
    for damaged in (b"", data[:-1], data + b"x", data[5:], data.replace(b'"version": 1', b'"version": 9'), b"[" * 99):
        path.write_bytes(damaged)
        for read in (IndexReader, ShardIndex.load):
            with pytest.raises(ValueError, match=r"a\.tar\.idx is damaged or not a shard index"):
                read(path)


@settings(deadline=None, max_examples=200)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_gives_members_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("index") / "a.tar.idx"
    index_of([str(number) for number in range(9)], hashed=False).save(path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    for read in (IndexReader, ShardIndex.load):
        with contextlib.suppress(ValueError):  # any other error fails the test
            index = read(path)
            for sample in range(len(index)):
                index.members(sample)


def test_an_index_cut_short_while_it_is_open_is_bad_data(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(packed, folder)
    shards = ShardSet(str(folder))
    assert shards.read(13).captions
    os.truncate(folder / "train-000001.tar.idx", 200)
    with pytest.raises(BadSample, match="index cannot be read"):
        shards.read(13)
    assert shards.name(13) == (str(folder / "train-000001.tar"), "?3")
    assert shards.read(3).captions


MEASURE = """
import gc, sys
from pathlib import Path
import psutil
from priorclip.data_shards.shards import ShardSet
shards = ShardSet(sys.argv[1])
gc.collect()
before = psutil.Process().memory_full_info().uss
for shard in range(len(shards.sizes)):
    for row in (0, 5_000, 39_999):
        shards.key(40_000 * shard + row)
print(before, psutil.Process().memory_full_info().uss - before, len(shards._indices))
"""


def test_a_process_keeps_no_index_in_memory(tmp_path: Path) -> None:
    """64 indices of 40,000 samples are 150 MB in memory; RS5M is twice as large."""
    from priorclip.common.files import write_bytes
    from priorclip.data_shards.format.manifest import Manifest, ShardEntry

    first = tmp_path / "s-000.tar"
    first.touch()
    members = [Member(f"{row:08d}", name, row, 1) for row in range(40_000) for name in ("jpg", "json")]
    ShardIndex.build(members).save(tmp_path / "s-000.tar.idx")
    names = [f"s-{number:03d}.tar" for number in range(64)]
    for name in names[1:]:
        os.link(first, tmp_path / name)
        os.link(tmp_path / "s-000.tar.idx", tmp_path / f"{name}.idx")
    entries = [ShardEntry(name, 40_000, 40_000 * 512, "", "") for name in names]
    Manifest(64 * 40_000, 0, 0, [], {}, [], entries).save(tmp_path)
    write_bytes(tmp_path / "measure.py", MEASURE.encode())
    done = subprocess.run(
        [sys.executable, str(tmp_path / "measure.py"), str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    _, private, opened = map(int, done.stdout.split())
    assert opened == 64
    assert private < 4_000_000
