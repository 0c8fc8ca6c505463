"""Runs that resume with another world size or ZeRO stage: the loss curve continues as before."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from toy_launches import HALF, PYTHON, SCALES, STOPPABLE, ToyRun, root_needed, run_toys

from priorclip.training.checkpoints.convert import convert
from priorclip.training.checkpoints.files import Shape
from priorclip.training.checkpoints.reshape import load_param

Conversion = Callable[[], None]
ONE = (PYTHON, "-m", "tests.toy_runs")
# Name of the case: (run that stopped, ZeRO stage of the run that resumes).
ON_ONE = {"2_to_1": ("zero2", "2"), "z3_2_to_1": ("zero3", "3"), "z0_2_to_1": ("zero0", "0")}
ON_TWO = {
    "1_to_2": ("single2", "2"),
    "z3_1_to_2": ("single3", "3"),
    "offload2_to_z3": ("zero2-offload", "3"),
    "offload3_to_z2": ("zero3-offload", "2"),
    "z3_to_offload2": ("zero3", "zero2-offload"),
    "z1_to_offload3": ("zero1", "zero3-offload"),
    **{f"z{a}_to_z{b}": (f"zero{a}", f"{b}") for a in range(4) for b in range(4) if a != b},
}
HALF_ON_ONE = {"half3_2_to_1": ("half3", "3")}
HALF_ON_TWO = {"half2_to_z3": ("half2", "3"), "half3_to_z1": ("half3", "1"), "half2_to_z0": ("half2", "0")}
ON_FOUR = {"2_to_4": ("zero2", "2"), "z3_2_to_4": ("zero3", "3"), "z1_2_to_z3_4": ("zero1", "3")}


def halfway(run: ToyRun, folder: Path) -> None:
    """Copies the run as it was after its first epoch, 6 of its 12 steps."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")


def resume_all(
    parent: Path, cases: dict[str, tuple[str, str]], sources: dict[str, ToyRun], launcher: Sequence[str] | None
) -> dict[str, ToyRun]:
    for name, (source, _) in cases.items():
        halfway(sources[source], parent / name)
    return run_toys(parent, {name: words_of(*case) for name, case in cases.items()}, launcher)


def words_of(source: str, stage: str) -> Sequence[str]:
    return (*(HALF if source.startswith("half") else ()), "--run.engine.zero", stage)


@pytest.fixture(scope="module")
def reshaped(toys: dict[str, ToyRun], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToyRun]:
    """Runs of three launches: of one process, of two ranks, of four ranks."""
    parent = tmp_path_factory.mktemp("reshaped")
    for name, (source, _) in (ON_ONE | HALF_ON_ONE).items():
        halfway(toys[source], parent / name)
    shutil.copytree(toys["whole"].folder, parent / "batch_norm")
    options = {name: words_of(*case) for name, case in (ON_ONE | HALF_ON_ONE).items()}
    for name in SCALES:
        halfway(toys[name], parent / name)
        settings = str(toys[name].folder.parent / f"{name}.json")
        options[name] = ("--run.engine.precision", "fp16", "--run.engine.zero", settings)
    options |= {f"single{stage}": ("--run.engine.zero", stage) for stage in ("2", "3")}
    done = run_toys(parent, {**options, "batch_norm": STOPPABLE}, ONE)
    done |= resume_all(parent, ON_TWO | HALF_ON_TWO, {**toys, **done}, None)
    four = (PYTHON, "-m", "cluster", "launch", "--nproc", "4", "--", "tests.toy_runs")
    return done | resume_all(parent, ON_FOUR, toys, four)


@pytest.mark.parametrize("name", [*ON_ONE, *ON_TWO, *ON_FOUR])
def test_loss_curve_goes_on(toys: dict[str, ToyRun], reshaped: dict[str, ToyRun], name: str) -> None:
    run, whole = reshaped[name], toys["zero2"]
    assert run.ended == 0
    assert f"resumed {run.folder / 'checkpoints' / 'step_00000006'}: step 6" in run.output
    assert run.losses() == pytest.approx(whole.losses(), rel=2e-6)
    assert run.records("train/lr") == pytest.approx(whole.records("train/lr"), rel=1e-9)
    for key, value in whole.weights().items():
        torch.testing.assert_close(run.weights()[key], value, rtol=1e-5, atol=1e-7)
    native = {"z0_2_to_1"}  # without ZeRO every rank has all states
    messages = [line for line in run.output.splitlines() if str(run.folder / "checkpoints") in line and " has " in line]
    assert len(messages) == (0 if name in native else 1)
    assert all("taken over by parameter" in line for line in messages)


