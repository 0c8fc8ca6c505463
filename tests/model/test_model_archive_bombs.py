"""Weight files that would take far more memory or time than their size: refused by name. Real ones are read."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import fuzz
from safetensors.torch import save_file

from priorclip.common.safe_load import load_tensors, refuse_bomb
from priorclip.model.convert.checkpoint import read_checkpoint
from priorclip.model.convert.torchscript import MAX_DEPTH, ModuleAttributes, read_torchscript, tensors_of
from priorclip.model.encoders.weights import read_state

pytestmark = pytest.mark.filterwarnings("ignore")
READERS: tuple[Callable[[Path], Any], ...] = (read_checkpoint, read_state, load_tensors)


class Layer(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def script(path: Path, weight: torch.Tensor) -> Path:
    torch.jit.script(Layer(weight)).save(str(path))
    return path


def packed(path: Path, kind: int, data: bytes, place: str = "/data/0") -> Path:
    """Returns a copy of an archive whose files are compressed, with other bytes in one of them."""
    copy = path.with_name("packed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith(place) else old.read(name))
    return copy


def peak() -> int:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("read", READERS)
def test_a_compressed_archive_is_refused(tmp_path: Path, kind: int, read: Callable[[Path], Any]) -> None:
    torch.save({"weight": torch.zeros(4)}, tmp_path / "a.pt")
    bomb = packed(tmp_path / "a.pt", kind, bytes(200_000_000))
    assert bomb.stat().st_size < 1_000_000
    before = peak()
    with pytest.raises(ValueError, match=r"packed\.pt is refused because it would take more memory than its size"):
        read(bomb)
    assert peak() - before < 50


@pytest.mark.parametrize("name", ["/data/0", "/data.pkl"])
def test_compressed_data_of_a_torchscript_archive_are_refused(tmp_path: Path, name: str) -> None:
    """torch compresses the code, which is not read."""
    bomb = packed(script(tmp_path / "a.pt", torch.zeros(4)), zipfile.ZIP_DEFLATED, bytes(200_000_000), name)
    assert bomb.stat().st_size < 1_000_000
    before = peak()
    with pytest.raises(ValueError, match=r"packed\.pt cannot be read .* would take more memory"):
        read_checkpoint(bomb)
    assert peak() - before < 50


def test_overlapping_files_are_refused(tmp_path: Path) -> None:
    """All entries of the directory point to the bytes of one file."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(1_000_000))
        archive.filelist += [archive.filelist[0]] * 50
        archive._didModify = True
    with pytest.raises(ValueError, match="more memory than its size"):
        refuse_bomb(path)


@pytest.mark.parametrize("read", [*READERS, read_torchscript])
def test_what_torch_writes_is_read(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    weight = torch.arange(1000.0).reshape(10, 100)[:, ::2].T
    if read is read_torchscript:
        found = read(script(tmp_path / "a.pt", weight))
    else:
        torch.save({"weight": weight}, tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
    assert torch.equal((found.state if read is read_checkpoint else found)["weight"], weight)


def test_a_tensor_that_repeats_one_value_is_refused(tmp_path: Path) -> None:
    """40 GB by a stride of 0, in a file of 1 kB."""
    path = script(tmp_path / "a.pt", torch.zeros(1).expand(100_000, 100_000))
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"a tensor of shape \(100000, 100000\) does not fit its storage"):
        read_torchscript(path)


def test_many_copies_of_one_storage_are_refused(tmp_path: Path) -> None:
    class Many(torch.nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            shared = torch.arange(1_000_000.0)
            for number in range(count):
                self.register_buffer(f"weight{number}", shared[:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "a.pt"
    torch.jit.script(Many(3)).save(str(path))
    assert {value.shape for value in read_torchscript(path).values()} == {(1_000_000,)}
    torch.jit.script(Many(9)).save(str(path))
    with pytest.raises(ValueError, match="its tensors take more than 4 times its size"):
        read_torchscript(path)


def module(**attributes: object) -> ModuleAttributes:
    found = ModuleAttributes()
    found.__setstate__(attributes)
    return found


def test_modules_that_contain_each_other_have_an_end() -> None:
    """2^40 places, a ring, and a chain that is too long; a module in two places is ordinary."""
    weight = torch.ones(2)
    level = module(weight=weight)
    assert set(tensors_of(module(left=level, right=level))) == {"left.weight", "right.weight"}
    wide = level
    for _ in range(40):
        wide = module(left=wide, right=wide)
    ring = module()
    ring.__setstate__({"again": ring})
    deep = level
    for _ in range(MAX_DEPTH + 2):
        deep = module(inner=deep)
    for tree in (wide, ring, deep):
        with pytest.raises(Exception, match="it has more than 20000 modules, or 100 inside each other"):
            tensors_of(tree)


def small_script(folder: Path) -> Path:
    """Returns an archive with one tensor, made at the first example of a test."""
    path = folder / "a.pt"
    if not path.exists():
        script(path, torch.arange(6.0).reshape(2, 3))
    return path


@fuzz
@given(place=st.integers(0, 10_000), data=st.binary(min_size=1, max_size=8))
def test_any_bytes_in_an_archive_are_tensors_or_an_error_that_names_it(tmp_path: Path, place: int, data: bytes) -> None:
    path, changed = small_script(tmp_path), tmp_path / "changed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                start = place % len(content)
                content = content[:start] + data + content[start + len(data) :]
            new.writestr(name, content)
    with contextlib.suppress(ValueError):
        assert all(isinstance(value, torch.Tensor) for value in read_torchscript(changed).values())


@fuzz
@given(place=st.integers(0, 100_000), data=st.binary(min_size=1, max_size=8))
def test_a_damaged_archive_is_tensors_or_an_error(tmp_path: Path, place: int, data: bytes) -> None:
    content, changed = small_script(tmp_path).read_bytes(), tmp_path / "changed.pt"
    start = place % len(content)
    changed.write_bytes(content[:start] + data + content[start + len(data) :])
    with contextlib.suppress(ValueError):
        read_checkpoint(changed)


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
@pytest.mark.parametrize("content", [b"[1]", b"[" * 100_000, b"\xff\xfe\x00", b" " * (5 << 20), None], ids=range(5))
def test_a_configuration_beside_weights_that_is_none_is_an_error(
    name: str, content: bytes | None, tmp_path: Path
) -> None:
    """The last one is a named pipe, which is not waited for."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        read_checkpoint(tmp_path)
