"""Resuming with another world size or ZeRO stage, through DeepSpeed's universal checkpoint.

    checkpoints/step_00000100/                             of 2 ranks under ZeRO 2
    checkpoints/universal/step_00000100/zero/PARAMETER/    fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt: whole tensors

Rank 0 converts once, the others wait, then each takes its part. DeepSpeed converts and loads; what it leaves out is
added here. It refuses a stage 3 checkpoint elsewhere and others in stage 3, for the folders differ in little things:
they are evened out. It has no loader without ZeRO, where the whole tensors are simply set. Under ZeRO 3 it gives all
parameter groups the settings of the first, and one step counter, which each then advances: both are undone. Batch-norm
statistics, which each rank gathers alone, are averaged over the ranks that wrote them.

Weights, schedule, steps and data position always carry over. An optimizer state that does not starts afresh, and the
user is told before the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from priorclip.training.checkpoints.files import (
    CHECKSUMS,
    Shape,
    averaged_buffers,
    digest,
    set_buffers,
    state_of_run,
    sync_folder,
)
from priorclip.training.checkpoints.writer import read_soon

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
SOURCE = "source.sha256"  # in a converted folder: of the checksums of the checkpoint that it was made of
NOT_WRITTEN = re.compile(r"inline_container|iostream|PytorchStreamWriter|file write failed")
LOADS = itertools.count()


class Unconvertible(ValueError):
    """The optimizer's state cannot be taken apart by parameter."""


