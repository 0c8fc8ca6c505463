"""Finds the shards that a specification names, and what their manifests say.

data/train                                folder: the tars of its manifest, or all its tars if it has none
data/{pub11,rs3}-train-{0000..0031}.tar   braces
data/train-*.tar                          wildcards
https://host/train-0000.tar               one remote shard
s3://bucket/train/                        remote folder: the tars of its manifest
pipe:ssh store cat /data/a.tar            what a command prints, kept in the cache
Path("data/{a}.tar")                      in Python: exactly this file, braces and wildcards have no meaning
"""

from __future__ import annotations

import glob
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, urlsplit

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from priorclip.common.safe_paths import plain_name
from priorclip.data_shards.corpus import Corpus
from priorclip.data_shards.format.foreign_layout import MAX_BYTES, PLAIN, Layout, find_layout, read_layout
from priorclip.data_shards.format.index_reader import IndexReader
from priorclip.data_shards.format.manifest import NAME, Manifest, ShardEntry
from priorclip.data_shards.format.sample import JSON_MEMBER
from priorclip.data_shards.format.shard_index import SUFFIX, ShardIndex, scan
from priorclip.data_shards.order.mixture import MixturePart
from priorclip.data_shards.remote.http_ranges import RemoteError, fetch_file
from priorclip.data_shards.remote.pipe_shards import fetch_pipe
from priorclip.data_shards.remote.shard_files import Access, LocalFile, RemoteFile, ShardFile, fetch_manifest
from priorclip.data_shards.remote.urls import folder_url, is_remote, public_url, url_in_folder

CONCURRENT_REQUESTS = 16  # remote shards that are checked at the same time
PROGRESS = ".pack"  # folder that `data_shards pack` keeps until it has finished


class FolderManifests:
    """The manifest of each folder that holds shards, read once.

    Attributes:
        of: manifest or None, by folder: a path, or a URL with its credentials
    """

    def __init__(self, access: Access) -> None:
        self.of: dict[Path | str, Manifest | None] = {}
        self._access = access
        self._entries: dict[Path | str, dict[str, ShardEntry]] = {}
        self._layouts: dict[Path | str, Layout] = {}

    def load(self, folder: Path | str) -> Manifest | None:
        """Returns the manifest of a folder, or None if it has none. Raises OSError if the host does not answer."""
        if folder not in self.of:
            try:
                place = fetch_manifest(folder, self._access) if isinstance(folder, str) else folder
            except RemoteError as error:
                raise OSError(f"{error}. Is the address right, and can this node reach it?") from error
            shown = public_url(url_in_folder(folder, NAME)) if isinstance(folder, str) else None
            self.of[folder] = manifest = Manifest.load(place, shown) if place else None
            self._entries[folder] = {entry.name: entry for entry in manifest.shards} if manifest else {}
        return self.of[folder]

    def is_pack(self, file: ShardFile) -> bool:
        """Tells whether `data_shards pack` wrote the folder of a shard: its manifest has a fingerprint."""
        manifest = self.load(folder_of(file))
        return manifest is not None and bool(manifest.fingerprint)

    def layout(self, folder: Path | str) -> Layout:
        """Returns what CLIP Benchmark's files beside the tars say, read once. Raises as `foreign_layout`."""
        if folder not in self._layouts:
            if isinstance(folder, str):
                place, timeout = folder, self._access.timeout
                found = read_layout(public_url(folder), lambda name: fetch_beside(place, name, timeout))
            else:
                found = find_layout(folder)
            self._layouts[folder] = found
        return self._layouts[folder]

    def entry(self, file: ShardFile) -> ShardEntry | None:
        """Returns the entry of a shard in the manifest of its folder."""
        folder = folder_of(file)
        self.load(folder)
        return self._entries[folder].get(file.name)


def find_shards(
    spec: str | Sequence[str | Path],
    cache: str | None = None,
    access: Access | None = None,
    manifests: FolderManifests | None = None,
) -> list[ShardFile]:
    """Returns the shards of a specification, in its order.

    It fetches ``pipe:`` shards and the manifests of remote folders.

    Raises:
        ValueError, OSError: a piece of the specification names no shard, or a shard twice
    """
    pieces = [spec] if isinstance(spec, str) else list(spec)
    access = access or Access.from_options(cache)
    manifests = manifests or FolderManifests(access)
    files: list[ShardFile] = []
    for piece in pieces:
        files += _files_of(piece, access, manifests)
    if not files:
        raise ValueError(f"the shard specification {spec!r} is empty")
    refuse_duplicates(files, [public_url(str(piece)) for piece in pieces])
    return files


def _files_of(piece: str | Path, access: Access, manifests: FolderManifests) -> list[ShardFile]:
    if isinstance(piece, Path):
        return [LocalFile(path) for path in (_in_folder(piece, manifests) if piece.is_dir() else [str(piece)])]
    if piece.startswith("pipe:"):
        return [LocalFile(fetch_pipe(piece, str(access.folder), access.timeout))]
    try:
        names = list(braceexpand(piece))
    except UnbalancedBracesError as error:
        raise ValueError(f"unbalanced braces in the shard pattern {public_url(piece)!r}") from error
    files: list[ShardFile] = []
    for name in names:
        files += _remote(name, access, manifests) if is_remote(name) else map(LocalFile, _local(name, manifests))
    return files


