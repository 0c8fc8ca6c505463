"""The files of a set of shards. A local one is made when it is asked for, because a set can have 200,000.

    files = FileList([LocalFile(Path("data/train-000000.tar")), ...])
    files[41].pread(512, 4000)          # the last KEPT local files stay open
    for file in files: ...              # makes files that the list does not keep

A process that decodes gets a copy of the list. With names in one text, 200,000 local shards take 6 MB there; as
objects, they took 150 MB and seconds for each process.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from priorclip.data_shards.remote.shard_files import LocalFile, RemoteFile, ShardFile

KEPT = 192  # open files; a process may usually have 1,024


class FileList(Sequence[ShardFile]):
    """A sequence of shards.

    Args:
        files: the shards, in their order
    """

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self._others = {
            number: file
            for number, file in enumerate(files)
            if isinstance(file, RemoteFile) or file.address != file.identity
        }
        paths = [os.fsencode(file.identity) if isinstance(file, LocalFile) else b"" for file in files]
        pieces = [os.path.split(path) for path in paths]
        folders = {folder: number for number, folder in enumerate(dict.fromkeys(folder for folder, _ in pieces))}
        self._folders = list(folders)
        self._folder = np.array([folders[folder] for folder, _ in pieces], np.int32)
        self._names = b"".join(name for _, name in pieces)
        self._ends = np.cumsum([len(name) for _, name in pieces], dtype=np.int64)
        self._kept: OrderedDict[int, LocalFile] = OrderedDict()

    @property
    def has_remote(self) -> bool:
        return any(file.remote for file in self._others.values())

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> ShardFile: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardFile]: ...
    def __getitem__(self, number: int | slice) -> ShardFile | list[ShardFile]:
        if isinstance(number, slice):
            return [self._make(each) for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        if isinstance(other := self._others.get(number), RemoteFile):
            return other
        if number not in self._kept:
            self._kept[number] = other or self._local(number)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)[1].close()
        self._kept.move_to_end(number)
        return self._kept[number]

    def __iter__(self) -> Iterator[ShardFile]:
        return map(self._make, range(len(self)))

    def _make(self, number: int) -> ShardFile:
        return self._others.get(number) or self._local(number)

    def _local(self, number: int) -> LocalFile:
        start = int(self._ends[number - 1]) if number else 0
        name = self._names[start : int(self._ends[number])]
        return LocalFile(os.fsdecode(os.path.join(self._folders[self._folder[number]], name)))

    def close(self) -> None:
        """Closes the open files; reading opens them again."""
        while self._kept:
            self._kept.popitem()[1].close()

    def __getstate__(self) -> dict:
        """Leaves out open files, because another process opens its own."""
        return {**self.__dict__, "_kept": OrderedDict()}
