"""The record of a checkpoint guards the files, and itself: damage in it is found, and breaks nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorclip.common.checkpoint_files import find_checkpoints, find_damage
from priorclip.common.checkpoint_record import CHECKSUMS, load_record, read_record, write_record
from priorclip.common.files import sha256_of
from priorclip.training.checkpoints.files import find_best, remove_old
from priorclip.training.config import CheckpointConfig

EVALUATION = {"mean_recall": 41.666666666666664, "t2i_r1": 11.0}


def checkpoint_of(folder: Path, step: int, **changes: Any) -> Path:
    """A complete checkpoint with two small files."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in ("model.pt", "optimizer.pt"):
        (path / name).write_bytes(f"{name} of {step}".encode())
    record = {"step": step, "world_size": 2, "zero_stage": 2, "evaluation": EVALUATION, **changes}
    write_record(path / CHECKSUMS, {**record, "sha256": {each.name: sha256_of(each) for each in path.iterdir()}})
    return path


def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """A bit is harmless if the record still says the same, as with a flipped space."""
    checkpoint = checkpoint_of(tmp_path, 12)
    good, true = (checkpoint / CHECKSUMS).read_bytes(), load_record(checkpoint)
    harmless = 0
    for place in range(8 * len(good)):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        (checkpoint / CHECKSUMS).write_bytes(data)
        if find_damage(checkpoint) is None:
            assert load_record(checkpoint) == true, (place, bytes(data))
            harmless += 1
        else:
            assert read_record(checkpoint) == {}
    assert harmless < 0.02 * 8 * len(good)


@given(st.binary(max_size=200) | st.text().map(str.encode) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(
        ["step", "world_size", "zero_stage", "evaluation", "sha256", "record_sha256", "x"]), inner),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_record_of_any_content_is_damage_and_no_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    checkpoint = tmp_path_factory.mktemp("any") / "step_00000012"
    checkpoint.mkdir()
    (checkpoint / CHECKSUMS).write_bytes(content)
    found = find_damage(checkpoint)
    assert found is not None
    assert found.startswith(f"{CHECKSUMS} cannot be read: ")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"step": ' + b"9" * 10_000 + b"}", b"\xff", b""])
def test_record_that_python_cannot_hold_is_damage(tmp_path: Path, content: bytes) -> None:
    checkpoint = checkpoint_of(tmp_path, 12)
    (checkpoint / CHECKSUMS).write_bytes(content)
    assert str(find_damage(checkpoint)).startswith(f"{CHECKSUMS} cannot be read: ")


@pytest.mark.parametrize("changes", [{"step": 13}, {"world_size": 0}, {"world_size": "2"}, {"world_size": True},
    {"zero_stage": 4}, {"evaluation": []}, {"evaluation": {"mean_recall": "41"}}, {"more": 1}])  # fmt: skip
def test_value_that_no_run_writes_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Even with a right checksum, because the loader relies on these values."""
    checkpoint = checkpoint_of(tmp_path, 13)
    write_record(checkpoint / CHECKSUMS, {**load_record(checkpoint), "step": 12, **changes})
    checkpoint.rename(tmp_path / "step_00000012")
    assert find_damage(tmp_path / "step_00000012") is not None


@pytest.mark.parametrize("name", ["../model.pt", "/etc/hostname", "a/b", "."])
def test_record_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(tmp_path, 12)
    write_record(checkpoint / CHECKSUMS, {**load_record(checkpoint), "sha256": {name: 64 * "0"}})
    assert "its checksum of" in str(find_damage(checkpoint))


def test_record_of_version_0_1_has_no_checksum_of_its_own(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, 12)
    record = load_record(checkpoint)
    del record["record_sha256"]
    (checkpoint / CHECKSUMS).write_text(json.dumps(record))
    assert find_damage(checkpoint) is None


def test_damaged_record_beside_good_ones_breaks_nothing(tmp_path: Path) -> None:
    """The next saves look for the best checkpoint and remove old ones. They leave the damaged one alone."""
    for step in (4, 8, 12, 16):
        checkpoint_of(tmp_path, step, evaluation={"mean_recall": 100.0 - step})
    for step in (4, 8):
        path = tmp_path / f"step_{step:08d}" / CHECKSUMS
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    config = CheckpointConfig(keep=1)
    best = find_best(find_checkpoints(tmp_path), config)
    assert best is not None
    assert best.name == "step_00000012"
    remove_old(tmp_path / "step_00000016", config)
    assert [path.name[-2:] for path in find_checkpoints(tmp_path)] == ["16", "12", "08", "04"]
    shutil.rmtree(best)
    remove_old(tmp_path / "step_00000016", config)
    assert [path.name[-2:] for path in find_checkpoints(tmp_path)] == ["16", "08", "04"]