def _remote(url: str, access: Access, manifests: FolderManifests) -> list[RemoteFile]:
    """Returns the tar at a URL, or the tars of a remote folder's manifest."""
    if not urlsplit(url).path.endswith("/"):
        return [RemoteFile(url, access)]
    manifest = manifests.load(url)
    if manifest is None:
        raise FileNotFoundError(
            f"{public_url(url)} has no manifest.json: run `data_shards index` before the upload, or name each tar"
        )
    return [RemoteFile(url_in_folder(url, quote(entry.name)), access) for entry in manifest.shards]


def _local(name: str, manifests: FolderManifests) -> Sequence[str]:
    path = Path(name.removeprefix("file://")).expanduser()
    if path.is_dir():
        return _in_folder(path, manifests)
    if any(letter in name for letter in "*?[") and not path.exists():
        found = sorted(glob.glob(str(path)))
        if not found:
            raise FileNotFoundError(f"no file matches {name!r}")
        return found
    return [str(path)]


def _in_folder(folder: Path, manifests: FolderManifests) -> Sequence[str]:
    manifest = manifests.load(folder)
    if not manifest and (folder / PROGRESS).is_dir():
        raise ValueError(f"{folder} is half packed: run the same `data_shards pack` command again to finish it")
    if manifest:
        named = [os.path.join(folder, plain_name(entry.name, folder / NAME)) for entry in manifest.shards]
    else:
        named = sorted(map(str, folder.glob("*.tar")))
    if not named:
        raise FileNotFoundError(f"no tar in the folder {folder}")
    return named


def check_shards(found: Sequence[tuple[ShardFile, ShardEntry | None]]) -> list[ShardIndex | IndexReader | None]:
    """Checks that each shard exists. Scans those that have no manifest entry or no .idx and returns their indices.

    Raises:
        OSError: a shard is missing, or its host does not answer
        ValueError: a shard is not a tar
    """

    def check(pair: tuple[ShardFile, ShardEntry | None]) -> ShardIndex | IndexReader | None:
        file, entry = pair
        if isinstance(file, RemoteFile):
            try:
                size = file.size
                if entry:
                    file.expected = entry.bytes
                return None if entry and size >= 0 else IndexReader(file.scanned())
            except RemoteError as error:
                kind = FileNotFoundError if error.reason == "shard is missing" else OSError
                raise kind(f"{error}. Is the address right, and can this node reach it?") from error
        path = file.identity  # Path.is_file takes three times as long, and there can be 200,000
        if not os.path.isfile(path):
            raise FileNotFoundError(f"shard {file} does not exist")
        return None if entry and os.path.isfile(path + SUFFIX) else scan(file.path)

    if not any(file.remote for file, _ in found):
        return [check(pair) for pair in found]
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return list(pool.map(check, found))


def foreign_layout(file: ShardFile, extensions: Sequence[str], manifests: FolderManifests) -> Layout:
    """Returns the layout of a shard's folder, which is the plain one if samples have KEY.json.

    Args:
        file: the shard
        extensions: of its members
        manifests: of the folders

    Raises:
        ValueError: a file of CLIP Benchmark is damaged, or names a kind of set that is not read
        OSError: the host does not answer
    """
    if JSON_MEMBER in extensions:
        return PLAIN
    return manifests.layout(folder_of(file))


def folder_of(file: ShardFile) -> Path | str:
    return folder_url(file.url) if isinstance(file, RemoteFile) else _folder(os.path.dirname(file.identity))


@lru_cache
def _folder(path: str) -> Path:
    """One Path for all shards of a folder, because it is looked up for each."""
    return Path(path)


def fetch_beside(folder: str, name: str, timeout: float) -> bytes | None:
    """Returns a file in a remote folder, or else in the folder above; None if there is none. Raises OSError."""
    for place in (folder, folder_url(folder.rstrip("/"))):
        try:
            fetched = fetch_file(url_in_folder(place, name), timeout, most=MAX_BYTES)
        except RemoteError as error:
            if error.reason == "shard is missing" or ": 403 " in error.detail:
                continue
            raise OSError(f"{error}. Is the address right, and can this node reach it?") from error
        if fetched is not None:
            return fetched[0]
    return None


def refuse_duplicates(files: Sequence[ShardFile], spec: object) -> None:
    """Raises ValueError if a shard is named twice, also in two corpora, because its samples would count twice."""
    counts = Counter(file.identity for file in files)
    for file in files:
        if counts[file.identity] > 1:
            raise ValueError(f"shard {file} is named twice in {spec!r}; to repeat it in an epoch, give it a weight")


def mixture_parts(mixed: Sequence[Corpus], shards: Sequence[int], sizes: Sequence[int]) -> list[MixturePart]:
    """Returns the corpora with the sizes of their shards.

    Args:
        mixed: the corpora
        shards: number of shards of each corpus
        sizes: samples of each shard, corpus after corpus

    Raises:
        ValueError: a corpus has no sample
    """
    ends = [sum(shards[: number + 1]) for number in range(len(shards))]
    parts = [
        MixturePart(
            array("q", sizes[end - count : end]),
            corpus.weight,
            ", ".join(public_url(str(piece)) for piece in corpus.shards),
        )
        for corpus, count, end in zip(mixed, shards, ends, strict=True)
    ]
    for part in parts:
        if not part.samples:
            raise ValueError(f"no sample in {part.name}: {len(part.sizes)} shards, all of them empty")
    return parts
