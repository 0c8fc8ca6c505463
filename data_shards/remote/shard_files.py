"""Where the bytes of a shard are: a file here, or an object over there. Both have a size and ``pread(offset, length)``.

    LocalFile(Path("data/train-000000.tar")).pread(512, 4000)
    RemoteFile("https://host/data/train-000000.tar", Access.from_options("cache", "50GB")).pread(512, 4000)

A remote shard is never fetched whole. With ``limit`` > 0 it is read in chunks of 4 MiB that the node keeps
(see chunk_cache.py): every node fetches each chunk once, for all epochs where the limit holds
the shards and once an epoch where it holds a shuffling window of them; over W nodes the shards travel W times. With
``limit`` 0 just the samples travel: each once an epoch over all nodes together, one request for every few neighbours.
Small files beside the shards (manifest, .idx) are kept either way.

A server that cannot give parts of a file is the exception: there the node keeps whole shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from priorclip.data_shards.config import byte_count
from priorclip.data_shards.format.shard_index import scan, write_aside
from priorclip.data_shards.remote import http_ranges, urls
from priorclip.data_shards.remote.chunk_cache import CHUNK, ChunkCache, claim_part, fetch_once, file_lock, mark_alive
from priorclip.data_shards.remote.http_ranges import RemoteError, Version

log = logging.getLogger(__name__)

SCAN_BLOCK = 1 << 20  # bytes that a scan takes at a time: members larger than this are skipped
EVERYTHING = 1 << 62
_warned_hosts: set[str] = set()  # hosts that were remarked upon in this process


@dataclass(frozen=True)
class Access:
    """How remote shards are read.

    Args:
        folder: of the node's copies
        limit: bytes of image data kept there; 0 keeps none
        timeout: seconds that one request may take
        chunk: bytes of a chunk
    """

    folder: Path
    limit: int
    timeout: float
    chunk: int

    @classmethod
    def from_options(cls, cache: str | None = None, limit: int | str = "50GB", timeout: float = 60.0) -> Access:
        """From options as they are written; ``cache`` None is ~/.cache/data_shards (or under XDG_CACHE_HOME)."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "data_shards"
        return cls((Path(cache) if cache else home).expanduser(), byte_count(limit), timeout, CHUNK)

    @property
    def patience(self) -> float:
        """Seconds without progress after which another process that fetches is not waited for."""
        return 2 * self.timeout

    @property
    def chunks(self) -> ChunkCache:
        return ChunkCache(self.folder / "chunks", self.limit, self.patience)

    @property
    def wholes(self) -> ChunkCache:
        return ChunkCache(self.folder / "whole", self.limit or EVERYTHING, self.patience)


