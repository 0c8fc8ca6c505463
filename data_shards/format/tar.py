"""Reads the members of an uncompressed tar in order, also if the tar is damaged.

    |header a.jpg|image...|header a.json|{...}|##damaged##|image...|header b.json|{...}| end mark |

yields a.jpg, a.json, b.json, and reports the damage. Python's tarfile stops silently at the first header that it cannot
read. This module goes on at the next block that has the magic and the checksum of a header. It does not trust a header:
it reads at most ``HEADER_BYTES`` for one (with long names and pax records), compares a size with the file before it
allocates memory, and only moves forwards.
"""

from __future__ import annotations

import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from priorclip.data_shards.format.sample import BadSample, is_member

BLOCK = tarfile.BLOCKSIZE
MAX_TAR = 1 << 43  # bytes
HEADER_BYTES = 1 << 20  # of one header, with its long name and pax records
SEARCHED = 8192 * BLOCK  # bytes that the search for the next header reads at a time
MAGIC = slice(257, 262)
DAMAGE = (tarfile.TarError, ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, struct.error)


def read_members(
    path: Path, read: bool, damage: Callable[[str], object]
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Yields the regular members that belong to samples, with their bytes if ``read``.

    Calls ``damage`` with a description of each damaged place. If a member reaches past the end of the file, its bytes
    are ``b""``. Raises ValueError for a compressed tar, because it has no random access, and for what is no file.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"{path} is gzip-compressed and has no random access: unpack it with gunzip first")
        if size == 0:
            damage("the file has no bytes")
        count, place = 0, 0
        while place < size:
            begun = place
            for info, place in read_intact_run(file, begun):
                fits = info.issparse() or not info.isreg() or info.offset_data + info.size <= size
                if not fits:
                    damage(f"damaged or cut short after {count} members: {info.name} reaches past the end of the file")
                    place = info.offset_data  # what its size is worth shows in whether headers follow
                count += 1
                if info.issparse():
                    damage(f"member {info.name} is sparse, which cannot be read in place: pack the tar without -S")
                elif info.isreg() and is_member(info.name):
                    file.seek(info.offset_data)
                    yield info, (file.read(info.size) if fits else b"") if read else None
                if not fits:
                    break
            following = find_header(file, place + BLOCK * (place == begun), size)
            file.seek(place)
            block = file.read(BLOCK)
            if following < size:
                what = "an end mark" if block == bytes(BLOCK) else "no header"
                damage(f"damaged or cut short after {count} members: {what} at byte {place}, a header at {following}")
            elif block != bytes(BLOCK) and size:
                damage(f"damaged or cut short after {count} members: neither header nor end mark at byte {place}")
            place = following


def read_intact_run(file: BinaryIO, start: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yields members from ``start`` on, each with the offset of the next, up to the first damaged header."""
    headers = HeaderFile(file)
    headers.seek(start)
    try:
        with tarfile.TarFile(fileobj=headers, mode="r") as tar:  # type: ignore[arg-type]
            while (info := tar.next()) is not None and info.size >= 0 and tar.offset > info.offset:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header that it has read
                yield info, tar.offset
                headers.left = HEADER_BYTES
    except DAMAGE:
        return


def find_header(file: BinaryIO, start: int, size: int) -> int:
    """Returns the offset of the first block from ``start`` on with a header's magic and checksum, or ``size``."""
    while start < size:
        file.seek(start)
        data = file.read(SEARCHED)
        rows = np.frombuffer(data, np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
        for row in np.flatnonzero((rows[:, MAGIC] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)).tolist():
            try:
                tarfile.TarInfo.frombuf(rows[row].tobytes(), tarfile.ENCODING, "surrogateescape")
            except DAMAGE:
                continue
            return start + row * BLOCK
        start += SEARCHED
    return size


def check_header(header: bytes, name: str, size: int) -> None:
    """Checks that the block before a member's bytes is its header. Raises BadSample if the tar does not fit its index.

    Args:
        header: the 512 bytes
        name: key of the member, with its folders; compared if it is ASCII and short enough to be there whole
        size: bytes of the member
    """
    stored = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        stored = header[345:500].split(b"\0", 1)[0] + b"/" + stored
    if name.isascii() and len(name) < 90 and not stored.startswith(name.encode()):
        raise BadSample("index does not fit", f"the tar has {stored[:200]!r} in place of {name!r}")
    try:
        stored_size = tarfile.nti(header[124:136])  # type: ignore[attr-defined]
    except DAMAGE as error:
        raise BadSample("index does not fit", f"the header of {name!r} is damaged") from error
    if stored_size != size and stored_size != 0:  # pax writes 0 if the size has a record of its own
        raise BadSample("index does not fit", f"{name!r} has {stored_size} bytes in the tar, {size} in the index")


def blocks(size: int) -> int:
    """Returns ``size`` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class HeaderFile:
    """The file from which tarfile reads headers. Raises ReadError past HEADER_BYTES of one header or past the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left, self.place = file, HEADER_BYTES, 0

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0 or size < 0:
            raise tarfile.ReadError("a header is damaged: it is too long")
        self.file.seek(self.place)
        data = self.file.read(size)
        self.left -= BLOCK if not data else 0  # counts reads at the end too, so that they end
        self.place += len(data)
        return data

    def seek(self, place: int) -> None:
        self.place = place

    def tell(self) -> int:
        return self.place
