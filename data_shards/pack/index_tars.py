"""`data_shards index`: writes a manifest and .idx files for tars of other programs (RS5M, img2dataset, WebDataset)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from priorclip.common.files import sha256_of
from priorclip.common.output import get_logger
from priorclip.common.processes import pool
from priorclip.common.progress import counted
from priorclip.data_shards.find_shards import find_shards
from priorclip.data_shards.format.client_files import CLIENT_FILES, LAYOUT, count_captioned, write_client_files
from priorclip.data_shards.format.foreign_layout import PLAIN, Layout, find_layout
from priorclip.data_shards.format.manifest import NAME, Manifest, ShardContent, ShardEntry, combine_contents
from priorclip.data_shards.format.sample import IMAGE_MEMBERS, JSON_MEMBER, USED_MEMBERS, BadSample, parse_text
from priorclip.data_shards.format.shard_index import ShardIndex, index_path, scan
from priorclip.data_shards.remote.shard_files import LocalFile
from priorclip.data_shards.remote.urls import is_remote, public_url

log = get_logger(__name__)


def build_index(spec: str | Sequence[str], workers: int, overwrite: bool = False) -> list[tuple[Path, Manifest]]:
    """Indexes the tars of a specification. Returns each folder with its new manifest.

    Raises:
        ValueError: a tar is remote
        FileExistsError: a folder has a manifest and ``overwrite`` is False
    """
    pieces = [spec] if isinstance(spec, str) else list(spec)
    remote = [piece for piece in pieces if is_remote(piece)]
    if remote:
        raise ValueError(f"{public_url(remote[0])} is remote: `data_shards index` works on local tars only")
    folders: dict[Path, list[Path]] = {}
    for path in (file.path for file in find_shards(pieces) if isinstance(file, LocalFile)):
        folders.setdefault(path.parent, []).append(path)
    for folder in folders:
        if (folder / NAME).exists() and not overwrite:
            raise FileExistsError(f"{folder} has a manifest: set --overwrite to replace it")
    done = []
    for folder, paths in folders.items():
        contents = parallel(index_shard, paths, workers, "index")
        packed = has_client_files(folder)
        manifest = combine_contents(contents, options={"layout": LAYOUT} if packed else {})
        if packed:
            write_client_files(folder, manifest.shards, {each.entry.name: each.captioned for each in contents})
        manifest.save(folder)
        done.append((folder, manifest))
    return done


def has_client_files(folder: Path) -> bool:
    """Tells whether pack wrote sizes.json and wids.json there, which must then fit the shards again."""
    try:
        manifest = Manifest.load(folder)
    except ValueError:  # a damaged manifest, which is replaced
        manifest = None
    known = manifest is not None and manifest.options.get("layout") == LAYOUT
    return known or all((folder / name).is_file() for name in CLIENT_FILES)


def index_shard(path: Path) -> ShardContent:
    """Writes the .idx of one tar. Returns its part of the manifest. Bad samples stay in, with a warning."""
    index = scan(path, hashes=True)
    layout = PLAIN if JSON_MEMBER in index.extensions else find_layout(path.parent)
    digest = index.save(index_path(path)).hex()
    classes: Counter[str] = Counter()
    fields: set[str] = set()
    captions, bad = 0, Counter[str]()
    with open(path, "rb") as file:
        for sample in range(len(index)):
            try:
                texts, label, info = sample_text(file, index, sample, layout)
            except BadSample as error:
                bad[error.reason] += 1
                continue
            captions += len(texts)
            classes.update([label] if label is not None else [])
            fields |= {"captions"} if texts else set()
            fields |= {"coarse_captions"} if info.get("coarse_captions") else set()
    for reason, count in bad.items():
        log.warning("%s: %d samples are bad (%s); streaming skips them", path, count, reason)
    entry = ShardEntry(path.name, len(index), path.stat().st_size, sha256_of(path), digest)
    return ShardContent(entry, captions, dict(classes), sorted(fields), [], count_captioned(index))


def sample_text(
    file: Any, index: ShardIndex, sample: int, layout: Layout
) -> tuple[list[str], str | None, dict[str, Any]]:
    """Returns captions, label and JSON of a sample. Raises BadSample if it has no image or its text is damaged."""
    members = index.members(sample)
    if not any(member.extension in IMAGE_MEMBERS for member in members):
        raise BadSample("no image", index.key(sample))
    texts: dict[str, bytes] = {}
    for member in members:
        if member.extension in USED_MEMBERS and member.extension not in IMAGE_MEMBERS:
            file.seek(member.offset)
            texts[member.extension] = file.read(member.size)
    return parse_text(texts, layout)


def parallel(work: Callable, items: Iterable, workers: int, title: str) -> list:
    """Returns the results of ``work`` for each item, in order, and shows the progress."""
    jobs = list(items)
    if workers <= 1 or len(jobs) <= 1:
        return list(counted(map(work, jobs), title, "shard", len(jobs)))
    with pool(min(workers, len(jobs))) as executor:
        return list(counted(executor.map(work, jobs), title, "shard", len(jobs)))