class LocalFile:
    """A tar on a file system, opened at the first read and kept open."""

    remote = False

    def __init__(self, path: Path, address: str | None = None) -> None:
        self.path, self.name = path, path.name
        self.address = address or str(path)
        self._handle: int | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def identity(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def pread(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes; fewer at the end of the file, and none allocated past it. Raises OSError."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        left = os.fstat(self._handle).st_size - offset
        return os.pread(self._handle, max(0, min(length, left)), offset)

    def close(self) -> None:
        """Let go of the open file; reading opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}


class RemoteFile:
    """A tar behind a URL; see the module docstring. Reads from several threads are fine.

    Args:
        url: may carry a password or a signature; ``name``, ``address`` and ``str()`` do not
        access: see Access
    """

    remote = True

    def __init__(self, url: str, access: Access) -> None:
        urls.check_scheme(url)
        self.url, self._access = url, access
        self.name = unquote(urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1])
        self.address = self.identity = urls.unsigned_url(url)
        self.expected: int | None = None  # bytes that the manifest says

    def __str__(self) -> str:
        return urls.public_url(self.url)

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a local file")

    @cached_property
    def version(self) -> Version:
        """Its state when it was first seen. Raises RemoteError."""
        version = http_ranges.fetch_version(self.url, self._access.timeout)
        host = urlsplit(self.url).netloc
        if not version.ranges and host not in _warned_hosts:
            _warned_hosts.add(host)
            log.warning(
                "the server of %s gives no parts of files: shards are fetched whole into %s before they are read",
                self,
                self._access.wholes.folder,
            )
        return version

    @property
    def size(self) -> int:
        return self.version.size

    def pread(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes; fewer at the end of the file. Raises RemoteError."""
        if self.expected not in (None, self.size):
            raise RemoteError("shard has changed", f"{self}: {self.size} bytes, its manifest says {self.expected}")
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        if not self.version.ranges:
            return self._piece(self._access.wholes, "whole", 0, self.size, offset, end)
        if not self._access.limit:
            return b"".join(http_ranges.fetch_range(self.url, offset, end - offset, self.version, self._access.timeout))
        chunks, chunk, parts = self._access.chunks, self._access.chunk, []
        for number in range(offset // chunk, (end - 1) // chunk + 1):
            start, stop = number * chunk, min((number + 1) * chunk, self.size)
            parts.append(self._piece(chunks, f"{number:06d}", start, stop, max(offset, start), min(end, stop)))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, cache: ChunkCache, name: str, start: int, stop: int, offset: int, end: int) -> bytes:
        """Bytes offset .. end - 1 of the chunk start .. stop - 1; from the network alone where it cannot be kept."""

        def fetch() -> Iterator[bytes]:
            return http_ranges.fetch_range(self.url, start, stop - start, self.version, self._access.timeout)

        handle = cache.open(f"{self._key}-{name}", stop - start, fetch)
        if handle is not None:
            try:
                return os.pread(handle, end - offset, offset - start)
            finally:
                os.close(handle)
        if self.version.ranges:
            return b"".join(http_ranges.fetch_range(self.url, offset, end - offset, self.version, self._access.timeout))
        raise RemoteError(
            "remote cannot be read", f"{self}: its server gives whole files only, and {cache.folder} has no room for it"
        )

    @property
    def _key(self) -> str:
        """Name of this state of this object in the cache."""
        state = f"{self.identity} {self.size} {self._access.chunk} {self.version.etag or self.version.modified}"
        return hashlib.sha256(state.encode()).hexdigest()[:24]

    def close(self) -> None:
        """Nothing is held open."""

    def index(self, sha256: str) -> Path:
        """The node's copy of the .idx beside it, which must have this SHA-256. Raises RemoteError, OSError."""

        def fetch() -> Iterator[bytes]:
            url = urls.url_in_folder(urls.folder_url(self.url), f"{urlsplit(self.url).path.rsplit('/', 1)[-1]}.idx")
            answer = http_ranges.fetch_file(url, self._access.timeout)
            assert answer is not None
            data = answer[0]
            if hashlib.sha256(data).hexdigest() != sha256:
                raise RemoteError(
                    "index cannot be read", f"{urls.public_url(url)} is not the one that the manifest names"
                )
            yield data

        return fetch_once(self._access.folder / "indices" / f"{sha256[:32]}.idx", self._access.patience, fetch)

    def scanned(self) -> Path:
        """The node's copy of its index as its headers say it, walked once. Raises RemoteError, ValueError."""
        path = self._access.folder / "indices" / f"scanned-{self._key}.idx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with claim_part(path, self._access.patience) as part:
                if part is not None:
                    log.info("%s has no index: its headers are walked once", self)
                    scan(Walked(self, lambda: mark_alive(part))).save(path)  # type: ignore[arg-type]
        return path


class Walked:
    """A remote file as ``scan`` opens one: ``.open("rb")``; ``step`` is called at each read."""

    def __init__(self, file: RemoteFile, step: Callable[[], None]) -> None:
        self.file, self.step = file, step

    def __str__(self) -> str:
        return str(self.file)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        return io.BufferedReader(_Raw(self.file, self.step), SCAN_BLOCK)


class _Raw(io.RawIOBase):
    def __init__(self, file: RemoteFile, step: Callable[[], None]) -> None:
        self._file, self._step, self._place = file, step, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer) -> int:
        data = self._file.pread(self._place, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        self._step()
        return len(data)


ShardFile = LocalFile | RemoteFile


def fetch_manifest(url: str, access: Access) -> Path | None:
    """The folder with the node's copy of the manifest in the remote folder ``url``; None where there is none.

    The copy is asked after at each start, and fetched again only where it has changed. Raises RemoteError.
    """
    place = urls.url_in_folder(url, "manifest.json")
    folder = access.folder / "manifests" / urls.url_hash(place)
    folder.mkdir(parents=True, exist_ok=True)
    copy, about = folder / "manifest.json", folder / "version.json"
    with file_lock(folder / ".lock", access.patience):
        try:
            known = None
            with contextlib.suppress(OSError, ValueError, TypeError):
                known = Version(**json.loads(about.read_text())) if copy.exists() else None
            answer = http_ranges.fetch_file(place, access.timeout, known)
            if answer is not None:
                write_aside(copy, answer[0])
                write_aside(about, json.dumps(asdict(answer[1])).encode())
            return folder
        except RemoteError as error:
            # S3 says "forbidden" of what is not there to those who may not list the bucket.
            if error.reason == "shard is missing" or ": 403 " in error.detail:
                copy.unlink(missing_ok=True)
                return None
            raise