@pytest.mark.parametrize("name", [*HALF_ON_ONE, *HALF_ON_TWO])
def test_bfloat16_with_a_frozen_layer_goes_on(toys: dict[str, ToyRun], reshaped: dict[str, ToyRun], name: str) -> None:
    """Bit for bit with the same world size, because the masters are float32. In ZeRO 0 the optimizer starts afresh."""
    run, whole = reshaped[name], toys[(HALF_ON_ONE | HALF_ON_TWO)[name][0]]
    assert run.ended == 0
    (message,) = [
        line for line in run.output.splitlines() if str(run.folder / "checkpoints") in line and " has " in line
    ]
    assert ("taken over by parameter" in message) == (name != "half2_to_z0")
    assert ("OPTIMIZER STARTS AFRESH" in message) == (name == "half2_to_z0")
    close = {"half3_2_to_1": 1e-3, "half2_to_z0": 1e-2}.get(name, 0.0)
    assert run.losses() == pytest.approx(whole.losses(), rel=close, abs=0.0)
    for key, value in whole.weights().items():
        torch.testing.assert_close(run.weights()[key], value, rtol=close, atol=2 * close)
    for key in ("0.weight", "0.bias"):
        assert torch.equal(run.weights()[key], whole.weights()[key]), "frozen"


@pytest.mark.parametrize(("name", "dropped"), [("scaled", range(1, 6)), ("unstepped", range(6, 7))])
def test_loss_scale_goes_on(toys: dict[str, ToyRun], reshaped: dict[str, ToyRun], name: str, dropped: range) -> None:
    """One rank resumes an fp16 run of two ranks. With the initial scale, steps would be skipped again."""
    run, whole = reshaped[name], toys[name]
    first, last, again = (
        torch.load(each.folder / "checkpoints" / f"step_{step:08d}" / "mp_rank_00_model_states.pt", weights_only=False)
        for each, step in ((whole, 6), (whole, 12), (run, 12))
    )
    assert first["skipped_steps"] in dropped
    # The number may differ by 1, because one rank alone does not first divide its gradient by the world size.
    assert abs(again["skipped_steps"] - last["skipped_steps"]) <= 1
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-2)


@pytest.fixture
def source(toys: dict[str, ToyRun], tmp_path: Path) -> tuple[Path, Path, Conversion]:
    """A checkpoint of two ranks under ZeRO 2, the path of its converted copy, and a function that converts it."""
    halfway(toys["zero2"], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000006"
    metadata = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
    shapes = {name: value.shape for name, value in metadata["module"].items()}
    converted = checkpoint.parent / "universal" / checkpoint.name
    return checkpoint, converted, lambda: convert(checkpoint, converted, Shape(2, 2), metadata, shapes)


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeeds_own_converter_needs_no_flag(
    toys: dict[str, ToyRun], stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its float32 weights are those that the run ended with."""
    run = toys[f"zero{stage}"]
    checkpoint = run.folder / "checkpoints" / "step_00000012"
    words = ["--input_folder", checkpoint, "--output_folder", tmp_path / "universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    monkeypatch.setattr("sys.argv", ["ds_to_universal", *map(str, words), *workers])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    for name, value in run.weights().items():
        found = torch.load(tmp_path / "universal" / "zero" / name / "fp32.pt", weights_only=True)
        flat = (found if stage == "3" else found["param"]).flatten()  # stage 3 writes a tensor with padding at its end
        assert torch.equal(flat[: value.numel()], value.flatten()), name


def test_converted_copy_of_another_checkpoint_is_made_anew(source: tuple[Path, Path, Conversion]) -> None:
    """The run started again and replaced the checkpoint of this step, and a conversion was killed."""
    checkpoint, converted, run = source
    run()
    path = converted / "zero" / "0.weight" / "fp32.pt"
    good = path.read_bytes()
    begun = path.stat().st_mtime_ns
    run()
    assert path.stat().st_mtime_ns == begun, "the second call does not convert again"
    path.write_bytes(b"of an older run")
    sums = checkpoint / "checksums.json"
    sums.write_text(sums.read_text() + "\n")
    partial = converted.with_name(f"{converted.name}.partial-0123abcd")
    (partial / "zero" / "torn").mkdir(parents=True)
    run()
    assert torch.equal(load_param(path), torch.load(io.BytesIO(good), weights_only=True)["param"])
    assert not partial.exists()


def test_full_disk_while_converting_does_not_lose_the_optimizer(source: tuple[Path, Path, Conversion]) -> None:
    """torch does not say why a write failed. Taken as an unknown state, it would lose the momenta."""
    root_needed("to mount a file system")
    _, converted, run = source
    converted.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(converted.parent)], check=True)
    try:
        with pytest.raises(OSError, match=r"step_00000006.partial.*Make room there"):
            run()
        assert list(converted.parent.iterdir()) == []
    finally:
        subprocess.run(["umount", str(converted.parent)], check=True)


def test_batch_norm_statistics_are_averaged(toys: dict[str, ToyRun], reshaped: dict[str, ToyRun]) -> None:
    folder = toys["whole"].folder / "checkpoints" / "step_00000012"
    ranks = [torch.load(folder / f"buffers_rank_{rank:05d}.pt", weights_only=True) for rank in range(2)]
    weights = reshaped["batch_norm"].weights()
    for name, value in ranks[0].items():
        assert torch.equal(weights[name], (value + ranks[1][name]) / 2 if value.is_floating_point() else value), name
