"""The files of a set as a list that takes little memory: the same files, a bound on open ones, small copies."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

from priorclip.data_shards.remote.file_list import KEPT, FileList
from priorclip.data_shards.remote.shard_files import Access, LocalFile, RemoteFile


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_list_gives_the_files_that_it_was_made_of(tmp_path: Path) -> None:
    paths = [tmp_path / folder / f"{name}.tar" for folder in ("a", "b/c") for name in ("x", "grün", "-1", "\udcff")]
    paths += [Path("relative.tar"), Path("/root.tar")]
    piped = LocalFile(tmp_path / "cached.tar", "pipe:cat x.tar")
    remote = RemoteFile("http://user:secret@host/a.tar", Access.from_options(str(tmp_path)))
    files = [*map(LocalFile, paths), piped, remote]
    for listed in (FileList(files), pickle.loads(pickle.dumps(FileList(files)))):
        assert len(listed) == len(files)
        for given in ([listed[number] for number in range(len(files))], list(listed), listed[:]):
            facts = [(file.identity, file.address, file.name, file.remote) for file in given]
            assert facts == [(file.identity, file.address, file.name, file.remote) for file in files]
            assert [file.path for file in given[:-1]] == [*paths, tmp_path / "cached.tar"]
        assert listed[-1] is listed[len(files) - 1]
        assert listed.has_remote
    assert not FileList(files[:-1]).has_remote


def test_the_number_of_open_files_is_bounded(tmp_path: Path) -> None:
    count = KEPT + 40
    for number in range(count):
        (tmp_path / f"{number}.tar").write_bytes(b"%08d" % number)
    files = FileList([LocalFile(tmp_path / f"{number}.tar") for number in range(count)])
    before = open_files()
    for number in (*range(count), 0, count - 1):
        assert files[number].pread(0, 8) == b"%08d" % number
    assert open_files() - before == KEPT
    assert [file.pread(0, 8) for file in files] == [b"%08d" % number for number in range(count)]
    assert open_files() - before == KEPT  # those of a walk were closed with their objects
    assert pickle.loads(pickle.dumps(files))[3].pread(0, 8) == b"00000003"
    files.close()
    assert open_files() == before


def test_a_copy_of_200_000_files_is_small() -> None:
    files = FileList([LocalFile(f"/data/rs5m/train-{number:06d}.tar") for number in range(200_000)])
    copied = pickle.dumps(files)
    assert len(copied) < 7_000_000
    assert pickle.loads(copied)[123_456].address == "/data/rs5m/train-123456.tar"
