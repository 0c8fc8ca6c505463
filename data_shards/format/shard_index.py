"""``NAME.tar.idx``: where every member of a tar lies, so that any sample is one ``pread`` away.

Layout, little-endian, 46 + len(key)/members bytes a member:

    line 1   JSON: {"format": "data-shards-index", "version": 1, "samples": S, "members": M, "key_bytes": K,
             "extensions": ["jpg", "json"], "hashed": true}, then "\\n"
    first    uint32[S + 1]   sample s owns members first[s] .. first[s + 1] - 1
    key_end  uint32[S]       end of key s in the key text
    offset   uint64[M]       of the member's bytes in the tar
    size     uint64[M]       of the member's bytes
    kind     uint16[M]       index into "extensions"
    sha256   uint8[M, 32]    of the member's bytes, only where "hashed"
    keys     uint8[K]        all keys, UTF-8, end to end

A tar without one is scanned header by header (``scan``), which reads no image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from priorclip.data_shards.format.sample import IMAGE_MEMBERS, split_name
from priorclip.data_shards.format.tar import read_members

log = logging.getLogger(__name__)

FORMAT, VERSION = "data-shards-index", 1
HEADER_BYTES = 1 << 16  # that the first line of an index fits into
DAMAGE_LOGGED = 5  # places of damage that the log tells of
TEMPORARY = re.compile(r"\.(?P<host>[\w.-]*)~(?P<process>\d+)\.tmp$")  # end of the name of an unfinished file


@dataclass(frozen=True)
class Member:
    """One file in a tar: ``KEY.extension``, its bytes' place and, where known, their SHA-256."""

    key: str
    extension: str
    offset: int
    size: int
    sha256: bytes | None = None


