"""Files and folders that are whole or absent, whatever ends the process that writes them.

    write_text(Path("run/report.json"), "{}")          # run/report.json.HOST~PID.tmp, fsync, rename
    with file_aside(path) as aside: save(aside)        # the same for a file that a library writes
    with folder_aside(path) as aside: fill(aside)      # .NAME.HOST~PID.tmp/, fsync, rename
    sha256_of(path)                                    # 'e3b0c442...'

A process that is killed leaves its temporary file or folder. The name holds the host and the process, so that no two
processes write to the same place, and so that `is_stale` tells an unfinished one that nobody writes any more.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
TEMPORARY = re.compile(r"\.[\w.-]*~(?P<process>\d+)\.tmp$")  # end of the name of an unfinished file


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file and fsyncs it. A reader, or a crash, sees the old content or the new one."""
    with file_aside(path) as aside:
        aside.write_bytes(data)


@contextmanager
def file_aside(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary sibling of ``path``, which becomes ``path`` at the end; upon an error it is removed.

    Args:
        path: the file to write or to replace
        durable: fsync it, so that it also survives a crash of the machine
    """
    aside = temporary_path(path)
    try:
        with naming(path):
            yield aside
            if durable:
                fsync(aside)
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Adds the path to an error of the system inside that names no file: a full disk, a quota, a broken device."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``folder``, which replaces it at the end; upon an error it is removed.

    Its files are fsynced, and other users may read them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    aside = temporary_path(folder.with_name(f".{folder.name}"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with naming(folder):
            yield aside
            replace_folder(folder, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_folder(folder: Path, aside: Path) -> None:
    """Fsyncs a finished folder and renames it to its place; then removes the folder that it replaces.

    The place is never empty, unless the file system cannot exchange two folders: then it is, between two renames.
    """
    for path in [*aside.iterdir(), aside]:
        path.chmod(0o755 if path == aside else 0o644)  # safetensors lets only the owner read its files
        fsync(path)
    replaced = Path(f"{aside}.old")
    if folder.exists() and exchange(folder, aside):
        replaced = aside
    else:
        if folder.exists():
            folder.rename(replaced)
        aside.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Gives two folders each other's place in one step. Returns False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc on Linux has it
    return rename is not None and rename(HERE, os.fsencode(first), HERE, os.fsencode(second), EXCHANGE) == 0


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left of `folder_aside`, except the only copy of a folder."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*~*"):
        replaced = left.suffix == ".old"
        if is_stale(left.with_suffix("") if replaced else left) and (folder.exists() or not replaced):
            shutil.rmtree(left, ignore_errors=True)


def temporary_path(path: Path) -> Path:
    """Returns the place where this process writes ``path``; no other process has the same."""
    return path.with_name(f"{path.name}.{platform.node()}~{os.getpid()}.tmp")


def temporary_paths(folder: Path) -> list[Path]:
    """Returns the unfinished files in a folder."""
    return [path for path in folder.glob("*.tmp") if TEMPORARY.search(path.name)]


def is_stale(temporary: Path) -> bool:
    """Whether a process of this machine wrote it that no longer exists."""
    writer = TEMPORARY.search(temporary.name)
    if writer is None or not temporary.name.endswith(f".{platform.node()}~{writer['process']}.tmp"):
        return False
    return not psutil.pid_exists(int(writer["process"]))


def fsync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
