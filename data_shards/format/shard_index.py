"""``NAME.tar.idx``: the place of every member of a tar, so that reading any sample is one ``pread``.

Layout, little-endian, 46 + len(key)/members bytes for each member:

    line 1   JSON: {"format": "data-shards-index", "version": 1, "samples": S, "members": M, "key_bytes": K,
             "extensions": ["jpg", "json"], "hashed": true}, then "\\n"
    first    uint32[S + 1]   sample s has members first[s] .. first[s + 1] - 1
    key_end  uint32[S]       end of key s in the key text
    offset   uint64[M]       of each member's bytes in the tar
    size     uint64[M]       of each member in bytes
    kind     uint16[M]       index into "extensions"
    sha256   uint8[M, 32]    of each member's bytes, only if "hashed"
    keys     uint8[K]        all keys, UTF-8, end to end

For a tar without an index, ``scan`` reads the headers and no image.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from priorclip.common.files import write_bytes
from priorclip.common.output import get_logger
from priorclip.common.untrusted_json import check_object, flag, list_of, parse_object, read_regular, text, whole
from priorclip.data_shards.format.sample import IMAGE_MEMBERS, split_name
from priorclip.data_shards.format.tar import read_members

log = get_logger(__name__)

FORMAT, VERSION, SUFFIX = "data-shards-index", 1, ".idx"
HEADER_BYTES = 1 << 16  # longest first line of an index
MAX_MEMBERS = 1 << 23  # of a tar
MAX_INDEX = 1 << 30  # bytes after the first line
HEADER = {
    "format": text(),
    "version": whole(1 << 31),
    "samples": whole(MAX_MEMBERS),
    "members": whole(MAX_MEMBERS),
    "key_bytes": whole(MAX_INDEX),
    "extensions": list_of(text(MAX_INDEX)),
    "hashed": flag,
}
DAMAGE_LOGGED = 5  # damaged places in the log


@dataclass(frozen=True)
class Member:
    """One file in a tar: ``KEY.extension``, its place and, if known, its SHA-256."""

    key: str
    extension: str
    offset: int
    size: int
    sha256: bytes | None = None


@dataclass(frozen=True)
class Layout:
    """The first line of an index, which gives the lengths of its arrays."""

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
        """Parses the line. Raises ValueError, which names the file, if it is not the first line of an index."""
        try:
            header = parse_object(line, path)
            check_object(header, HEADER, path, others=True)
        except ValueError as error:
            raise damaged_index(path) from error
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise damaged_index(path)
        extensions = tuple(header["extensions"])
        layout = cls(header["samples"], header["members"], header["key_bytes"], extensions, header["hashed"])
        if layout.samples > layout.members or layout.size > MAX_INDEX:
            raise damaged_index(path)
        return layout


def damaged_index(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged or not a shard index: write it again with `data_shards index`")


@dataclass(frozen=True)
class ShardIndex:
    """The index in memory: members of one tar, grouped into samples, as flat arrays (see the module docstring)."""

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
        """Returns the members of one sample in tar order."""
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
        """Writes the index atomically. Returns the SHA-256 of the file."""
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
        write_bytes(path, data)
        return hashlib.sha256(data).digest()

    @classmethod
    def load(cls, path: Path, hashes: bool = True) -> ShardIndex:
        """Reads an index; without ``hashes``, which are two thirds of it, if False.

        Raises ValueError, which names the file, if it is damaged or has another format.
        """
        line, newline, body = read_regular(path, HEADER_BYTES + MAX_INDEX).partition(b"\n")
        layout = Layout.parse(line, path)
        if not newline or len(body) != layout.size:
            raise damaged_index(path)
        index = cls(layout.extensions, *_arrays(body, layout.samples, layout.members, layout.hashed, hashes))
        if not index.is_consistent():
            raise damaged_index(path)
        return index

    def is_consistent(self) -> bool:
        """Returns True if the samples cover all members and the key text, and each member has a known extension."""
        if not np.isin(self.kind, np.arange(len(self.extensions))).all():
            return False
        for ends, count in ((self.first, len(self.offset)), (self.key_end, len(self.key_text))):
            if (np.diff(ends.astype(np.int64)) < 0).any() or (len(ends) and ends[-1] != count):
                return False
        return bool(self.first[0] == 0)

    @classmethod
    def build(cls, members: list[Member]) -> ShardIndex:
        """Groups consecutive members with the same key into samples, as webdataset does."""
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
    """Returns the arrays in file order: views of ``body``, or copies if the hashes are dropped, to free ``body``."""
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
    """Builds the index of a tar from its headers; with ``hashes``, reads and hashes every member too.

    Damage costs only the samples that it touches: the scan logs a warning and goes on at the next intact header. If the
    tar is cut short, its last member may reach past the end; reading that member raises BadSample.
    Raises ValueError if the file has no member and is not an empty tar, or more members than MAX_MEMBERS.
    """
    members: list[Member] = []
    damage: list[str] = []
    for info, data in read_members(path, hashes, damage.append):
        key, extension = split_name(info.name)
        digest = None if data is None else hashlib.sha256(data).digest()
        members.append(Member(key, extension, info.offset_data, info.size, digest))
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"{path} has more than {MAX_MEMBERS} members: split it into several tars")
    if damage and not members:
        raise ValueError(f"{path} is not an uncompressed tar that can be read: {damage[0]}")
    for place in damage[:DAMAGE_LOGGED]:
        log.warning("%s: %s", path, place)
    if len(damage) > DAMAGE_LOGGED:
        log.warning("%s: damaged in %d more places", path, len(damage) - DAMAGE_LOGGED)
    index = ShardIndex.build(members)
    if not members:
        log.warning("%s is empty", path)
    elif not set(index.extensions) & set(IMAGE_MEMBERS):
        log.warning("%s has no image members (its extensions: %s)", path, ", ".join(index.extensions))
    return index


def index_path(tar: Path) -> Path:
    """Returns the path of the index of a tar."""
    return tar.with_name(f"{tar.name}{SUFFIX}")
