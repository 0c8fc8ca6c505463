"""A set of shards as one long array: ``shards[i]`` is a seek, whatever i is.

    shards = ShardSet("data/train")                                   # folder: the tars of its manifest
    shards = ShardSet("data/{pub11,rs3}-train-{0000..0031}.tar")      # braceexpand
    shards = ShardSet(["data/train", "https://host/more-0000.tar"])   # list of either
    shards = ShardSet({"data/pub11": 1, "data/rs3": 2.5})             # two corpora, see data_shards.corpus
    len(shards), shards.classes, shards.read(41)

With a manifest nothing but that is opened at the start: the ``.idx`` of a shard is opened when a sample of the shard is
read, and then read in place. Without one the headers of each tar are walked once.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from data_shards.corpus import Corpus, Shards, corpora
from data_shards.index import Member, ShardIndex, scan
from data_shards.index_file import IndexFile
from data_shards.manifest import Manifest, ShardEntry
from data_shards.mixture import Part
from data_shards.remote import cached, is_remote
from data_shards.sample import IMAGE_MEMBERS, USED_MEMBERS, BadSample, Sample, parse_sample, parse_text
from data_shards.tar import BLOCK, check_header

log = logging.getLogger(__name__)

INDICES_KEPT, FILES_KEPT = 192, 192  # open files, of the 1,024 that a process may usually have
READ_OVER = 1 << 16  # bytes between two members that are cheaper read than skipped
MAX_MEMBER = 1 << 30  # bytes; no image or caption is larger, a damaged index or header says anything
PROGRESS = ".pack"  # folder of what `data_shards pack` has not finished yet


class ShardSet:
    """Random access to the samples of many tars.

    Args:
        spec: folder, tar, URL, braceexpand or glob pattern, or a list of them, or a mix as data_shards.corpus has it;
            order matters, as it is the order of the sample indices
        cache: folder for remote shards, see :mod:`data_shards.remote`

    Attributes:
        paths: local path of each shard
        sizes: samples of each shard
        parts: corpora and weights of a mix; one of weight 1 otherwise
        classes: scene classes of the manifests, sorted; a label's id is its place here
    """

    def __init__(self, spec: str | Sequence[str] | Shards, cache: str | None = None) -> None:
        self.spec = spec
        self.paths: list[Path] = []
        self.sizes: list[int] = []
        self._scanned: dict[int, ShardIndex] = {}
        self._indices: OrderedDict[int, IndexFile] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()
        folders: dict[Path, Manifest | None] = {}
        entries: dict[Path, ShardEntry] = {}
        mixed = corpora(spec)
        found = [expand(corpus.shards, cache) for corpus in mixed]
        paths = [path for corpus in found for path in corpus]
        refuse_twice(paths, spec)
        for path in paths:
            folder = path.parent
            if folder not in folders:
                folders[folder] = manifest = Manifest.load(folder)
                entries |= {folder / entry.name: entry for entry in manifest.shards} if manifest else {}
            self._add(path, entries.get(path))
        self.manifests = [manifest for manifest in folders.values() if manifest]
        self.classes = sorted({name for manifest in self.manifests for name in manifest.classes})
        self._starts = np.cumsum([0, *self.sizes], dtype=np.int64)
        self.parts = parts_of(mixed, [len(corpus) for corpus in found], self.sizes)
        if not len(self):
            raise ValueError(f"no sample in {spec!r}: {len(self.paths)} shards, all of them empty")

    def _add(self, path: Path, entry: ShardEntry | None) -> None:
        """Take a shard; one that no manifest knows, or that has no .idx, is scanned."""
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} does not exist")
        if entry and index_path(path).is_file():
            if path.stat().st_size != entry.bytes:
                log.warning("%s has not the size that its manifest says: run `data_shards verify`", path)
            self.sizes.append(entry.samples)
        else:
            index = scan(path)
            self._scanned[len(self.paths)] = index
            self.sizes.append(len(index))
        self.paths.append(path)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Changes when names, sizes or weights of the shards do, which would change the order of an epoch."""
        text = "\n".join(f"{path.name} {size}" for path, size in zip(self.paths, self.sizes, strict=True))
        if len(self.parts) > 1 or self.parts[0].weight != 1:
            text += "".join(f"\nweight {part.weight} of {len(part.sizes)} shards" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def locate(self, sample: int) -> tuple[int, int]:
        """Sample index -> (shard, sample in the shard)."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is outside the {len(self)} of {self.spec!r}")
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def name(self, sample: int) -> tuple[str, str]:
        """(shard path, key) of a sample, for messages; the key is "?" where the index cannot be read."""
        shard, row = self.locate(sample)
        try:
            return str(self.paths[shard]), self._index(shard).key(row)
        except (BadSample, OSError, ValueError, IndexError):
            return str(self.paths[shard]), "?"

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        return self._index(shard).key(row)

    def read(self, sample: int) -> Sample:
        """One sample, by one positioned read. Raises BadSample where its bytes are not there or do not parse."""
        shard, row = self.locate(sample)
        members = self._members(shard, row)
        return parse_sample(members[0].key, self._pread(shard, members), str(self.paths[shard]))

    def text(self, sample: int) -> Sample:
        """One sample without reading its image (``image`` is empty)."""
        shard, row = self.locate(sample)
        members = [member for member in self._members(shard, row) if member.extension not in IMAGE_MEMBERS]
        parts = self._pread(shard, members) if members else {}
        return Sample(self._index(shard).key(row), b"", *parse_text(parts), str(self.paths[shard]))

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        """Captions of one sample, without reading its image. Raises BadSample where it has none."""
        return self.text(sample).texts(caption_field)

    def _members(self, shard: int, row: int) -> list[Member]:
        index = self._index(shard)
        if row >= len(index):
            raise BadSample("index does not fit", f"{index_path(self.paths[shard])} has {len(index)} samples")
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
            start, end = run[0].offset - BLOCK, run[-1].offset + run[-1].size
            data = self._read_at(shard, start, end - start)
            for member in run:
                place = member.offset - start
                check_header(data[place - BLOCK : place], member.key, member.size)
                parts.setdefault(member.extension, data[place : place + member.size])
        return parts

    def _read_at(self, shard: int, start: int, length: int) -> bytes:
        """``length`` bytes of a tar. Raises BadSample, before anything is allocated, where there are not so many."""
        try:
            file = self._file(shard)
            size = os.fstat(file).st_size
            data = os.pread(file, length, start) if start + length <= size else b""
        except OSError as error:
            self._forget(shard)
            reason = "shard is missing" if error.errno == errno.ENOENT else "shard cannot be read"
            raise BadSample(reason, str(error)) from error
        if len(data) < length:
            self._forget(shard)  # it may have been replaced by a whole one by the next time
            raise BadSample("shard is cut short", f"{length} bytes at {start} reach past its {size}")
        return data

    def _index(self, shard: int) -> ShardIndex | IndexFile:
        if shard in self._scanned:
            return self._scanned[shard]
        if shard not in self._indices:
            try:
                self._indices[shard] = IndexFile(index_path(self.paths[shard]))
            except (OSError, ValueError) as error:
                raise BadSample("index cannot be read", str(error)) from error
            if len(self._indices) > INDICES_KEPT:
                self._indices.popitem(last=False)
        self._indices.move_to_end(shard)
        return self._indices[shard]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > FILES_KEPT:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _forget(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard))

    def close(self) -> None:
        """Close the tars that are open; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._indices.clear()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict:
        """Open files and loaded indices stay behind: a worker process opens its own."""
        return {**self.__dict__, "_files": OrderedDict(), "_indices": OrderedDict()}


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


def expand(spec: str | Sequence[str], cache: str | None = None) -> list[Path]:
    """Local paths of the shards that a specification names, in its order; remote ones are fetched.

    Raises ValueError or FileNotFoundError that names the piece of the specification which gives nothing.
    """
    pieces = [spec] if isinstance(spec, str) else list(spec)
    paths: list[Path] = []
    for piece in pieces:
        if piece.startswith("pipe:"):
            paths.append(cached(piece, cache))
            continue
        try:
            names = list(braceexpand(piece))
        except UnbalancedBracesError as error:
            raise ValueError(f"unbalanced braces in the shard pattern {piece!r}") from error
        for name in names:
            paths += [cached(name, cache)] if is_remote(name) else _local(name)
    if not paths:
        raise ValueError(f"the shard specification {spec!r} is empty")
    refuse_twice(paths, spec)
    return paths


def refuse_twice(paths: Sequence[Path], spec: object) -> None:
    """Raise ValueError where a shard is named twice, be it in two corpora: its samples would count twice."""
    counts = Counter(paths)
    for path, count in counts.items():
        if count > 1:
            raise ValueError(f"shard {path} stands twice in {spec!r}; for several passes an epoch give it a weight")


def parts_of(mixed: Sequence[Corpus], shards: Sequence[int], sizes: Sequence[int]) -> list[Part]:
    """The corpora with the sizes of their shards, of which each has so many. Raises ValueError for one without."""
    ends = [sum(shards[: number + 1]) for number in range(len(shards))]
    parts = [
        Part(sizes[end - count : end], corpus.weight, str(corpus))
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
