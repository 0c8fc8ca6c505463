"""A set of shards as one long array: ``shards[i]`` is a seek, whatever i is.

    shards = ShardSet("data/train")                                   # folder: the tars of its manifest
    shards = ShardSet("data/{pub11,rs3}-train-{0000..0031}.tar")      # braceexpand
    shards = ShardSet(["data/train", "https://host/more-0000.tar"])   # list of either
    shards = ShardSet({"data/pub11": 1, "data/rs3": 2.5})             # two corpora with weights, see corpus.py
    shards = ShardSet("s3://bucket/train/")                           # remote folder, by its manifest
    len(shards), shards.classes, shards.read(41)

If a folder has a manifest, the start opens nothing else. The ``.idx`` of a shard is opened when the first sample of the
shard is read, and it is read in place. Without a manifest, the headers of each tar are read once. Remote shards are
read in place too, see :mod:`priorclip.data_shards.remote.shard_files`. find_shards.py finds the shards.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from priorclip.common.output import get_logger
from priorclip.data_shards.corpus import Shards, corpora
from priorclip.data_shards.find_shards import (
    FolderManifests,
    check_shards,
    find_shards,
    folder_of,
    foreign_layout,
    mixture_parts,
    refuse_duplicates,
)
from priorclip.data_shards.format.class_names import unique_classes
from priorclip.data_shards.format.foreign_layout import PLAIN, Layout
from priorclip.data_shards.format.index_reader import IndexReader
from priorclip.data_shards.format.manifest import ShardEntry
from priorclip.data_shards.format.member_runs import adjacent_runs, byte_range
from priorclip.data_shards.format.sample import (
    IMAGE_MEMBERS,
    LABEL_MEMBER,
    USED_MEMBERS,
    BadSample,
    Sample,
    parse_sample,
    parse_text,
)
from priorclip.data_shards.format.shard_index import Member, ShardIndex, index_path
from priorclip.data_shards.format.tar import BLOCK, check_header
from priorclip.data_shards.remote.file_list import FileList
from priorclip.data_shards.remote.http_ranges import RemoteError
from priorclip.data_shards.remote.read_ahead import Need, ReadAhead
from priorclip.data_shards.remote.shard_files import Access, LocalFile, RemoteFile, ShardFile
from priorclip.data_shards.remote.time_budget import SilentServer, TimeBudget
from priorclip.data_shards.remote.urls import public_url

log = get_logger(__name__)

MORE_THAN_ROOM = 100_000  # samples that a shard which was cut short may have in its manifest, and are then bad
INDICES_KEPT = 192  # open files; a process may usually have 1,024


class ShardSet:
    """Random access to the samples of many tars.

    Args:
        spec: folder, tar, URL, braceexpand or glob pattern, a list of them, or a mix (see corpus.py); its order is the
            order of the sample indices. A Path is taken literally: braces, wildcards and ``pipe:`` have no meaning
        cache: folder for this node's copies of remote shards; None is ~/.cache/data_shards
        cache_limit: largest size of the copies, e.g. "50GB"; 0 keeps no image data
        timeout: seconds for one request
        read_ahead: concurrent requests of a process, see :meth:`prefetch`; 0 reads one sample at a time

    Attributes:
        files: the shards; ``str(file)`` is for messages, ``file.address`` opens the shard again
        sizes: samples of each shard
        parts: corpora and weights of a mix; otherwise one part of weight 1
        classes: scene classes of the manifests and of CLIP Benchmark's classnames.txt, sorted, one spelling each; a
            label's id is its index here
        class_words: names of classnames.txt, which are written as words

    Raises:
        ValueError, OSError: a shard is missing, named twice or not a tar, or there is no sample
    """

    def __init__(
        self,
        spec: str | Sequence[str | Path] | Shards,
        cache: str | None = None,
        cache_limit: int | str = "50GB",
        timeout: float = 60.0,
        read_ahead: int = 16,
    ) -> None:
        mixed = corpora(spec)
        self.spec = [public_url(str(piece)) for corpus in mixed for piece in corpus.shards]
        self._ahead = ReadAhead(read_ahead)
        self._budget = TimeBudget(timeout)
        access = Access.from_options(cache, cache_limit, timeout)
        self.sizes: list[int] = []
        self._scanned: dict[int, ShardIndex] = {}
        self._indices: OrderedDict[int, IndexReader] = OrderedDict()
        self._index_hashes: dict[int, str] = {}  # of remote shards
        manifests = FolderManifests(access)
        found = [find_shards(corpus.shards, cache, access, manifests) for corpus in mixed]
        files = [(file, manifests.entry(file)) for corpus in found for file in corpus]
        refuse_duplicates([file for file, _ in files], self.spec)
        self._described = np.zeros(len(files), bool)  # which shards are in a manifest
        for shard, ((file, entry), index) in enumerate(zip(files, check_shards(files), strict=True)):
            self._add(shard, file, entry, index)
        self.files = FileList([file for file, _ in files])
        found_manifests = [manifest for manifest in manifests.of.values() if manifest]
        self.has_manifest = bool(found_manifests)
        self._layouts = self._find_layouts([file for file, _ in files], manifests)
        self.class_words = frozenset(self._named_classes())
        self.classes = unique_classes(
            {name for manifest in found_manifests for name in manifest.classes} | self.class_words
        )
        self._starts = np.cumsum([0, *self.sizes], dtype=np.int64)
        self._has_remote = self.files.has_remote
        self.parts = mixture_parts(mixed, [len(corpus) for corpus in found], self.sizes)
        if not len(self):
            raise ValueError(f"no sample in {self.spec}: {len(self.files)} shards, all of them empty")

    def _add(
        self, shard: int, file: ShardFile, entry: ShardEntry | None, index: ShardIndex | IndexReader | None
    ) -> None:
        """Adds a shard. ``index`` is its scanned index; None if the manifest and the .idx are there."""
        if index is not None:
            if isinstance(index, ShardIndex):
                self._scanned[shard] = index
            self.sizes.append(len(index))
        else:
            assert entry is not None
            if file.size != entry.bytes:
                log.warning("%s does not have the size in its manifest: run `data_shards verify`", file)
            if entry.samples > file.size // BLOCK + MORE_THAN_ROOM:
                raise ValueError(
                    f"{file} of {file.size} bytes has no room for the {entry.samples} samples in its manifest"
                )
            self._described[shard] = True
            if file.remote:
                self._index_hashes[shard] = entry.index_sha256
            self.sizes.append(entry.samples)

    def _find_layouts(self, files: Sequence[ShardFile], manifests: FolderManifests) -> list[Layout]:
        """Returns the layout of each shard. Of a folder that pack did not write, the index of one shard is opened."""
        of: dict[Path | str, Layout] = {}
        for shard, file in enumerate(files):
            folder = folder_of(file)
            if folder not in of:
                packed = manifests.is_pack(file)
                of[folder] = PLAIN if packed else foreign_layout(file, self._extensions(shard), manifests)
        return [of[folder_of(file)] for file in files]

    def _named_classes(self) -> set[str]:
        """Returns the names of classnames.txt for shards that hold class numbers."""
        found: set[str] = set()
        for shard, layout in enumerate(self._layouts):
            if layout.names and LABEL_MEMBER in self._extensions(shard):
                found.update(name for name in layout.names if name)
        return found

    def _extensions(self, shard: int) -> tuple[str, ...]:
        try:
            return self._index(shard).extensions
        except BadSample:
            return ()

    def find_labels(self) -> set[str]:
        """Returns the labels of the shards that no manifest describes. It reads their texts, local shards only."""
        found: set[str] = set()
        for shard, file in enumerate(self.files):
            if self._described[shard] or file.remote:
                continue
            for sample in range(int(self._starts[shard]), int(self._starts[shard + 1])):
                with contextlib.suppress(BadSample):  # counted when the sample is read
                    found.add(self.text(sample).label or "")
        return found - {""}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and weights of the shards, which decide the order of an epoch."""
        text = "\n".join(f"{file.name} {size}" for file, size in zip(self.files, self.sizes, strict=True))
        if len(self.parts) > 1 or self.parts[0].weight != 1:
            text += "".join(f"\nweight {part.weight} of {len(part.sizes)} shards" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def locate(self, sample: int) -> tuple[int, int]:
        """Sample index -> (shard, sample in the shard). Raises IndexError."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is outside the {len(self)} of {self.spec}")
        shard = int(self._starts.searchsorted(sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def name(self, sample: int) -> tuple[str, str]:
        """Returns (shard path, key) of a sample, for messages; "?3" for the fourth if the index cannot be read."""
        shard, row = self.locate(sample)
        try:
            return str(self.files[shard]), self._index(shard).key(row)
        except (BadSample, OSError, ValueError, IndexError):
            return str(self.files[shard]), f"?{row}"

    def key(self, sample: int) -> str:
        shard, row = self.locate(sample)
        return self._index(shard).key(row)

    def read(self, sample: int) -> Sample:
        """Reads one sample by one positioned read. Raises BadSample if its bytes are missing or do not parse."""
        shard, row = self.locate(sample)
        members = self._members(shard, row)
        parts = self._pread(shard, members)
        return parse_sample(members[0].key, parts, str(self.files[shard]), self._layouts[shard])

    def text(self, sample: int) -> Sample:
        """Reads one sample without its image; ``image`` is empty. Raises BadSample."""
        shard, row = self.locate(sample)
        members = [member for member in self._members(shard, row) if member.extension not in IMAGE_MEMBERS]
        parts = self._pread(shard, members) if members else {}
        return Sample(
            self._index(shard).key(row), b"", *parse_text(parts, self._layouts[shard]), str(self.files[shard])
        )

    def member(self, sample: int, extension: str) -> bytes:
        """Reads a file of one sample that streaming leaves alone, such as ``mask.png``. Raises BadSample without it."""
        shard, row = self.locate(sample)
        members = self._members(shard, row, frozenset((extension,)))
        return self._pread(shard, members)[extension]

    def captions(self, sample: int, caption_field: str = "captions") -> list[str]:
        """Reads the captions of one sample, not its image. Raises BadSample if it has none."""
        return self.text(sample).texts(caption_field)

    def prefetch(self, samples: Iterable[int], images: bool = True) -> None:
        """Starts to fetch the remote samples that are read next, in this order. Never raises.

        Args:
            samples: indices; they replace those of an earlier call
            images: False if only ``text`` or ``captions`` is called
        """
        if not self._has_remote:
            return
        self._budget.begin_batch()
        needs: list[Need] = []
        for sample in samples:
            if self._budget.is_spent:
                break  # the next read says so
            shard, row = self.locate(sample)
            file = self.files[shard]
            if isinstance(file, RemoteFile):
                with contextlib.suppress(BadSample, SilentServer):  # raised again, and counted, when the sample is read
                    members = self._members(shard, row)
                    chosen = [member for member in members if images or member.extension not in IMAGE_MEMBERS]
                    needs += [(file, *byte_range(run)) for run in adjacent_runs(chosen)]
        self._ahead.plan(needs)

    def _members(self, shard: int, row: int, used: frozenset[str] = USED_MEMBERS) -> list[Member]:
        index = self._index(shard)
        if row >= len(index):
            raise BadSample("index does not fit", f"the index of {self.files[shard]} has {len(index)} samples")
        try:
            members = [member for member in index.members(row) if member.extension in used]
        except (OSError, ValueError) as error:
            raise BadSample("index cannot be read", str(error)) from error
        if not members and used is not USED_MEMBERS:
            raise BadSample("no member", f"the sample has no .{', .'.join(sorted(used))}")
        if not members:
            raise BadSample("no image", "no member has a known extension")
        return members

    def _pread(self, shard: int, members: list[Member]) -> dict[str, bytes]:
        """Returns the bytes of members by extension; the first of two members with one extension counts.

        Adjacent members are one read. Raises BadSample if the tar does not fit its index.
        """
        parts: dict[str, bytes] = {}
        for run in adjacent_runs(members):
            start, length = byte_range(run)
            data = self._read_at(shard, start, length)
            for member in run:
                place = member.offset - start
                check_header(data[place - BLOCK : place], member.key, member.size)
                parts.setdefault(member.extension, data[place : place + member.size])
        return parts

    def _read_at(self, shard: int, start: int, length: int) -> bytes:
        """Reads ``length`` bytes of a shard. Raises BadSample if it cannot."""
        file = self.files[shard]
        try:
            with self._budget.counting():
                if isinstance(file, RemoteFile):
                    data = self._ahead.take(file, start, length)
                else:
                    data = self._read_local(file, start, length)
        except RemoteError as error:
            raise BadSample(error.reason, error.detail) from error
        except OSError as error:
            file.close()
            reason = "shard is missing" if error.errno == errno.ENOENT else "shard cannot be read"
            raise BadSample(reason, str(error)) from error
        if len(data) < length:
            file.close()  # a whole file may replace it before the next read
            raise BadSample("shard is cut short", f"{length} bytes at {start} reach past its end")
        return data

    def _read_local(self, file: LocalFile, start: int, length: int) -> bytes:
        """Reads from a file. A stale handle is opened again."""
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
                with self._budget.counting():
                    self._indices[shard] = self._load_index(shard)
            except (OSError, ValueError) as error:
                raise BadSample("index cannot be read", str(error)) from error
            if len(self._indices) > INDICES_KEPT:
                self._indices.popitem(last=False)
        self._indices.move_to_end(shard)
        return self._indices[shard]

    def _load_index(self, shard: int) -> IndexReader:
        """Opens the .idx of a shard. For a remote shard without its own .idx, reads the headers of the tar instead."""
        file = self.files[shard]
        if isinstance(file, LocalFile):
            return IndexReader(index_path(file.path))
        if shard in self._index_hashes:
            try:
                return IndexReader(file.index(self._index_hashes[shard]))
            except RemoteError as error:
                if error.reason == "remote cannot be read":
                    raise
                log.warning("%s: %s; its headers are read instead", file, error)
        return IndexReader(file.scanned())

    def close(self) -> None:
        """Closes the open tars; reading opens them again."""
        self.files.close()
        self._indices.clear()

    def __del__(self) -> None:
        if hasattr(self, "files"):
            self.close()

    def __getstate__(self) -> dict:
        """Leaves out open indices, because a worker process opens its own. Sizes take 8 bytes each, not 36."""
        return {**self.__dict__, "_indices": OrderedDict(), "sizes": array("q", self.sizes)}
