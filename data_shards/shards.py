"""A set of shards as one long array: ``shards[i]`` is a seek, whatever i is.

    shards = ShardSet("data/train")                                   # folder: the tars of its manifest
    shards = ShardSet("data/{pub11,rs3}-train-{0000..0031}.tar")      # braceexpand
    shards = ShardSet(["data/train", "https://host/more-0000.tar"])   # list of either
    shards = ShardSet({"data/pub11": 1, "data/rs3": 2.5})             # two corpora, see data_shards.corpus
    shards = ShardSet("s3://bucket/train/")                           # remote folder, by its manifest
    len(shards), shards.classes, shards.read(41)

With a manifest nothing but that is opened at the start: the ``.idx`` of a shard is opened when a sample of the shard is
read, and then read in place. Without one the headers of each tar are walked once. Remote shards are read in place too,
see :mod:`priorclip.data_shards.remote.shard_files`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from priorclip.data_shards.corpus import Corpus, Shards, corpora
from priorclip.data_shards.format.class_names import unique_classes
from priorclip.data_shards.format.index_reader import IndexReader
from priorclip.data_shards.format.manifest import Manifest, ShardEntry
from priorclip.data_shards.format.sample import IMAGE_MEMBERS, USED_MEMBERS, BadSample, Sample, parse_sample, parse_text
from priorclip.data_shards.format.shard_index import Member, ShardIndex, scan
from priorclip.data_shards.format.tar import BLOCK, check_header
from priorclip.data_shards.order.mixture import MixturePart
from priorclip.data_shards.remote.http_ranges import RemoteError
from priorclip.data_shards.remote.pipe_shards import fetch_pipe
from priorclip.data_shards.remote.read_ahead import Need, ReadAhead
from priorclip.data_shards.remote.shard_files import Access, LocalFile, RemoteFile, ShardFile, fetch_manifest
from priorclip.data_shards.remote.urls import folder_url, is_remote, public_url, url_in_folder

log = logging.getLogger(__name__)

INDICES_KEPT, FILES_KEPT = 192, 192  # open files, of the 1,024 that a process may usually have
READ_OVER = 1 << 16  # bytes between two members that are cheaper read than skipped
MAX_MEMBER = 1 << 30  # bytes; no image or caption is larger, a damaged index or header says anything
ASKED_TOGETHER = 16  # remote shards that are looked at together when a set is opened
PROGRESS = ".pack"  # folder of what `data_shards pack` has not finished yet


class ShardSet:
    """Random access to the samples of many tars.

    Args:
        spec: folder, tar, URL, braceexpand or glob pattern, or a list of them, or a mix as data_shards.corpus has it;
            order matters, as it is the order of the sample indices
        cache: folder for the node's copies of remote shards; None is ~/.cache/data_shards
        cache_limit: bytes of them, e.g. "50GB"; 0 keeps no image data
        timeout: seconds that one request may take
        read_ahead: requests that a process has under way, see :meth:`prefetch`; 0 reads one sample after the other

    Attributes:
        files: where the bytes of each shard are; ``str()`` of one is for messages, ``address`` opens it again
        sizes: samples of each shard
        parts: corpora and weights of a mix; one of weight 1 otherwise
        classes: scene classes of the manifests, sorted, each in one spelling; a label's id is its place here
    """

    def __init__(
        self,
        spec: str | Sequence[str] | Shards,
        cache: str | None = None,
        cache_limit: int | str = "50GB",
        timeout: float = 60.0,
        read_ahead: int = 16,
    ) -> None:
        mixed = corpora(spec)
        self.spec = [public_url(piece) for corpus in mixed for piece in corpus.shards]
        self.files: list[ShardFile] = []
        self._ahead = ReadAhead(read_ahead)
        access = Access.of(cache, cache_limit, timeout)
        self.sizes: list[int] = []
        self._scanned: dict[int, ShardIndex] = {}
        self._indices: OrderedDict[int, IndexReader] = OrderedDict()
        self._open: OrderedDict[int, None] = OrderedDict()  # local files, the one used last at the end
        self._entries: dict[int, ShardEntry] = {}
        manifests = Manifests(access)
        found = [expand(corpus.shards, cache, access, manifests) for corpus in mixed]
        files = [(file, manifests.entry(file)) for corpus in found for file in corpus]
        refuse_twice([file for file, _ in files], self.spec)
        for (file, entry), index in zip(files, looked_at(files), strict=True):
            self._add(file, entry, index)
        folders = manifests.of
        self.manifests = [manifest for manifest in folders.values() if manifest]
        self.classes = unique_classes({name for manifest in self.manifests for name in manifest.classes})
        self._starts = np.cumsum([0, *self.sizes], dtype=np.int64)
        self.parts = parts_of(mixed, [len(corpus) for corpus in found], self.sizes)
        if not len(self):
            raise ValueError(f"no sample in {self.spec}: {len(self.files)} shards, all of them empty")

    def _add(self, file: ShardFile, entry: ShardEntry | None, index: ShardIndex | IndexReader | None) -> None:
        """Take a shard, with the index that was scanned where no manifest knows it or its .idx is missing."""
        shard = len(self.files)
        if index is not None:
            if isinstance(index, ShardIndex):
                self._scanned[shard] = index
            self.sizes.append(len(index))
        else:
            assert entry is not None
            if file.size != entry.bytes:
                log.warning("%s has not the size that its manifest says: run `data_shards verify`", file)
            self._entries[shard] = entry
            self.sizes.append(entry.samples)
        self.files.append(file)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Changes when names, sizes or weights of the shards do, which would change the order of an epoch."""
        text = "\n".join(f"{file.name} {size}" for file, size in zip(self.files, self.sizes, strict=True))
        if len(self.parts) > 1 or self.parts[0].weight != 1:
            text += "".join(f"\nweight {part.weight} of {len(part.sizes)} shards" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def locate(self, sample: int) -> tuple[int, int]:
        """Sample index -> (shard, sample in the shard)."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is outside the {len(self)} of {self.spec}")
        shard = int(self._starts.searchsorted(sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def name(self, sample: int) -> tuple[str, str]:
        """(shard path, key) of a sample, for messages; the key is "?" where the index cannot be read."""
        shard, row = self.locate(sample)
        try:
            return str(self.files[shard]), self._index(shard).key(row)
        except (BadSample, OSError, ValueError, IndexError):
            return str(self.files[shard]), "?"

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        return self._index(shard).key(row)

    def read(self, sample: int) -> Sample:
        """One sample, by one positioned read. Raises BadSample where its bytes are not there or do not parse."""
        shard, row = self.locate(sample)
        members = self._members(shard, row)
        return parse_sample(members[0].key, self._pread(shard, members), str(self.files[shard]))

    def text(self, sample: int) -> Sample:
        """One sample without reading its image (``image`` is empty)."""
        shard, row = self.locate(sample)
        members = [member for member in self._members(shard, row) if member.extension not in IMAGE_MEMBERS]
        parts = self._pread(shard, members) if members else {}
        return Sample(self._index(shard).key(row), b"", *parse_text(parts), str(self.files[shard]))

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        """Captions of one sample, without reading its image. Raises BadSample where it has none."""
        return self.text(sample).texts(caption_field)

    def prefetch(self, samples: Iterable[int], images: bool = True) -> None:
        """Begin to fetch samples that are read next, in this order; local ones cost nothing. Raises nothing.

        Args:
            samples: indices; what an earlier call announced and was not read is forgotten
            images: False where only ``text`` or ``captions`` is to be called
        """
        if not any(file.remote for file in self.files):
            return
        needs: list[Need] = []
        for sample in samples:
            shard, row = self.locate(sample)
            file = self.files[shard]
            if isinstance(file, RemoteFile):
                with contextlib.suppress(BadSample):  # met again, and counted, when it is read
                    members = self._members(shard, row)
                    chosen = [member for member in members if images or member.extension not in IMAGE_MEMBERS]
                    needs += [(file, *extent(run)) for run in side_by_side(chosen)]
        self._ahead.plan(needs)

    def _members(self, shard: int, row: int) -> list[Member]:
        index = self._index(shard)
        if row >= len(index):
            raise BadSample("index does not fit", f"that of {self.files[shard]} has {len(index)} samples")
        try:
            members = [member for member in index.members(row) if member.extension in USED_MEMBERS]
        except (OSError, ValueError) as error:
            raise BadSample("index cannot be read", str(error)) from error
        if not members:
            raise BadSample("no image", "no member of a known kind")
        return members

    def _pread(self, shard: int, members: list[Member]) -> dict[str, bytes]:
        """Bytes of members, by extension; of two with one extension the first counts.

        Members that lie side by side are one read. Raises BadSample where the tar is not what the index says.
        """
        parts: dict[str, bytes] = {}
        for run in side_by_side(members):
            start, length = extent(run)
            data = self._read_at(shard, start, length)
            for member in run:
                place = member.offset - start
                check_header(data[place - BLOCK : place], member.key, member.size)
                parts.setdefault(member.extension, data[place : place + member.size])
        return parts

    def _read_at(self, shard: int, start: int, length: int) -> bytes:
        """``length`` bytes of a shard. Raises BadSample where they cannot be had."""
        file = self.files[shard]
        try:
            if isinstance(file, RemoteFile):
                data = self._ahead.take(file, start, length)
            else:
                data = self._read_local(shard, file, start, length)
        except RemoteError as error:
            raise BadSample(error.reason, error.detail) from error
        except OSError as error:
            file.close()
            reason = "shard is missing" if error.errno == errno.ENOENT else "shard cannot be read"
            raise BadSample(reason, str(error)) from error
        if len(data) < length:
            file.close()  # it may have been replaced by a whole one by the next time
            raise BadSample("shard is cut short", f"{length} bytes at {start} reach past its end")
        return data

    def _read_local(self, shard: int, file: LocalFile, start: int, length: int) -> bytes:
        """From a file that stays open, as the last ``FILES_KEPT`` do; opened anew where its handle is stale."""
        self._open[shard] = None
        self._open.move_to_end(shard)
        if len(self._open) > FILES_KEPT:
            self.files[self._open.popitem(last=False)[0]].close()
        try:
            return file.pread(start, length)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            file.close()
            return file.pread(start, length)

    def _index(self, shard: int) -> ShardIndex | IndexReader:
        if shard in self._scanned:
            return self._scanned[shard]
        if shard not in self._indices:
            try:
                self._indices[shard] = self._load_index(shard)
            except (OSError, ValueError) as error:
                raise BadSample("index cannot be read", str(error)) from error
            if len(self._indices) > INDICES_KEPT:
                self._indices.popitem(last=False)
        self._indices.move_to_end(shard)
        return self._indices[shard]

    def _load_index(self, shard: int) -> IndexReader:
        """The .idx of a shard; of a remote one that lacks it, or has another's, what its headers say."""
        file, entry = self.files[shard], self._entries.get(shard)
        if isinstance(file, LocalFile):
            return IndexReader(index_path(file.path))
        if entry is not None:
            try:
                return IndexReader(file.index(entry.index_sha256))
            except RemoteError as error:
                if error.reason == "remote cannot be read":
                    raise
                log.warning("%s: %s; its headers are walked instead", file, error)
        return IndexReader(file.scanned())

    def close(self) -> None:
        """Close the tars that are open; reading opens them again."""
        while self._open:
            self.files[self._open.popitem()[0]].close()
        self._indices.clear()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict:
        """Open files and loaded indices stay behind: a worker process opens its own."""
        return {**self.__dict__, "_open": OrderedDict(), "_indices": OrderedDict()}


class Manifests:
    """The manifest of every folder that shards lie in, read once.

    Attributes:
        of: manifest, or None, by folder: a path, or the URL with its secrets
    """

    def __init__(self, access: Access) -> None:
        self.of: dict[Path | str, Manifest | None] = {}
        self._access = access
        self._entries: dict[Path | str, dict[str, ShardEntry]] = {}

    def load(self, folder: Path | str) -> Manifest | None:
        if folder not in self.of:
            try:
                place = fetch_manifest(folder, self._access) if isinstance(folder, str) else folder
            except RemoteError as error:
                raise OSError(f"{error}. Is the address right, and can this node reach it?") from error
            self.of[folder] = manifest = Manifest.load(place) if place else None
            self._entries[folder] = {entry.name: entry for entry in manifest.shards} if manifest else {}
        return self.of[folder]

    def entry(self, file: ShardFile) -> ShardEntry | None:
        """What the manifest of its folder says of a shard."""
        folder = folder_url(file.url) if isinstance(file, RemoteFile) else file.path.parent
        self.load(folder)
        return self._entries[folder].get(file.name)


def looked_at(found: Sequence[tuple[ShardFile, ShardEntry | None]]) -> list[ShardIndex | IndexReader | None]:
    """That each shard is there; and the scanned index of those that need one. Raises OSError, ValueError."""

    def look(pair: tuple[ShardFile, ShardEntry | None]) -> ShardIndex | IndexReader | None:
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
        if not file.path.is_file():
            raise FileNotFoundError(f"shard {file} does not exist")
        return None if entry and index_path(file.path).is_file() else scan(file.path)

    if not any(file.remote for file, _ in found):
        return [look(pair) for pair in found]
    with ThreadPoolExecutor(ASKED_TOGETHER) as pool:
        return list(pool.map(look, found))


def extent(run: Sequence[Member]) -> tuple[int, int]:
    """(offset, length) of members that lie side by side, with the header of the first."""
    start = run[0].offset - BLOCK
    return start, run[-1].offset + run[-1].size - start


def side_by_side(members: Sequence[Member]) -> list[list[Member]]:
    """Members of a sample in the order of their place, in runs with no more than READ_OVER bytes between them."""
    runs: list[list[Member]] = []
    end = -1
    for member in sorted(members, key=lambda member: member.offset):
        if member.size > MAX_MEMBER or member.offset < BLOCK:
            raise BadSample("member is too large", f".{member.extension} has {member.size} bytes at {member.offset}")
        if runs and member.offset - end <= READ_OVER:
            runs[-1].append(member)
        else:
            runs.append([member])
        end = member.offset + member.size
    return runs


def index_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.idx")


def expand(
    spec: str | Sequence[str],
    cache: str | None = None,
    access: Access | None = None,
    manifests: Manifests | None = None,
) -> list[ShardFile]:
    """The shards that a specification names, in its order. ``pipe:`` is fetched; of a remote folder, its manifest.

    Raises ValueError or OSError that names the piece of the specification which gives nothing.
    """
    pieces = [spec] if isinstance(spec, str) else list(spec)
    access = access or Access.of(cache)
    manifests = manifests or Manifests(access)
    files: list[ShardFile] = []
    for piece in pieces:
        if piece.startswith("pipe:"):
            files.append(LocalFile(fetch_pipe(piece, str(access.folder))))
            continue
        try:
            names = list(braceexpand(piece))
        except UnbalancedBracesError as error:
            raise ValueError(f"unbalanced braces in the shard pattern {public_url(piece)!r}") from error
        for name in names:
            files += _remote(name, access, manifests) if is_remote(name) else map(LocalFile, _local(name))
    if not files:
        raise ValueError(f"the shard specification {spec!r} is empty")
    refuse_twice(files, [public_url(piece) for piece in pieces])
    return files


def _remote(url: str, access: Access, manifests: Manifests) -> list[RemoteFile]:
    """The tar of a URL, or those of the manifest of a folder's."""
    if not urlsplit(url).path.endswith("/"):
        return [RemoteFile(url, access)]
    manifest = manifests.load(url)
    if manifest is None:
        raise FileNotFoundError(
            f"{public_url(url)} has no manifest.json: run `data_shards index` before uploading, or name its tars one by one"
        )
    return [RemoteFile(url_in_folder(url, quote(entry.name)), access) for entry in manifest.shards]


def refuse_twice(files: Sequence[ShardFile], spec: object) -> None:
    """Raise ValueError where a shard is named twice, be it in two corpora: its samples would count twice."""
    counts = Counter(file.identity for file in files)
    for file in files:
        if counts[file.identity] > 1:
            raise ValueError(f"shard {file} stands twice in {spec!r}; for several passes an epoch give it a weight")


def parts_of(mixed: Sequence[Corpus], shards: Sequence[int], sizes: Sequence[int]) -> list[MixturePart]:
    """The corpora with the sizes of their shards, of which each has so many. Raises ValueError for one without."""
    ends = [sum(shards[: number + 1]) for number in range(len(shards))]
    parts = [
        MixturePart(sizes[end - count : end], corpus.weight, ", ".join(map(public_url, corpus.shards)))
        for corpus, count, end in zip(mixed, shards, ends, strict=True)
    ]
    for part in parts:
        if not part.samples:
            raise ValueError(f"no sample in {part.name}: {len(part.sizes)} shards, all of them empty")
    return parts


def _local(name: str) -> list[Path]:
    path = Path(name.removeprefix("file://")).expanduser()
    if path.is_dir():
        manifest = Manifest.load(path)
        tars = [path / entry.name for entry in manifest.shards] if manifest else sorted(path.glob("*.tar"))
        if not manifest and (path / PROGRESS).is_dir():
            raise ValueError(f"{path} is half packed: run the same `data_shards pack` command again to finish it")
        if not tars:
            raise FileNotFoundError(f"no tar in the folder {path}")
        return tars
    if any(letter in name for letter in "*?[") and not path.exists():
        found = sorted(Path(match) for match in glob.glob(str(path)))
        if not found:
            raise FileNotFoundError(f"no file matches {name!r}")
        return found
    return [path]
