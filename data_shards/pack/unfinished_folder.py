"""A folder that is being packed: which tasks may write to it, which shards are done, and when it is finished.

    .pack/options.json         the fingerprint of options and records
    .pack/prints/000000.npy    hashes of images, see dedupe/hash_columns.py
    .pack/train-000000.json    this shard is done: its part of the manifest

Several tasks may pack one folder at the same time, and each may be killed at any time. All tasks write the same bytes.
Each writes to a temporary name of its own and then renames the file. The folder is finished when manifest.json exists.

Somebody else may have written the files in the folder. So names in them are checked before a file is removed, and
pack never writes through a symbolic link.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from priorclip.common.files import is_stale, temporary_paths, write_bytes
from priorclip.common.output import get_logger
from priorclip.data_shards.find_shards import PROGRESS
from priorclip.data_shards.format.client_files import CLIENT_FILES, write_client_files
from priorclip.data_shards.format.manifest import NAME, Manifest, ShardContent, ShardEntry, combine_contents
from priorclip.data_shards.format.shard_index import index_path
from priorclip.data_shards.pack.selection import Selection

log = get_logger(__name__)

OPTIONS, HASHES, QUARANTINE = "options.json", "prints", "quarantine.jsonl"
DUPLICATES, EXCLUDED = "duplicates.jsonl", "excluded.jsonl"


def claim_folder(folder: Path, fingerprint: str, overwrite: bool, alone: bool = True) -> Path:
    """Prepares a new folder, or continues an unfinished one with the same fingerprint. Returns its .pack folder.

    Args:
        folder: the folder to write
        fingerprint: hash of options and records
        overwrite: remove what an earlier pack wrote
        alone: False if other tasks may pack the same folder; then nothing is removed

    Raises:
        FileExistsError: the folder has other files, or files of a pack with another fingerprint
    """
    progress = folder / PROGRESS
    options = progress / OPTIONS
    if overwrite and not alone:
        raise ValueError(
            f"--overwrite would let each task remove the shards of the others: remove {folder}, then start the tasks"
        )
    for place in (progress, progress / HASHES):
        if place.is_symlink():
            raise FileExistsError(f"{place} is a symbolic link, and pack would write where it leads: remove it")
    ours = overwrite and remove_packed_files(folder)
    if (folder / NAME).exists():
        raise FileExistsError(f"{folder} holds finished shards: use another --output, or --overwrite")
    foreign = not ours and folder.is_dir() and any(path.name != PROGRESS for path in folder.iterdir())
    if options.exists():  # checked after ``foreign``, because another task may start to write files at this moment
        if read_fingerprint(options) != fingerprint:
            raise FileExistsError(
                f"{folder} is half packed with other options or other input: repeat those to finish it, or --overwrite"
            )
    elif foreign:
        raise FileExistsError(f"{folder} is not empty and was not written by pack: use another --output")
    else:
        progress.mkdir(parents=True, exist_ok=True)
        write_bytes(options, json.dumps({"fingerprint": fingerprint}).encode())
    remove_stale(folder)
    return progress


def read_fingerprint(options: Path) -> str:
    """Returns the fingerprint in .pack/options.json. Raises ValueError if the file is damaged."""
    try:
        return json.loads(options.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{options} is damaged: pack with --overwrite, or remove {options.parent}") from error


def remove_stale(folder: Path) -> None:
    """Removes the temporary files of killed processes of this machine."""
    for place in (folder, folder / PROGRESS, folder / PROGRESS / HASHES):
        for path in temporary_paths(place):
            if is_stale(path):
                path.unlink(missing_ok=True)


def remove_packed_files(folder: Path) -> bool:
    """Removes the files that pack wrote, and no others. Returns False if there are none.

    Raises:
        ValueError: the manifest names a shard that is not a tar of this folder; then nothing is removed
    """
    manifest = Manifest.load(folder)
    progress = folder / PROGRESS
    if not manifest and not progress.is_dir():
        return False
    names = {entry.name for entry in manifest.shards} if manifest else set()
    for name in names:
        if "/" in name or not name.endswith(".tar"):
            raise ValueError(f"{folder / NAME} names the shard {name!r}, which pack did not write: remove its entry")
    names |= {f"{path.stem}.tar" for path in progress.glob("*.json") if path.name != OPTIONS}
    for name in names:
        for path in (folder / name, index_path(folder / name)):
            path.unlink(missing_ok=True)
    leftovers = (folder / name for name in (QUARANTINE, DUPLICATES, EXCLUDED, *CLIENT_FILES, NAME))
    for path in (*temporary_paths(folder), *leftovers):
        path.unlink(missing_ok=True)
    shutil.rmtree(progress, ignore_errors=True)
    return True


def list_unfinished(progress: Path, names: Sequence[str]) -> list[str]:
    """Returns the names of the shards that are not done yet."""
    done = {path.stem for path in progress.glob("*.json")}
    return [name for name in names if name not in done]


def write_shard_record(progress: Path, name: str, content: ShardContent) -> None:
    text = json.dumps(asdict(content))  # in ASCII, because a key can have half of a surrogate pair
    write_bytes(progress / f"{name}.json", text.encode())


def read_shard_record(path: Path) -> ShardContent:
    """Returns what .pack/NAME.json says about NAME.tar. Raises ValueError if the file is damaged or names another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entry = ShardEntry(**content["entry"])
        if entry.name != f"{path.stem}.tar":
            raise ValueError(f"it names the shard {entry.name!r}")
        return ShardContent(**{**content, "entry": entry})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Remove it, and pack writes the shard again") from error