def load_reshaped(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, written: Shape) -> dict[str, Any]:
    """Bring the engine to the state of a checkpoint that ``written`` ranks wrote; returns what the run saved with it.

    A collective.

    Raises:
        OSError: there is no room for the converted copy, or files cannot be read.
    """
    metadata = torch.load(model_states(checkpoint, written)[0], map_location="cpu", weights_only=False)
    converted = checkpoint.parent / "universal" / checkpoint.name
    problem = once(lambda: convert(checkpoint, converted, written, metadata, shapes_of(engine)))
    if not problem and engine.zero_optimization_stage() == 0 and not is_torch(engine.optimizer):
        problem = f"{type(engine.optimizer).__name__} takes no optimizer state by parameter"
    step = metadata["global_steps"]
    said_once = logging.WARNING if dist.get_rank() == 0 else logging.DEBUG
    if problem:
        logger.log(
            said_once,
            "%s was written by %s and this run has %s. Weights, schedule and data position carry over; the OPTIMIZER"
            " STARTS AFRESH, without its momenta, at step %d: %s", checkpoint, written, Shape.of(engine), step, problem,
        )  # fmt: skip
        set_weights(engine, whole_weights(checkpoint, written, metadata))
    else:
        logger.log(
            said_once,
            "%s was written by %s and this run has %s: the optimizer's state is taken over by parameter, through %s",
            checkpoint, written, Shape.of(engine), converted,
        )  # fmt: skip
        load_converted(engine, converted, metadata)
    take_loss_scale(engine, checkpoint)
    engine.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    for group, rate in zip(engine.optimizer.param_groups, metadata["lr_scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    engine.global_steps = step
    engine.global_samples = metadata["global_samples"]
    engine.skipped_steps = metadata["skipped_steps"]
    set_buffers(engine.module, averaged_buffers(checkpoint))
    dist.barrier()
    return state_of_run(metadata)


def once(convert: Any) -> str:
    """Run it on rank 0; the others wait as long as it takes, in no collective. Returns what made it impossible."""
    store = dist.distributed_c10d._get_default_store()
    key = f"universal/{next(LOADS)}"
    if dist.get_rank() == 0:
        answer = {"problem": "", "error": ""}
        try:
            convert()
        except OSError as error:
            answer["error"] = str(error)
        except Exception as error:
            answer["problem"] = f"{type(error).__name__}: {error}"
        store.set(key, json.dumps(answer))
    answer = json.loads(read_soon(store, key))
    if answer["error"]:
        raise OSError(f"the checkpoint cannot be converted for this run: {answer['error']}")
    return answer["problem"]


def convert(
    checkpoint: Path, converted: Path, written: Shape, metadata: dict[str, Any], shapes: dict[str, torch.Size]
) -> None:
    """Write the folder of whole tensors, unless that of this very checkpoint is there already.

    Raises:
        OSError: there is no room for it; what was written is removed.
        Unconvertible: the checkpoint has no optimizer state by parameter.
    """
    source = digest(checkpoint / CHECKSUMS)
    mark, partial = converted / SOURCE, converted.with_name(f"{converted.name}.partial")
    if mark.is_file() and mark.read_text() == source:
        return
    shutil.rmtree(partial, ignore_errors=True)
    if converted.exists():  # of another checkpoint, which a run that was begun again has replaced by this one
        converted.rename(partial)  # half removed, it must not be taken for a whole one
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        take_apart(checkpoint, partial, written, metadata, shapes)
        (partial / SOURCE).write_text(source)
        sync_tree(partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if NOT_WRITTEN.search(str(error)):  # torch's own error of a write that failed does not say why
            raise OSError(f"{partial} cannot be written: {error}. Make room there, or see to its quota") from error
        raise
    partial.rename(converted)


def take_apart(
    checkpoint: Path, folder: Path, written: Shape, metadata: dict[str, Any], shapes: dict[str, torch.Size]
) -> None:
    """DeepSpeed's conversion, and what it leaves out."""
    if list(checkpoint.glob("*_optim_states.pt")):
        options = {"input_folder": str(checkpoint), "output_folder": str(folder), "inject_missing_state": True}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(
                argparse.Namespace(
                    **options, num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True
                )
            )
    else:
        from_numbered(metadata, folder / "zero")
    step = metadata["global_steps"] - metadata["skipped_steps"]
    if written.zero_stage == 3:
        even_out(checkpoint, folder / "zero", written, shapes)
    for each in (folder / "zero").iterdir():
        if (each / "exp_avg.pt").is_file() and not (each / "step.pt").is_file():
            torch.save(torch.tensor(float(step)), each / "step.pt")
    missing = [name for name in shapes if not (folder / "zero" / name / "fp32.pt").is_file()]
    if missing:
        raise Unconvertible(f"the checkpoint has no {', '.join(missing[:3])}")


def sync_tree(folder: Path) -> None:
    """A converted copy has no checksums: it gets its name only when all of it is on the disk."""
    for path in folder.rglob("*"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)


def from_numbered(metadata: dict[str, Any], folder: Path) -> None:
    """Without ZeRO, rank 0 has saved torch's own optimizer state, which knows its parameters by number only."""
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


def even_out(checkpoint: Path, folder: Path, written: Shape, shapes: dict[str, torch.Size]) -> None:
    """Tensors from ZeRO 3 are flat, and parameters that are not trained are left out: bring them to the usual form."""
    for name, shape in shapes.items():
        for path in (folder / name).glob("*.pt"):
            value = torch.load(path, weights_only=True)
            if torch.is_tensor(value) and value.ndim and path.name != "step.pt":
                torch.save({"param": value[: shape.numel()].reshape(shape)}, path)
    states = [torch.load(path, map_location="cpu", weights_only=False) for path in model_states(checkpoint, written)]
    for name, shape in (states[0]["frozen_param_shapes"] or {}).items():
        pieces = [state["frozen_param_fragments"][name].flatten() for state in states]
        (folder / name).mkdir(parents=True, exist_ok=True)
        whole = torch.cat(pieces)[: shape.numel()].reshape(shape)
        torch.save({"param": whole.float()}, folder / name / "fp32.pt")


def load_converted(engine: deepspeed.DeepSpeedEngine, converted: Path, metadata: dict[str, Any]) -> None:
    folder = converted / "zero"
    weights = {name: load_param(folder / name / "fp32.pt") for name, _ in engine.module.named_parameters()}
    set_weights(engine, weights)
    steps = sorted(folder.glob("*/step.pt"))
    if not steps:
        return  # the optimizer has not taken one yet: all were dropped, as fp16 begins
    if engine.zero_optimization_stage() == 0 and is_torch(engine.optimizer):
        for name, parameter in engine.module.named_parameters():
            if (folder / name / "exp_avg.pt").is_file():
                state = {moment: load_param(folder / name / f"{moment}.pt").to(parameter.device) for moment in MOMENTS}
                step = torch.tensor(float(torch.load(folder / name / "step.pt", weights_only=True)))
                engine.optimizer.state[parameter] = {"step": step, **state}
        return
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    if dist.get_rank() == 0:
        # What the loaders of the stages look for beside the tensors; the settings are this run's own.
        taken = torch.tensor(float(torch.load(steps[0], weights_only=True)))
        common = {"ds_version": deepspeed.__version__, "param_groups": settings}
        inner = {"state": {0: {"step": taken}}, "param_groups": settings}
        torch.save({**common, "optimizer_state_dict": inner}, folder / "optimizer_state.pt")
    dist.barrier()
    with groups_held(engine.optimizer) if engine.zero_optimization_stage() < 3 else contextlib.nullcontext():
        engine.optimizer._load_universal_checkpoint(str(converted), True, False)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.update_lp_params()


def take_loss_scale(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> None:
    """fp16's loss scale and its history: at DeepSpeed's first one, the next steps would overflow and be dropped."""
    mine = getattr(engine.optimizer, "loss_scaler", None)
    files = sorted(checkpoint.glob("*_optim_states.pt"))
    if not engine.fp16_enabled() or mine is None or not files:
        return
    state = torch.load(files[0], map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
    if type(state.get("loss_scaler")) is type(mine):
        engine.optimizer.loss_scaler = state["loss_scaler"]


@contextlib.contextmanager
def groups_held(optimizer: Any) -> Iterator[None]:
    """Only parameter groups of which this rank's shard has a part: on others, all padding, DeepSpeed's loader fails."""
    inner, shards, groups = optimizer.optimizer, optimizer.bit16_groups, optimizer.optimizer.param_groups
    held = [number for number, shard in enumerate(shards) if any(each._hp_mapping is not None for each in shard)]
    inner.param_groups, optimizer.bit16_groups = [groups[number] for number in held], [shards[n] for n in held]
    try:
        yield
    finally:
        inner.param_groups, optimizer.bit16_groups = groups, shards


def set_weights(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> None:
    """Whole weights into the model, sharded or not, and into float32 masters made of them."""
    for name, parameter in engine.module.named_parameters():
        sharded = hasattr(parameter, "ds_id")
        with GatheredParameters([parameter] if sharded else [], modifier_rank=0, enabled=sharded):
            if not sharded or dist.get_rank() == 0:
                parameter.data.copy_(weights[name])
    for refresh in ("_restore_from_bit16_weights", "refresh_fp32_params"):
        if hasattr(engine.optimizer, refresh):
            getattr(engine.optimizer, refresh)()
            return


def whole_weights(checkpoint: Path, written: Shape, metadata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """float32 where the checkpoint has them so."""
    if written.zero_stage == 0:
        return metadata["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def model_states(checkpoint: Path, written: Shape) -> list[Path]:
    if written.zero_stage < 3:
        return [checkpoint / "mp_rank_00_model_states.pt"]
    return [checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(written.world_size)]


def shapes_of(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Size]:
    return {name: torch.Size(getattr(each, "ds_shape", each.shape)) for name, each in engine.module.named_parameters()}


def load_param(path: Path) -> torch.Tensor:
    value = torch.load(path, map_location="cpu", weights_only=True)
    return value["param"] if isinstance(value, dict) else value


def is_torch(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer)
