"""Names out of data files stay under the folder of the user; the folder of a package is found without its code."""

from __future__ import annotations

from pathlib import Path

import pytest

from priorclip.common.packages import package_folder
from priorclip.common.safe_paths import UnsafePath, join_under

EVIL = ["", ".", "./", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/share", "\\x", "\\\\host\\share",
        "C:\\x", "c:x", "a\\..\\..\\x", "..\\x", "http://host/x", "https://me:secret@host/x", "S3://bucket/x", "gs://b/x",
        "hf://datasets/a/b/c", "file:///etc/passwd", "pipe:id > x", "PIPE:id", "./pipe:id", ".//./pipe:id",
        "./http://host/x", "a\0b", "\ud800.tar", None, 3, True, ["x"], {"x": 1}]  # fmt: skip
PLAIN = ["a.tar", "a/b.jpg", "./a.jpg", "a//b.jpg", "..a/b..c", "...", "a\\b.jpg", "12:30.jpg", "img:1.jpg",
         "a b.jpg", "{a,b}.tar", "*.tar", "~x", "Straße/北京.jpg"]  # fmt: skip


@pytest.mark.parametrize("name", EVIL, ids=repr)
def test_evil_name_is_refused_and_the_file_is_named(name: object) -> None:
    with pytest.raises(UnsafePath, match=r"manifest\.json: the file name .* is refused because"):
        join_under(Path("data"), name, "manifest.json")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("folder", ["data", ".", "/data", "../data"])
def test_plain_name_stays_under_the_folder(folder: str, name: str) -> None:
    path = join_under(Path(folder), name, "manifest.json")
    assert path == Path(folder, name)
    assert path.is_relative_to(folder)


def test_message_shows_no_secret_and_no_control_character() -> None:
    with pytest.raises(UnsafePath) as raised:
        join_under(Path("data"), "https://me:hunter2@host/\x1b[31m" + "x" * 10_000, "manifest.json")
    assert "hunter2" not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_folder_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("harmful", "harmful/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_folder("package:harmful") == package_folder("harmful") == tmp_path / "harmful"
    for name in ("harmful.inner", "harmful.", ".harmful", "harmful/inner", "..", ""):
        with pytest.raises(ValueError, match="does not name a top-level Python package"):
            package_folder(name)


def test_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="'no-such-package' is not installed"):
        package_folder("package:no-such-package")
