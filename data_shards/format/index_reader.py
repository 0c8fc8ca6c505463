"""Reads a ``NAME.tar.idx`` in place: a few bytes for each sample, and keeps nothing in memory.

    index = IndexReader(Path("train-000000.tar.idx"))
    index.members(7)    # three members of sample 7: six positioned reads of a few bytes each

All workers of all ranks of a node read the same pages of the kernel's cache. So 5 million samples (300 MB of indices)
take no memory in any process, and a resume does not wait until indices are read. The file is not memory-mapped: if
somebody cut it short, a process that maps it would be killed, but a failed read is an error that can be handled.
The layout is that of :mod:`priorclip.data_shards.format.shard_index`.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from priorclip.data_shards.format.shard_index import HEADER_BYTES, Layout, Member, damaged_index

MAX_KEY = 1 << 16  # bytes of a key
MAX_OF_SAMPLE = 1 << 16  # members of a sample


class IndexReader:
    """``len(index)``, ``index.key(sample)`` and ``index.members(sample)`` as in ShardIndex, without hashes.

    Raises OSError if the file cannot be read, and ValueError, which names it, if it is damaged or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # never waits for a named pipe
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise damaged_index(path)
        line, newline, _ = os.pread(self._file, HEADER_BYTES, 0).partition(b"\n")
        self._layout = layout = Layout.parse(line, path)
        if not newline or os.fstat(self._file).st_size != len(line) + 1 + layout.size:
            raise damaged_index(path)
        self._first = len(line) + 1
        self._key_end = self._first + 4 * (layout.samples + 1)
        self._offset = self._key_end + 4 * layout.samples
        self._size = self._offset + 8 * layout.members
        self._kind = self._size + 8 * layout.members
        self._keys = self._kind + (2 + 32 * layout.hashed) * layout.members

    def __len__(self) -> int:
        return self._layout.samples

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of all members, in lower case."""
        return self._layout.extensions

    def key(self, sample: int) -> str:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is outside the {len(self)} of {self.path}")
        place = self._key_end + 4 * sample
        start, end = self._read("II", place - 4) if sample else (0, *self._read("I", place))
        if not start <= end <= min(self._layout.key_bytes, start + MAX_KEY):
            raise damaged_index(self.path)
        return self._bytes(self._keys + start, end - start).decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[Member]:
        """Returns the members of one sample in tar order."""
        key = self.key(sample)
        start, end = self._read("II", self._first + 4 * sample)
        count = end - start
        if not 0 <= count <= MAX_OF_SAMPLE or end > self._layout.members:
            raise damaged_index(self.path)
        offsets = self._read(f"{count}Q", self._offset + 8 * start)
        sizes = self._read(f"{count}Q", self._size + 8 * start)
        kinds = self._read(f"{count}H", self._kind + 2 * start)
        extensions = self._layout.extensions
        if any(kind >= len(extensions) for kind in kinds):
            raise damaged_index(self.path)
        return [Member(key, extensions[k], o, s) for k, o, s in zip(kinds, offsets, sizes, strict=True)]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _read(self, form: str, place: int) -> tuple[int, ...]:
        """Reads little-endian numbers at an offset of the file."""
        return struct.unpack(f"<{form}", self._bytes(place, struct.calcsize(f"<{form}")))

    def _bytes(self, place: int, count: int) -> bytes:
        data = os.pread(self._file, count, place)
        if len(data) < count:
            raise damaged_index(self.path)
        return data
