"""Decides which files an index may name. Somebody else may have written the index.

    places = ImagePlaces(Path("runs/index"), ["/data/AID"])
    places.read({"key": "a", "path": "/data/AID/beach/1.jpg"})                # its bytes
    places.read({"key": "a", "shard": "/data/t-0.tar", "sample": 3})          # UnsafePath: /data is not allowed
    places.read({"key": "a", "shard": "pipe:id > X", "sample": 0})            # UnsafePath
    places.read({"key": "a", "path": "/data/AID/link-to-passwd"})             # UnsafePath: the link leaves the folder

A name in an index may be a regular file below one of these folders, after all symbolic links are resolved:

    the folder that holds the index, so that an index moves together with its images
    the working directory
    what the user names by ``--data``

``pipe:``, URLs, ``..``, devices and named pipes are refused. A URL is read only if ``--data`` names the same URL.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from priorclip.common.safe_paths import UnsafePath, join_under
from priorclip.data_shards.find_shards import find_shards
from priorclip.data_shards.format.manifest import NAME as MANIFEST
from priorclip.data_shards.format.member_runs import MAX_MEMBER
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.format.shard_index import index_path
from priorclip.data_shards.remote.shard_files import RemoteFile
from priorclip.data_shards.shards import ShardSet


class ImagePlaces:
    """The files that the index in ``folder`` may name.

    Args:
        folder: of the index
        data: folders, files and shards that the user names, as for `index --data`

    Raises:
        OSError, ValueError: ``data`` names something that does not exist
    """

    def __init__(self, folder: Path, data: Sequence[str] = ()) -> None:
        self.index = folder.resolve()
        near = [self.index.parent, Path.cwd().resolve()]
        self.allowed = [place for place in near if place != place.parent]  # never the whole file system
        self.remote: dict[str, str] = {}  # address without credentials -> URL with them
        for piece in data:
            if os.path.exists(piece):
                self.allowed.append(Path(piece).resolve())
                continue
            for file in find_shards(piece):
                if isinstance(file, RemoteFile):
                    self.remote[file.address] = file.url
                else:
                    self.allowed.append(file.path.resolve())

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """Returns the encoded bytes of the image that an entry of the index describes.

        Raises:
            UnsafePath: the entry names a file that is not allowed
            OSError, BadSample: the file is missing or cannot be read, or another image is in its place
        """
        if "path" in entry:
            return read_file(self.find(entry["path"]))
        url = self.remote.get(entry["shard"])
        sample = open_shard(url or check_shard(self.find(entry["shard"]))).read(entry["sample"])
        if sample.key != entry["key"]:
            raise BadSample("shard has changed", f"{entry['shard']} holds {sample.key} in place of {entry['key']}")
        return sample.image

    def find(self, name: str) -> Path:
        """Returns the resolved path of an image file or a tar that the index names. Raises UnsafePath."""
        path = self.resolve(name)
        if not any(path.is_relative_to(place) for place in self.allowed):
            raise UnsafePath(
                f"{self.index} names {path}, which is outside the working directory and the folder of the index. If "
                f"you trust the index, allow it with --data {path.parent}"
            )
        return path

    def resolve(self, name: str) -> Path:
        """Returns the resolved path of a name that is no URL, no command and has no ``..``. Raises UnsafePath."""
        folder, below = (Path("/"), name.lstrip("/")) if name.startswith("/") else (self.index, name)
        return Path(os.path.realpath(join_under(folder, below, self.index)))


def read_file(path: Path) -> bytes:
    """Returns the content of a regular file. Never waits for a named pipe. Raises OSError, BadSample."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("no regular file", str(path))
        if status.st_size > MAX_MEMBER:
            raise BadSample("image is too large", f"{path} has {status.st_size} bytes")
        return file.read()


def check_shard(tar: Path) -> Path:
    """Returns the path. Raises BadSample if the tar, its index or its manifest is no regular file."""
    for path in (tar, index_path(tar), tar.parent / MANIFEST):
        if path.exists() and not path.is_file():
            raise BadSample("no regular file", str(path))
    return tar


@lru_cache(maxsize=256)
def open_shard(shard: str | Path) -> ShardSet:
    """Opens one shard. A Path is exactly this file; only a URL of the user is a text. Raises OSError, BadSample."""
    try:
        return ShardSet([shard])
    except ValueError as error:
        raise BadSample("shard cannot be read", str(error)) from error
