"""`data_shards verify --sizes`: checks that each shard exists, has its manifest's size and can be read at both ends.

    python -m data_shards verify s3://rs5m/train/ --sizes true

It makes two small reads per local or remote shard and keeps nothing, so a host checks 500 GB within seconds.
`python -m cluster check` runs it on each host with JSON output and compares the digests.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from priorclip.data_shards.find_shards import CONCURRENT_REQUESTS, FolderManifests, find_shards
from priorclip.data_shards.remote.http_ranges import RemoteError
from priorclip.data_shards.remote.shard_files import Access, RemoteFile, ShardFile

LISTED = 20  # shards whose problems are listed one by one
END = 512  # bytes of a tar's block


@dataclass
class ShardSizes:
    """The shards of a specification as one machine sees them.

    Args:
        count: number of good shards
        bytes: their total size
        digest: twelve digits of a hash of their names and sizes
        wrong: number of shards with a problem
        problems: problem by shard, for the first of them
    """

    count: int = 0
    bytes: int = 0
    digest: str = ""
    wrong: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def check_sizes(spec: str, timeout: float = 20.0) -> ShardSizes:
    """Checks all shards, with ``timeout`` seconds per request. A specification without shards is one problem."""
    access = Access.from_options(limit=0, timeout=timeout)
    manifests = FolderManifests(access)
    try:
        files = find_shards(spec, None, access, manifests)
        wanted = [entry.bytes if (entry := manifests.entry(file)) else None for file in files]
    except (OSError, ValueError) as error:
        return ShardSizes(wrong=1, problems={"the shards": str(error)})
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        found = list(pool.map(check_size, files, wanted))
    right = sorted((file.identity, size) for file, size in zip(files, found, strict=True) if isinstance(size, int))
    wrong = {str(file): problem for file, problem in zip(files, found, strict=True) if isinstance(problem, str)}
    text = "".join(f"{name}:{size}\n" for name, size in right)
    return ShardSizes(
        len(right), sum(size for _, size in right), hashlib.sha256(text.encode()).hexdigest()[:12],
        len(wrong), dict(list(wrong.items())[:LISTED]),
    )  # fmt: skip


def check_size(file: ShardFile, wanted: int | None) -> int | str:
    """Returns the size of a shard in bytes, or its problem. It reads only the two ends."""
    try:
        size = file.size
        if wanted is not None and size != wanted:
            return f"{size} bytes, {wanted} in the manifest"
        if not size:
            return "is empty"
        if isinstance(file, RemoteFile) and not file.version.ranges:
            return size  # the server sends only whole files
        for place in (0, max(0, size - END)):
            if len(file.pread(place, END)) < min(END, size):
                return "cannot be read to its end"
        return size
    except RemoteError as error:
        return f"{error}. Is the address right, and can this host reach it?"
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    finally:
        file.close()
