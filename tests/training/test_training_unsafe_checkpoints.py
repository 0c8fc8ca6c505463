"""Checkpoints that somebody else changed: their code never runs, on resume, with another world size, or on export.

Each file is a real one of a toy run with a call of ``touch`` added to its pickle, and its checksum is right.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_launches import PYTHON, STOPPABLE, ToyRun, run_toys

from priorclip.common.checkpoint_files import average_buffers, load_ranks
from priorclip.common.checkpoint_record import CHECKSUMS, write_record
from priorclip.common.files import sha256_of
from priorclip.common.safe_load import UnsafeFile, only_safe_loads, refuse_unsafe
from priorclip.model.export.from_checkpoint import export_run, whole_state
from priorclip.training.checkpoints.convert import convert, sums_of
from priorclip.training.checkpoints.files import SOURCE, Shape

STEP = "step_00000012"
FILES = {
    "model": "mp_rank_00_model_states.pt",
    "optimizer": "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "buffers": "buffers_rank_00001.pt",
    "averages": "averages_rank_00001.pt",
    "generators": "generators_rank_00001.pt",
}
CONVERTED = ("zero/0.weight/fp32.pt", "zero/0.weight/exp_avg.pt", "zero/0.weight/step.pt", "zero/optimizer_state.pt")
CASES = [
    *(f"two-{kind}" for kind in FILES),
    *(f"one-{kind}" for kind in FILES),
    *(f"one-{Path(name).stem}" for name in CONVERTED),
]
REFUSED = r"is refused because it holds (posix|os)\.system, which could run code"


class Call:
    """Unpickled, it makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def poison(path: Path, marker: Path) -> None:
    """Adds the call to a file of a checkpoint, which keeps all that was in it."""
    state: Any = torch.load(path, weights_only=False) if path.is_file() else {}
    torch.save({**state, "note": Call(marker)} if isinstance(state, dict) else [state, Call(marker)], path)


def sign(checkpoint: Path) -> None:
    """Writes the right checksums of all files."""
    record = json.loads((checkpoint / CHECKSUMS).read_text())
    record["sha256"] = {path.name: sha256_of(path) for path in checkpoint.iterdir() if path.name != CHECKSUMS}
    write_record(checkpoint / CHECKSUMS, record)


def sign_copy(converted: Path) -> None:
    """Writes the right checksums of a converted copy."""
    record = json.loads((converted / SOURCE).read_text())
    (converted / SOURCE).unlink()
    write_record(converted / SOURCE, {"source": record["source"], "sha256": sums_of(converted)})


def poisoned_run(source: ToyRun, folder: Path, kind: str, marker: Path) -> Path:
    """A copy of a run whose newest checkpoint has the call in a file. Returns the path of the file."""
    shutil.copytree(source.folder, folder)
    checkpoint = folder / "checkpoints" / STEP
    path = checkpoint / FILES[kind]
    poison(path, marker)
    sign(checkpoint)
    return path


def make_converted(checkpoint: Path) -> Path:
    """Makes the copy by parameter, as a run with another world size does."""
    metadata = torch.load(checkpoint / FILES["model"], weights_only=False)
    shapes = {name: metadata["module"][name].shape for names in metadata["parameters"] for name in names}
    converted = checkpoint.parent / "universal" / checkpoint.name
    convert(checkpoint, converted, Shape(2, 2), metadata, shapes)
    return converted


@pytest.fixture(scope="module")
def resumed(toys: dict[str, ToyRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ToyRun, Path, Path]]:
    """Runs that resume on two ranks and on one: how they ended, the changed file, and the marker of its code."""
    parent = tmp_path_factory.mktemp("unsafe")
    found: dict[str, tuple[ToyRun, Path, Path]] = {}
    one = (PYTHON, "-m", "tests.toy_runs")
    for place, launcher in (("two", None), ("one", one)):
        changed, folder = {}, parent / place
        for kind in FILES:
            changed[kind] = poisoned_run(toys["whole"], folder / kind, kind, folder / f"{kind}.ran")
        if place == "one":
            for name in CONVERTED:
                kind = Path(name).stem
                shutil.copytree(toys["whole"].folder, folder / kind)
                changed[kind] = make_converted(folder / kind / "checkpoints" / STEP) / name
                poison(changed[kind], folder / f"{kind}.ran")
                sign_copy(changed[kind].parents[len(Path(name).parts) - 1])
        runs = run_toys(folder, dict.fromkeys(changed, STOPPABLE), launcher)
        found |= {f"{place}-{kind}": (runs[kind], path, folder / f"{kind}.ran") for kind, path in changed.items()}
    return found


@pytest.mark.parametrize("name", CASES)
def test_code_in_a_checkpoint_does_not_run(resumed: dict[str, tuple[ToyRun, Path, Path]], name: str) -> None:
    run, path, marker = resumed[name]
    assert not marker.exists()
    assert str(run.ended).startswith(f"{path} is refused because it holds posix.system, which could run code")


@pytest.mark.parametrize("kind", ["model", "optimizer", "buffers", "averages"])
def test_code_does_not_run_on_export(toys: dict[str, ToyRun], tmp_path: Path, kind: str) -> None:
    """Generators are not read on export."""
    path = poisoned_run(toys["whole"], tmp_path / "run", kind, tmp_path / "ran")
    with pytest.raises(UnsafeFile, match=f"{path} {REFUSED}"):
        whole_state(path.parent)
    assert not (tmp_path / "ran").exists()


def test_code_does_not_run_on_export_without_zero(toys: dict[str, ToyRun], tmp_path: Path) -> None:
    path = poisoned_run(toys["zero0"], tmp_path / "run", "model", tmp_path / "ran")
    (tmp_path / "run" / "config.yaml").write_text("model: {}\n")
    with pytest.raises(UnsafeFile, match=f"{path} {REFUSED}"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_file_that_changes_after_the_check_is_refused(toys: dict[str, ToyRun], tmp_path: Path) -> None:
    """Each load has the rule of its own, also in the code of DeepSpeed, which asks for no rule."""
    marker = tmp_path / "ran"
    for kind in ("buffers", "averages"):
        path = poisoned_run(toys["whole"], tmp_path / kind, kind, marker)
        with pytest.raises(UnsafeFile, match=f"{path} {REFUSED}"):
            average_buffers(path.parent) if kind == "buffers" else load_ranks(path.parent, "averages")
    with only_safe_loads(), pytest.raises(UnsafeFile, match=REFUSED):
        torch.load(path, weights_only=False)
    assert torch.load.__module__ == "torch.serialization", "as before"
    assert not marker.exists()


def test_bare_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "buffers_rank_00000.pt"
    path.write_bytes(pickle.dumps(Call(tmp_path / "ran")))
    with pytest.raises(UnsafeFile, match=f"{path} (is refused|cannot be loaded)"):
        refuse_unsafe(tmp_path)
    with pytest.raises(UnsafeFile, match=f"{path} is refused"):
        load_ranks(tmp_path, "buffers")
    assert not (tmp_path / "ran").exists()


RUNS = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "bf16-0", "bf16-1", "half2", "half3",
        "scaled", "unstepped", "whole")  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_of_every_stage_and_precision_are_safe(toys: dict[str, ToyRun], name: str) -> None:
    refuse_unsafe(toys[name].folder / "checkpoints")
