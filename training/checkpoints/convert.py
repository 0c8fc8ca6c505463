"""Makes DeepSpeed's universal copy of a checkpoint: whole tensors by parameter, which any world size can load.

    checkpoints/universal/step_00000100/zero/PARAMETER/    fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
    checkpoints/universal/step_00000100/source.json        SHA-256 of each, of the original's record, and its own

DeepSpeed converts; we add what it leaves out, and the checksums. A copy that is damaged, or of another checkpoint, is
made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from priorclip.common.checkpoint_files import find_damaged_file, join_pieces
from priorclip.common.checkpoint_record import CHECKSUMS, load_sealed, write_record
from priorclip.common.files import fsync, sha256_of
from priorclip.common.output import get_logger
from priorclip.common.safe_load import load_tensors, only_safe_loads, refuse_unsafe
from priorclip.training.checkpoints.files import (
    SOURCE,
    Shape,
    discard,
    is_converted,
    remove_unfinished,
    set_aside,
    with_token,
)

logger = get_logger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
WRITE_FAILED = re.compile(r"inline_container|iostream|PytorchStreamWriter|file write failed")


class Unconvertible(ValueError):
    """The optimizer state cannot be split by parameter."""


def convert(
    checkpoint: Path, converted: Path, written: Shape, metadata: dict[str, Any], shapes: dict[str, torch.Size]
) -> None:
    """Writes the folder of whole tensors, unless a good one of this checkpoint already exists.

    Raises:
        OSError: there is no room for it; an incomplete folder is removed
        Unconvertible: the checkpoint has no optimizer state by parameter
        UnsafeFile: a file could run code
    """
    source, partial = sha256_of(checkpoint / CHECKSUMS), with_token(converted, "partial")
    if is_good_copy(converted, source):
        refuse_unsafe(converted)
        return
    if converted.exists():
        (discard if is_converted(converted) else set_aside)(converted)
    remove_unfinished(converted.parent, except_for="")
    partial.mkdir(parents=True)
    try:
        split_by_parameter(checkpoint, partial, written, metadata, shapes)
        write_record(partial / SOURCE, {"source": source, "sha256": sums_of(partial)})
        for path in (*partial.rglob("*"), partial):
            fsync(path)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if WRITE_FAILED.search(str(error)):  # torch does not say why a write failed
            raise OSError(f"{partial} cannot be written: {error}. Make room there, or check its quota") from error
        raise
    partial.rename(converted)


def is_good_copy(converted: Path, source: str) -> bool:
    """Whether the folder is a copy of the checkpoint whose record has this SHA-256, and has all its files unchanged."""
    try:
        record = load_sealed(converted / SOURCE)
        damage = None if record.get("source") == source else "it is of another checkpoint"
        damage = damage or find_damaged_file(converted, record["sha256"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damage = f"{SOURCE} cannot be read: {error}"
    if damage:
        logger.warning("%s is made anew: %s", converted, damage)
    return damage is None


def sums_of(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file in a folder and its folders, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def split_by_parameter(
    checkpoint: Path, folder: Path, written: Shape, metadata: dict[str, Any], shapes: dict[str, torch.Size]
) -> None:
    """Runs DeepSpeed's conversion and adds what it leaves out."""
    if list(checkpoint.glob("*_optim_states.pt")):
        options = {"input_folder": str(checkpoint), "output_folder": str(folder), "inject_missing_state": True}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), only_safe_loads():
            ds_to_universal.main(
                argparse.Namespace(
                    **options, num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True
                )
            )
    else:
        split_torch_state(metadata, folder / "zero")
    step = metadata["global_steps"] - metadata["skipped_steps"]
    if written.zero_stage == 3:
        fix_stage_3_layout(checkpoint, folder / "zero", written, shapes)
    for each in (folder / "zero").iterdir():
        if (each / "exp_avg.pt").is_file() and not (each / "step.pt").is_file():
            torch.save(torch.tensor(float(step)), each / "step.pt")
    missing = [name for name in shapes if not (folder / "zero" / name / "fp32.pt").is_file()]
    if missing:
        raise Unconvertible(f"the checkpoint has no {', '.join(missing[:3])}")


def split_torch_state(metadata: dict[str, Any], folder: Path) -> None:
    """Converts a checkpoint without ZeRO, where torch's optimizer state has numbers instead of parameter names."""
    names = [name for group in metadata.get("parameters", []) for name in group]
    state = (metadata["optimizer"] or {}).get("state")
    if not names or state is None or not all("exp_avg" in each for each in state.values()):
        raise Unconvertible("the optimizer's state is not AdamW's")
    for name, value in metadata["module"].items():
        (folder / name).mkdir(parents=True)
        torch.save({"param": value.float()}, folder / name / "fp32.pt")
    for number, each in state.items():
        for moment in MOMENTS:
            torch.save({"param": each[moment]}, folder / names[number] / f"{moment}.pt")
        torch.save(each["step"], folder / names[number] / "step.pt")


def fix_stage_3_layout(checkpoint: Path, folder: Path, written: Shape, shapes: dict[str, torch.Size]) -> None:
    """Gives the flat tensors of ZeRO 3 their shapes, and adds the frozen parameters, which DeepSpeed leaves out."""
    for name, shape in shapes.items():
        for path in (folder / name).glob("*.pt"):
            value = load_tensors(path)
            if torch.is_tensor(value) and value.ndim and path.name != "step.pt":
                torch.save({"param": value[: shape.numel()].reshape(shape)}, path)
    states = [load_tensors(path) for path in model_states(checkpoint, written)]
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        whole = join_pieces([state["frozen_param_fragments"][name] for state in states], shape.numel())
        (folder / name).mkdir(parents=True, exist_ok=True)
        torch.save({"param": whole.reshape(shape).float()}, folder / name / "fp32.pt")


def model_states(checkpoint: Path, written: Shape) -> list[Path]:
    """Returns DeepSpeed's files of the model's states: one per rank under ZeRO 3, otherwise one."""
    if written.zero_stage < 3:
        return [checkpoint / "mp_rank_00_model_states.pt"]
    return [checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(written.world_size)]
