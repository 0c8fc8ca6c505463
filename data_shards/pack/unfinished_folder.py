"""A folder while it is packed: who may write to it, what is done, and how it becomes finished.

    .pack/options.json         the fingerprint of options and records
    .pack/prints/000000.npy    fingerprints of images, see prints.py
    .pack/train-000000.json    this shard is done: its part of the manifest

Several tasks may pack one folder at once, and any may be killed at any time. What they write is the same, each under a
name of its own, and renamed; a folder is finished when manifest.json is there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from priorclip.data_shards.format.manifest import NAME, Manifest, ShardContent, ShardEntry, combine
from priorclip.data_shards.format.tar_index import is_stale, temporary_paths, write_aside
from priorclip.data_shards.pack.selection import Selection
from priorclip.data_shards.shards import PROGRESS, index_path

log = logging.getLogger(__name__)

OPTIONS, PRINTS, QUARANTINE = "options.json", "prints", "quarantine.jsonl"
DUPLICATES, EXCLUDED = "duplicates.jsonl", "excluded.jsonl"


def claim(folder: Path, fingerprint: str, overwrite: bool, alone: bool = True) -> Path:
    """Make the folder ours: new, or half finished with the same fingerprint. Returns its progress folder.

    ``alone`` is false where other tasks may pack the same folder, of whose work nothing must be removed.
    Raises FileExistsError where the folder holds other things.
    """
    progress = folder / PROGRESS
    note = progress / OPTIONS
    if overwrite and not alone:
        raise ValueError(
            f"--overwrite would have each task remove what the others wrote: remove {folder}, then start the tasks"
        )
    ours = overwrite and clear(folder)
    if (folder / NAME).exists():
        raise FileExistsError(f"{folder} holds finished shards: use another --output, or --overwrite")
    foreign = not ours and folder.is_dir() and any(path.name != PROGRESS for path in folder.iterdir())
    if note.exists():  # looked for after the foreign files, which another task may have begun to write meanwhile
        if json.loads(note.read_text())["fingerprint"] != fingerprint:
            raise FileExistsError(
                f"{folder} is half packed with other options or other input: repeat those to finish it, or --overwrite"
            )
    elif foreign:
        raise FileExistsError(f"{folder} is not empty and was not written by pack: use another --output")
    else:
        progress.mkdir(parents=True, exist_ok=True)
        write_aside(note, json.dumps({"fingerprint": fingerprint}).encode())
    remove_stale(folder)
    return progress


def remove_stale(folder: Path) -> None:
    """Remove what processes of this machine were writing when they were killed."""
    for place in (folder, folder / PROGRESS, folder / PROGRESS / PRINTS):
        for path in temporary_paths(place):
            if is_stale(path):
                path.unlink(missing_ok=True)


def clear(folder: Path) -> bool:
    """Remove what packing wrote, and nothing else; False where it had written nothing."""
    manifest = Manifest.load(folder)
    note = folder / PROGRESS
    if not manifest and not note.is_dir():
        return False
    names = {entry.name for entry in manifest.shards} if manifest else set()
    names |= {f"{path.stem}.tar" for path in note.glob("*.json")}
    for name in names:
        for path in (folder / name, index_path(folder / name)):
            path.unlink(missing_ok=True)
    leftovers = (folder / name for name in (QUARANTINE, DUPLICATES, EXCLUDED, NAME))
    for path in (*temporary_paths(folder), *leftovers):
        path.unlink(missing_ok=True)
    shutil.rmtree(note, ignore_errors=True)
    return True


def unfinished(progress: Path, names: Sequence[str]) -> list[str]:
    """Shards that are not done yet."""
    done = {path.stem for path in progress.glob("*.json")}
    return [name for name in names if name not in done]


def write_part(progress: Path, name: str, content: ShardContent) -> None:
    text = json.dumps(asdict(content), ensure_ascii=False)
    write_aside(progress / f"{name}.json", text.encode("utf-8", "surrogateescape"))


def read_part(path: Path) -> ShardContent:
    content = json.loads(path.read_text(encoding="utf-8"))
    return ShardContent(**{**content, "entry": ShardEntry(**content["entry"])})


def finish(folder: Path, names: Sequence[str], fingerprint: str, options: dict, selection: Selection) -> Manifest:
    """Join the parts of all shards into the manifest; the folder is finished when that is there.

    Two tasks may come here at once: both write the same, and the one that is late finds it done.
    """
    try:
        return join(folder, names, fingerprint, options, selection)
    except FileNotFoundError:
        manifest = finished(folder, fingerprint)
        if manifest is None:
            raise
        return manifest


def finished(folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest of the folder, where it was packed of the same records with the same options."""
    manifest = Manifest.load(folder)
    return manifest if manifest and manifest.fingerprint == fingerprint else None


def join(folder: Path, names: Sequence[str], fingerprint: str, options: dict, selection: Selection) -> Manifest:
    progress = folder / PROGRESS
    contents = [read_part(progress / f"{name}.json") for name in names]
    manifest = combine(contents, fingerprint, options, selection.counts)
    bad = [row for content in contents for row in content.bad]
    if not manifest.samples:
        raise ValueError(f"none of {len(bad)} records could be packed: {bad[0] if bad else 'there are no records'}")
    for name, rows in ((QUARANTINE, bad), (DUPLICATES, selection.duplicates), (EXCLUDED, selection.excluded)):
        if rows is not None:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_aside(folder / name, lines.encode("utf-8", "surrogateescape"))
    manifest.save(folder)
    remove_progress(folder)
    return manifest


def remove_progress(folder: Path) -> None:
    """Remove .pack, also where another task is about to, and whatever a killed task was writing."""
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    for path in temporary_paths(folder):
        path.unlink(missing_ok=True)