@dataclass(frozen=True)
class Layout:
    """The first line of an index, which says how long its arrays are."""

    samples: int
    members: int
    key_bytes: int
    extensions: tuple[str, ...]
    hashed: bool

    @property
    def size(self) -> int:
        """Bytes after the first line."""
        return 4 * (self.samples + 1) + 4 * self.samples + (18 + 32 * self.hashed) * self.members + self.key_bytes

    @classmethod
    def parse(cls, line: bytes, path: Path) -> Layout:
        """Raises ValueError, naming the file, where the line is not that of an index."""
        try:
            header = json.loads(line)
            known = header["format"] == FORMAT and header["version"] == VERSION
            samples, members, key_bytes = (int(header[name]) for name in ("samples", "members", "key_bytes"))
            extensions, hashed = tuple(header["extensions"]), bool(header["hashed"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise damaged_index(path) from error
        if not known or min(samples, members, key_bytes) < 0 or not all(isinstance(name, str) for name in extensions):
            raise damaged_index(path)
        return cls(samples, members, key_bytes, extensions, hashed)


def damaged_index(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or not a shard index: write it anew with `data_shards index`")


@dataclass(frozen=True)
class ShardIndex:
    """Members of one tar, grouped into samples, as flat arrays (see the module docstring)."""

    extensions: tuple[str, ...]
    first: NDArray[np.uint32]
    key_end: NDArray[np.uint32]
    offset: NDArray[np.uint64]
    size: NDArray[np.uint64]
    kind: NDArray[np.uint16]
    sha256: NDArray[np.uint8] | None
    key_text: bytes

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, sample: int) -> str:
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.key_text[start : int(self.key_end[sample])].decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[Member]:
        """Members of one sample in tar order."""
        key = self.key(sample)
        return [
            Member(
                key,
                self.extensions[self.kind[row]],
                int(self.offset[row]),
                int(self.size[row]),
                None if self.sha256 is None else self.sha256[row].tobytes(),
            )
            for row in range(int(self.first[sample]), int(self.first[sample + 1]))
        ]

    def save(self, path: Path) -> bytes:
        """Write the index aside, fsync, rename; returns the SHA-256 of the file."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "samples": len(self),
            "members": len(self.offset),
            "key_bytes": len(self.key_text),
            "extensions": list(self.extensions),
            "hashed": self.sha256 is not None,
        }
        parts = [json.dumps(header).encode() + b"\n"]
        parts += [array.tobytes() for array in (self.first, self.key_end, self.offset, self.size, self.kind)]
        parts += [self.sha256.tobytes()] if self.sha256 is not None else []
        data = b"".join([*parts, self.key_text])
        write_aside(path, data)
        return hashlib.sha256(data).digest()

    @classmethod
    def load(cls, path: Path, hashes: bool = True) -> ShardIndex:
        """Read an index, without its hashes (two thirds of it) if they are not wanted.

        Raises ValueError, naming the file, where it is damaged or of another format.
        """
        line, _, body = path.read_bytes().partition(b"\n")
        layout = Layout.parse(line, path)
        if len(body) != layout.size:
            raise damaged_index(path)
        index = cls(layout.extensions, *_arrays(body, layout.samples, layout.members, layout.hashed, hashes))
        if not index.is_consistent():
            raise damaged_index(path)
        return index

    def is_consistent(self) -> bool:
        """Whether the samples share out all members and all of the key text, and every member has a known extension."""
        if not np.isin(self.kind, np.arange(len(self.extensions))).all():
            return False
        for ends, whole in ((self.first, len(self.offset)), (self.key_end, len(self.key_text))):
            if (np.diff(ends.astype(np.int64)) < 0).any() or (len(ends) and ends[-1] != whole):
                return False
        return bool(self.first[0] == 0)

    @classmethod
    def build(cls, members: list[Member]) -> ShardIndex:
        """Group members of the same key that follow each other into samples, as webdataset does."""
        starts = [i for i, member in enumerate(members) if i == 0 or member.key != members[i - 1].key]
        keys = [members[i].key.encode("utf-8", "surrogateescape") for i in starts]
        extensions = tuple(sorted({member.extension for member in members}))
        number = {extension: i for i, extension in enumerate(extensions)}
        hashes = [member.sha256 for member in members if member.sha256 is not None]
        hashed = len(hashes) == len(members) and bool(members)
        return cls(
            extensions,
            np.array([*starts, len(members)], dtype="<u4"),
            np.cumsum([len(key) for key in keys], dtype="<u4"),
            np.array([member.offset for member in members], dtype="<u8"),
            np.array([member.size for member in members], dtype="<u8"),
            np.array([number[member.extension] for member in members], dtype="<u2"),
            np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32) if hashed else None,
            b"".join(keys),
        )


def _arrays(body: bytes, samples: int, members: int, hashed: bool, hashes: bool) -> tuple:
    """Arrays in the order of the file: views into ``body``, or copies that let go of it where hashes are not kept."""
    place = 0

    def take(kind: str, count: int) -> NDArray:
        nonlocal place
        array = np.frombuffer(body, dtype=kind, count=count, offset=place)
        place += array.nbytes
        return array

    arrays = [take("<u4", samples + 1), take("<u4", samples), take("<u8", members), take("<u8", members)]
    arrays.append(take("<u2", members))
    sha256 = take("u1", 32 * members).reshape(members, 32) if hashed else None
    if hashed and not hashes:
        arrays, sha256 = [array.copy() for array in arrays], None
    return (*arrays, sha256, bytes(body[place:]))


def scan(path: Path, hashes: bool = False) -> ShardIndex:
    """Index of a tar by walking its headers; with ``hashes`` every member is read and hashed too.

    Damage costs the samples it lies in and no others: the walk goes on at the next sound header, and warns. Of a tar
    cut short the last member may reach past the end: reading it fails then as a bad sample, and is counted as one.
    Raises ValueError where there is not one member in a file that is not an empty tar.
    """
    members: list[Member] = []
    damage: list[str] = []
    for info, data in read_members(path, hashes, damage.append):
        key, extension = split_name(info.name)
        digest = None if data is None else hashlib.sha256(data).digest()
        members.append(Member(key, extension, info.offset_data, info.size, digest))
    if damage and not members:
        raise ValueError(f"{path} is not an uncompressed tar that can be read: {damage[0]}")
    for text in damage[:DAMAGE_LOGGED]:
        log.warning("%s: %s", path, text)
    if len(damage) > DAMAGE_LOGGED:
        log.warning("%s: damaged in %d places more", path, len(damage) - DAMAGE_LOGGED)
    index = ShardIndex.build(members)
    if not members:
        log.warning("%s is empty", path)
    elif not set(index.extensions) & set(IMAGE_MEMBERS):
        log.warning("%s has no image members (its extensions: %s)", path, ", ".join(index.extensions))
    return index


def index_path(tar: Path) -> Path:
    """Returns the path of the index of a tar."""
    return tar.with_name(f"{tar.name}.idx")


def write_aside(path: Path, data: bytes) -> None:
    """Write ``path`` so that it is either whole or absent: to a sibling, fsync, rename."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """Where this process writes ``path`` before it has its name; no other process has the same place."""
    return path.with_name(f"{path.name}.{platform.node()}~{os.getpid()}.tmp")


def temporary_paths(folder: Path) -> list[Path]:
    """What processes are writing, or were when they were killed."""
    return [path for path in folder.glob("*.tmp") if TEMPORARY.search(path.name)]


def is_stale(temporary: Path) -> bool:
    """Whether its writer was a process of this machine that is gone."""
    writer = TEMPORARY.search(temporary.name)
    if writer is None or writer["host"] != platform.node():
        return False
    return not psutil.pid_exists(int(writer["process"]))
