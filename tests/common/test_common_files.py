"""Atomic writes: the old content or the new one, no rest of a failure, and rests of killed processes are removed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from priorclip.common import files
from priorclip.common.files import file_aside, folder_aside, is_stale, sha256_of, temporary_path, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_text_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "one")
    write_text(path, "two é")
    assert path.read_text(encoding="utf-8") == "two é"
    assert names(tmp_path) == ["a.json"]
    assert sha256_of(path) == hashlib.sha256("two é".encode()).hexdigest()


def test_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail() -> None:
        with file_aside(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_folder_is_replaced_or_stays(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "export"
    for text in ("one", "two"):
        with folder_aside(folder) as aside:
            (aside / "a.txt").write_text(text)
    assert (folder / "a.txt").read_text() == "two"

    def fail() -> None:
        with folder_aside(folder) as aside:
            (aside / "a.txt").write_text("three")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (folder / "a.txt").read_text() == "two"
    assert names(folder.parent) == ["export"]


def test_the_place_of_a_replaced_folder_is_never_empty(tmp_path: Path) -> None:
    """Another process looks as often as it can while the folder is replaced 60 times."""
    folder = tmp_path / "export"
    with folder_aside(folder) as aside:
        (aside / "a.txt").write_text("0")
    look = "import os, sys\nlooks = 0\nprint(flush=True)\n"
    look += "while not os.path.exists(sys.argv[2]):\n    os.stat(sys.argv[1]); looks += 1\nprint(looks)"
    words = [sys.executable, "-c", look, str(folder), str(tmp_path / "end")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        for number in range(60):
            with folder_aside(folder) as aside:
                (aside / "a.txt").write_text(str(number))
        (tmp_path / "end").touch()
        looks, error = reader.communicate(timeout=60)
    assert reader.returncode == 0, error
    assert int(looks) > 60
    assert (folder / "a.txt").read_text() == "59"
    assert names(tmp_path) == ["end", "export"]


@pytest.mark.parametrize("able", [True, False])
def test_folders_are_exchanged_or_renamed(able: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without renameat2, as on macOS or on some network file systems, two renames do it."""
    if not able:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    for text in ("one", "two"):
        with folder_aside(tmp_path / "export") as aside:
            (aside / "a.txt").write_text(text)
    assert (tmp_path / "export" / "a.txt").read_text() == "two"
    assert names(tmp_path) == ["export"]


def test_what_does_not_exist_is_not_exchanged(tmp_path: Path) -> None:
    tmp_path.joinpath("a").mkdir()
    assert not files.exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """But not the folder of a living process, of another host, or the only copy."""
    left = f".export.{platform.node()}~{dead_process()}.tmp"
    living, elsewhere = f".export.{platform.node()}~1.tmp", ".export.other-host~1.tmp"
    for name in (left, f"{left}.old", living, elsewhere, ".export.mine"):
        (tmp_path / name).mkdir()
    with folder_aside(tmp_path / "export"):
        assert (tmp_path / f"{left}.old").is_dir(), "the only copy"
        assert not (tmp_path / left).exists()
    with folder_aside(tmp_path / "export"):
        pass
    assert names(tmp_path) == sorted([living, elsewhere, ".export.mine", "export"])


def test_stale_is_a_dead_writer_on_this_host(tmp_path: Path) -> None:
    assert not is_stale(temporary_path(tmp_path / "a"))
    assert not is_stale(tmp_path / "a.tmp")
    for name in ("a", "shard-000000.tar", ".export"):
        assert is_stale(tmp_path / f"{name}.{platform.node()}~{dead_process()}.tmp")
        assert not is_stale(tmp_path / f"{name}.other-host~{dead_process()}.tmp")
