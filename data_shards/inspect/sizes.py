"""`data_shards verify --sizes`: is every shard there, as large as its manifest says, and readable at both ends?

    python -m data_shards verify s3://rs5m/train/ --sizes true

Local and remote shards alike, by two small reads each and nothing kept: what a host can say of 500 GB within seconds.
`python -m cluster check` asks every host for it, as JSON, and compares their digests.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from priorclip.data_shards.find_shards import CONCURRENT_REQUESTS, FolderManifests, find_shards
from priorclip.data_shards.remote.http_ranges import RemoteError
from priorclip.data_shards.remote.shard_files import Access, RemoteFile, ShardFile

LISTED = 20  # shards whose problems are told one by one
END = 512  # bytes: a tar's block


@dataclass
class ShardSizes:
    """What one machine sees of a shard specification.

    Args:
        count: shards that are right
        bytes: theirs
        digest: twelve digits of their names and sizes
        wrong: shards that are not
        problems: why, by shard, of the first of them
    """

    count: int = 0
    bytes: int = 0
    digest: str = ""
    wrong: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def check_sizes(spec: str, timeout: float = 20.0) -> ShardSizes:
    """Ask for all of them; ``timeout`` seconds for a request. A specification that gives nothing is its own problem."""
    access = Access.from_options(limit=0, timeout=timeout)
    manifests = FolderManifests(access)
    try:
        files = find_shards(spec, None, access, manifests)
        wanted = [entry.bytes if (entry := manifests.entry(file)) else None for file in files]
    except (OSError, ValueError) as error:
        return ShardSizes(wrong=1, problems={"the shards": str(error)})
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        seen = list(pool.map(check_size, files, wanted))
    right = sorted((file.identity, found) for file, found in zip(files, seen, strict=True) if isinstance(found, int))
    wrong = {str(file): found for file, found in zip(files, seen, strict=True) if isinstance(found, str)}
    text = "".join(f"{name}:{size}\n" for name, size in right)
    return ShardSizes(
        len(right), sum(size for _, size in right), hashlib.sha256(text.encode()).hexdigest()[:12],
        len(wrong), dict(list(wrong.items())[:LISTED]),
    )  # fmt: skip


def check_size(file: ShardFile, wanted: int | None) -> int | str:
    """Bytes of a shard, or why it cannot be streamed, as far as its size and its two ends tell."""
    try:
        size = file.size
        if wanted is not None and size != wanted:
            return f"{size} bytes, {wanted} in the manifest"
        if not size:
            return "is empty"
        if isinstance(file, RemoteFile) and not file.version.ranges:
            return size  # a server that gives whole files only
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
