"""A run never starts from nothing where checkpoints are, and removes nothing that it cannot read or did not write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy_launches import ToyRun, assert_same, root_needed, run_toys

from priorclip.common.checkpoint_files import find_checkpoints, find_damage
from priorclip.training.checkpoints.convert import convert
from priorclip.training.checkpoints.files import SOURCE, Shape
from priorclip.training.config import MonitorConfig
from priorclip.training.monitoring.metric_log import MetricLog

EVERY = ("--run.checkpoint.every", "4", "--run.checkpoint.keep", "3")
STEPS = ("step_00000004", "step_00000008", "step_00000012")
# What a user may put beside the checkpoints. The last one has exactly the name of a checkpoint.
COPIES = ("step_00000001.good", "step_00000099_keep", "step_99", "step_00000012.partial-mine", "step_00000008.replaced",
          "universal/step_00000001.good", "universal/step_00000001", "step_00000099")  # fmt: skip


def flip_each(folder: Path) -> None:
    for step in STEPS:
        flip(folder / step)


def flip(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_each_record(folder: Path) -> None:
    for step in STEPS:
        (folder / step / "checksums.json").unlink()


def lose_the_disk(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("unmounted"))


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip_each, "none of them can be read (step_00000012: "),
    "unsealed": (lose_each_record, "checksums.json cannot be read: [Errno 2]"),
    "unmounted": (lose_the_disk, "[Errno 2] No such file or directory"),
    "file": (become_a_file, "[Errno 20] Not a directory"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ToyRun:
    return run_toys(tmp_path_factory.mktemp("whole"), {"whole": EVERY})["whole"]


@pytest.fixture(scope="module")
def started(whole: ToyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """The same command again, on two ranks, in copies of its run directory to which something happened."""
    parent = tmp_path_factory.mktemp("started")
    options = dict.fromkeys((*REFUSED, "copies", "newest"), EVERY)
    options["over"] = (*EVERY, "--run.checkpoint.resume", "false")
    for name in options:
        shutil.copytree(whole.folder, parent / name)
        (parent / name / "weights.pt").unlink()
    for name, (damage, _) in REFUSED.items():
        damage(parent / name / "checkpoints")
    flip_each(parent / "over" / "checkpoints")
    flip(parent / "newest" / "checkpoints" / STEPS[-1])
    (parent / "copies" / "checkpoints" / STEPS[-1]).rename(parent / "copies" / "kept")
    for name in COPIES:
        shutil.copytree(parent / "copies" / "kept", parent / "copies" / "checkpoints" / name)
    return run_toys(parent, options)


@pytest.mark.parametrize("name", REFUSED)
def test_run_does_not_start_over_by_itself(whole: ToyRun, started: dict[str, ToyRun], name: str) -> None:
    run = started[name]
    assert REFUSED[name][1] in str(run.ended)
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert not (run.folder / "weights.pt").exists()
    if name in ("flipped", "unsealed"):
        assert "--run.checkpoint.resume false" in str(run.ended)
        assert [path.name for path in reversed(find_checkpoints(run.folder / "checkpoints"))] == list(STEPS)


def test_run_starts_over_if_it_is_told_to(whole: ToyRun, started: dict[str, ToyRun]) -> None:
    """The checkpoints and the records of the earlier run stay."""
    run = started["over"]
    assert run.ended == 0
    assert_same(run, whole)
    for step in STEPS:
        assert "does not match its checksum" in str(find_damage(run.folder / "checkpoints" / "set-aside" / step))
        assert find_damage(run.folder / "checkpoints" / step) is None
    before = run.folder / "metrics.before-1.jsonl"
    assert before.read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_checkpoint_that_cannot_be_read_is_kept(whole: ToyRun, started: dict[str, ToyRun]) -> None:
    run = started["newest"]
    assert_same(run, whole)
    assert [path.name for path in reversed(find_checkpoints(run.folder / "checkpoints"))] == list(STEPS)
    assert "does not match its checksum" in str(find_damage(run.folder / "checkpoints" / "set-aside" / STEPS[-1]))


def test_copies_of_the_user_are_neither_read_nor_removed(whole: ToyRun, started: dict[str, ToyRun]) -> None:
    run, folder = started["copies"], started["copies"].folder / "checkpoints"
    assert f"resumed {folder / 'step_00000008'}: step 8" in run.output
    assert_same(run, whole)
    good = {path.name: path.read_bytes() for path in (run.folder / "kept").iterdir()}
    for name in COPIES:
        place = folder / ("set-aside/step_00000099" if name == "step_00000099" else name)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == good, name
    assert "it is the record of step 12" in run.output


def convert_newest(run: Path) -> Path:
    """Converts the newest checkpoint as a run of one rank does. Returns the copy."""
    checkpoint = run / "checkpoints" / STEPS[-1]
    metadata = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
    shapes = {name: value.shape for name, value in metadata["module"].items()}
    converted = checkpoint.parent / "universal" / checkpoint.name
    convert(checkpoint, converted, Shape(2, 2), metadata, shapes)
    return converted


@pytest.mark.parametrize("name", ["zero/0.weight/fp32.pt", "zero/4.bias/exp_avg.pt", "zero/0.bias/step.pt", SOURCE])
def test_flipped_bit_of_the_converted_copy_is_not_trained_on(whole: ToyRun, tmp_path: Path, name: str) -> None:
    """Any file of it, and its record. The copy is made anew from the checkpoint."""
    shutil.copytree(whole.folder, tmp_path / "run")
    path = convert_newest(tmp_path / "run") / name
    good, when = path.read_bytes(), path.stat().st_mtime_ns
    convert_newest(tmp_path / "run")
    assert path.stat().st_mtime_ns == when, "a good copy is used again"
    for place in (len(good) // 2, len(good) - 3):
        damaged = bytearray(good)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        convert_newest(tmp_path / "run")
        assert path.read_bytes() == good
    path.unlink()
    convert_newest(tmp_path / "run")
    assert path.read_bytes() == good


def test_converted_copy_of_a_user_is_not_removed(whole: ToyRun, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    note = tmp_path / "run" / "checkpoints" / "universal" / STEPS[-1] / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    assert (convert_newest(tmp_path / "run") / SOURCE).is_file()
    assert (note.parents[1] / "set-aside" / STEPS[-1] / "note.txt").read_text() == "mine"


def test_folder_that_may_not_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    root_needed("to become a user without rights")
    folder = tmp_path / "checkpoints"
    (folder / STEPS[0]).mkdir(parents=True)
    for path in (tmp_path, *list(tmp_path.parents)[:2]):
        path.chmod(0o755)
    folder.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            find_checkpoints(folder)
    finally:
        os.seteuid(0)


def test_records_of_each_earlier_run_are_kept(tmp_path: Path) -> None:
    """Runs that are killed before their first checkpoint start at step 1 again."""
    for loss in (1.0, 2.0, 3.0):
        log = MetricLog(tmp_path, 4, 0, True, False, MonitorConfig())
        log.write_metrics(1, {"train/loss": loss})
        log.close()
    found = [(tmp_path / f"metrics{name}.jsonl").read_text() for name in (".before-1", ".before-2", "")]
    assert [f'"train/loss": {loss}' in text for loss, text in zip((1.0, 2.0, 3.0), found, strict=True)] == [True] * 3
