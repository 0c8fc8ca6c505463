"""Files of shards, local or remote. Both have a size and ``pread(offset, length)``.

    LocalFile(Path("data/train-000000.tar")).pread(512, 4000)
    RemoteFile("https://host/data/train-000000.tar", Access.from_options("cache", "50GB")).pread(512, 4000)

A remote shard is not fetched whole. With ``limit`` > 0 it is read in chunks of 4 MiB that the node keeps (see
chunk_cache.py). Each node fetches each chunk once in the run if the limit holds all shards, and once an epoch if it
holds a shuffling window of them; W nodes transfer the shards W times. With ``limit`` 0 only the samples are
transferred: each once an epoch over all nodes together, with one request for every few neighbours. The node keeps the
small files beside the shards (manifest, .idx) in both cases.

If a server does not support range requests, the node keeps whole shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from priorclip.common.files import write_bytes
from priorclip.common.output import get_logger
from priorclip.data_shards.config import byte_count
from priorclip.data_shards.format.shard_index import HEADER_BYTES, MAX_INDEX, scan
from priorclip.data_shards.remote import http_ranges, urls
from priorclip.data_shards.remote.chunk_cache import CHUNK, ChunkCache, claim_part, fetch_once, file_lock, mark_alive
from priorclip.data_shards.remote.http_ranges import RemoteError, Version

log = get_logger(__name__)

SCAN_BLOCK = 1 << 20  # bytes that a scan reads at a time; it skips members that are larger
EVERYTHING = 1 << 62
_warned_hosts: set[str] = set()  # hosts that this process has warned about


@dataclass(frozen=True)
class Access:
    """How remote shards are read.

    Args:
        folder: folder of this node's copies
        limit: bytes of image data kept there; 0 keeps none
        timeout: seconds for one request
        chunk: bytes of a chunk
    """

    folder: Path
    limit: int
    timeout: float
    chunk: int

    @classmethod
    def from_options(cls, cache: str | None = None, limit: int | str = "50GB", timeout: float = 60.0) -> Access:
        """Builds it from options; ``cache`` None is ~/.cache/data_shards, or data_shards in XDG_CACHE_HOME."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "data_shards"
        return cls((Path(cache) if cache else home).expanduser(), byte_count(limit), timeout, CHUNK)

    @property
    def patience(self) -> float:
        """Seconds to wait for another process that fetches and makes no progress."""
        return 2 * self.timeout

    @property
    def chunks(self) -> ChunkCache:
        return ChunkCache(self.folder / "chunks", self.limit, self.patience)

    @property
    def wholes(self) -> ChunkCache:
        return ChunkCache(self.folder / "whole", self.limit or EVERYTHING, self.patience)


class LocalFile:
    """A tar on a file system, opened by the first read and kept open.

    Args:
        path: of the tar; text is kept as it is, because a set can have 200,000 tars and a Path is large
        address: what opens the tar again, and is shown; null for the path
    """

    remote = False
    __slots__ = ("_handle", "_path", "address")

    def __init__(self, path: Path | str, address: str | None = None) -> None:
        self._path = str(path)
        self.address = address or self._path
        self._handle: int | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def path(self) -> Path:
        return Path(self._path)

    @property
    def name(self) -> str:
        return os.path.basename(self._path)

    @property
    def identity(self) -> str:
        return self._path

    @property
    def size(self) -> int:
        return os.stat(self._path).st_size

    def pread(self, offset: int, length: int) -> bytes:
        """Reads at most ``length`` bytes, fewer at the end of the file; allocates no more. Raises OSError."""
        if self._handle is None:
            self._handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # waits for no named pipe
        left = os.fstat(self._handle).st_size - offset
        return os.pread(self._handle, max(0, min(length, left)), offset)

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()

    def __reduce__(self) -> tuple[type[LocalFile], tuple[str, str]]:
        return LocalFile, (self._path, self.address)  # another process opens the file itself


class RemoteFile:
    """A tar behind a URL; see the module docstring. Several threads may read.

    Args:
        url: may hold a password or a signature; ``name``, ``address`` and ``str()`` do not
        access: see Access
    """

    remote = True

    def __init__(self, url: str, access: Access) -> None:
        urls.check_scheme(url)
        self.url, self._access = url, access
        self.name = unquote(urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1])
        self.address = self.identity = urls.unsigned_url(url)
        self.expected: int | None = None  # bytes in the manifest

    def __str__(self) -> str:
        return urls.public_url(self.url)

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a local file")

    @cached_property
    def version(self) -> Version:
        """The version at the first request. Raises RemoteError."""
        version = http_ranges.fetch_version(self.url, self._access.timeout)
        host = urlsplit(self.url).netloc
        if not version.ranges and host not in _warned_hosts:
            _warned_hosts.add(host)
            log.warning(
                "the server of %s does not support range requests: whole shards are fetched into %s first",
                self,
                self._access.wholes.folder,
            )
        return version

    @property
    def size(self) -> int:
        return self.version.size

    def pread(self, offset: int, length: int) -> bytes:
        """Reads at most ``length`` bytes, fewer at the end of the file. Raises RemoteError."""
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
        """Reads bytes offset .. end - 1 of the chunk start .. stop - 1, without a copy if the cache has no room."""

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
            "remote cannot be read", f"{self}: its server sends whole files only, and {cache.folder} has no room for it"
        )

    @property
    def _key(self) -> str:
        """Name of this version of the object in the cache."""
        state = f"{self.identity} {self.size} {self._access.chunk} {self.version.etag or self.version.modified}"
        return hashlib.sha256(state.encode()).hexdigest()[:24]

    def close(self) -> None:
        """Does nothing: a remote file holds no connection."""

    def index(self, sha256: str) -> Path:
        """Returns this node's copy of the .idx with this SHA-256, 64 hex digits. Raises RemoteError, OSError."""

        def fetch() -> Iterator[bytes]:
            url = urls.url_in_folder(urls.folder_url(self.url), f"{urlsplit(self.url).path.rsplit('/', 1)[-1]}.idx")
            most = HEADER_BYTES + min(MAX_INDEX, self.size)  # a tar is larger than its index
            answer = http_ranges.fetch_file(url, self._access.timeout, most=most)
            assert answer is not None
            data = answer[0]
            if hashlib.sha256(data).hexdigest() != sha256:
                raise RemoteError(
                    "index cannot be read", f"{urls.public_url(url)} has another SHA-256 than its manifest says"
                )
            yield data

        return fetch_once(self._access.folder / "indices" / f"{sha256[:32]}.idx", self._access.patience, fetch)

    def scanned(self) -> Path:
        """Returns this node's copy of an index built from the tar's headers. Raises RemoteError, ValueError."""
        path = self._access.folder / "indices" / f"scanned-{self._key}.idx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with claim_part(path, self._access.patience) as part:
                if part is not None:
                    log.info("%s has no index: reading its headers once", self)
                    scan(ScanSource(self, lambda: mark_alive(part))).save(path)  # type: ignore[arg-type]
        return path


class ScanSource:
    """A remote file that ``scan`` can open by ``.open("rb")``. Each read calls ``step``."""

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
    """Returns the folder with this node's copy of the manifest of a remote folder; None if it has no manifest.

    Each call asks the server and fetches the manifest again only if it has changed. Raises RemoteError.
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
                write_bytes(copy, answer[0])
                write_bytes(about, json.dumps(asdict(answer[1])).encode())
            return folder
        except RemoteError as error:
            # Without the right to list the bucket, S3 answers "forbidden" for missing files.
            if error.reason == "shard is missing" or ": 403 " in error.detail:
                copy.unlink(missing_ok=True)
                return None
            raise