def finish_folder(
    folder: Path, names: Sequence[str], fingerprint: str, options: dict, selection: Selection
) -> Manifest:
    """Joins the records of all shards into the manifest, which finishes the folder.

    Two tasks may do this at the same time. Both write the same bytes, and the later one finds the folder finished.
    """
    try:
        return join_records(folder, names, fingerprint, options, selection)
    except FileNotFoundError:
        manifest = load_finished(folder, fingerprint)
        if manifest is None:
            raise
        return manifest


def load_finished(folder: Path, fingerprint: str) -> Manifest | None:
    """Returns the manifest if the folder was packed from the same records with the same options, or None."""
    manifest = Manifest.load(folder)
    return manifest if manifest and manifest.fingerprint == fingerprint else None


def nothing_packed(bad: Sequence[Mapping[str, Any]]) -> str:
    """Returns the message if no record could be packed, with the reason of the first."""
    if not bad:
        return "there are no records to pack"
    first = bad[0]
    detail = f" ({str(first['detail']).strip()})" if first.get("detail") else ""
    return f"none of {len(bad)} records could be packed; the first, {first['key']}: {first['reason']}{detail}"


def join_records(folder: Path, names: Sequence[str], fingerprint: str, options: dict, selection: Selection) -> Manifest:
    progress = folder / PROGRESS
    contents = [read_shard_record(progress / f"{name}.json") for name in names]
    manifest = combine_contents(contents, fingerprint, options, selection.counts)
    bad = [row for content in contents for row in content.bad]
    if not manifest.samples:
        raise ValueError(nothing_packed(bad))
    for name, rows in ((QUARANTINE, bad), (DUPLICATES, selection.duplicates), (EXCLUDED, selection.excluded)):
        if rows is not None:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_bytes(folder / name, lines.encode("utf-8", "surrogateescape"))
    write_client_files(folder, manifest.shards, {content.entry.name: content.captioned for content in contents})
    manifest.save(folder)
    remove_progress(folder)
    return manifest


def remove_progress(folder: Path) -> None:
    """Removes .pack and the temporary files of killed tasks. Another task may do the same at this moment."""
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
    for path in temporary_paths(folder):
        path.unlink(missing_ok=True)
