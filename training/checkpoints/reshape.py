"""Resumes with another world size or ZeRO stage, through DeepSpeed's universal checkpoint.

    checkpoints/step_00000100/                             of 2 ranks under ZeRO 2
    checkpoints/universal/step_00000100/zero/PARAMETER/    its state by parameter (convert.py)

Rank 0 converts once, the others wait, then each rank takes its part. DeepSpeed converts and loads; we add the rest:

* It cannot load stage-3 checkpoints in other stages, or the reverse. We fix the small layout differences.
* It has no loader without ZeRO. We set the whole tensors.
* Under ZeRO 3 it gives all parameter groups the settings of the first one, and one shared step counter, which each
  group then advances. We restore both.
* Batch-norm statistics differ between ranks. We average them over the ranks that wrote them.

Weights, schedule, steps and data position always carry over. If the optimizer state cannot carry over, it starts from
zero, and a warning says so before the first step.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from priorclip.common.checkpoint_files import average_buffers
from priorclip.common.output import get_logger
from priorclip.common.safe_load import UnsafeFile, load_tensors, only_safe_loads
from priorclip.training.checkpoints.convert import MOMENTS, convert, model_states
from priorclip.training.checkpoints.files import Shape
from priorclip.training.checkpoints.store import wait_for_key
from priorclip.training.engine.buffers import set_buffers

logger = get_logger(__name__)

LOADS = itertools.count()  # loads of this process; all ranks have the same number


def load_reshaped(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, written: Shape) -> dict[str, Any]:
    """Sets the engine to the state of a checkpoint of shape ``written``. Returns what the run saved with it.

    A collective.

    Raises:
        OSError: there is no room for the converted copy, or files cannot be read
        UnsafeFile: a file of the checkpoint or of the converted copy could run code
    """
    metadata = load_tensors(model_states(checkpoint, written)[0])
    converted = checkpoint.parent / "universal" / checkpoint.name
    problem = run_on_rank_0(lambda: convert(checkpoint, converted, written, metadata, parameter_shapes(engine)))
    if not problem and engine.zero_optimization_stage() == 0 and not is_torch(engine.optimizer):
        problem = f"{type(engine.optimizer).__name__} takes no optimizer state by parameter"
    step = metadata["global_steps"]
    level = logging.WARNING if dist.get_rank() == 0 else logging.DEBUG
    if problem:
        logger.log(
            level,
            "%s was written by %s and this run has %s. Weights, schedule and data position carry over. The OPTIMIZER"
            " STARTS AFRESH, without its momenta, at step %d: %s", checkpoint, written, Shape.of(engine), step, problem,
        )  # fmt: skip
        set_weights(engine, whole_weights(checkpoint, written, metadata))
    else:
        logger.log(
            level,
            "%s was written by %s and this run has %s: the optimizer state is taken over by parameter, through %s",
            checkpoint, written, Shape.of(engine), converted,
        )  # fmt: skip
        load_converted(engine, converted)
    load_loss_scale(engine, checkpoint)
    engine.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    for group, rate in zip(engine.optimizer.param_groups, metadata["lr_scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    engine.global_steps = step
    engine.global_samples = metadata["global_samples"]
    engine.skipped_steps = metadata["skipped_steps"]
    set_buffers(engine.module, average_buffers(checkpoint))
    dist.barrier()
    return run_state(metadata)


def run_state(client_state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state that the run saved. Older checkpoints have it among DeepSpeed's own keys."""
    return client_state.get("run", client_state)


def run_on_rank_0(convert: Callable[[], None]) -> str:
    """Converts on rank 0. The other ranks wait without a collective, so that no timeout ends them.

    Returns the reason if the conversion is impossible, or an empty string.
    """
    store = dist.distributed_c10d._get_default_store()
    key = f"universal/{next(LOADS)}"
    if dist.get_rank() == 0:
        answer = {"problem": "", "error": "", "unsafe": ""}
        try:
            convert()
        except UnsafeFile as error:
            answer["unsafe"] = str(error)
        except OSError as error:
            answer["error"] = str(error)
        except Exception as error:
            answer["problem"] = f"{type(error).__name__}: {error}"
        store.set(key, json.dumps(answer))
    answer = json.loads(wait_for_key(store, key))
    if answer["unsafe"]:
        raise UnsafeFile(answer["unsafe"])
    if answer["error"]:
        raise OSError(f"the checkpoint cannot be converted for this run: {answer['error']}")
    return answer["problem"]


def load_converted(engine: deepspeed.DeepSpeedEngine, converted: Path) -> None:
    """Loads weights and optimizer state from the folder of whole tensors. A collective."""
    folder = converted / "zero"
    weights = {name: load_param(folder / name / "fp32.pt") for name, _ in engine.module.named_parameters()}
    set_weights(engine, weights)
    steps = sorted(folder.glob("*/step.pt"))
    if not steps:
        return  # the optimizer has taken no step yet: fp16 dropped all of them
    if engine.zero_optimization_stage() == 0 and is_torch(engine.optimizer):
        for name, parameter in engine.module.named_parameters():
            if (folder / name / "exp_avg.pt").is_file():
                state = {moment: load_param(folder / name / f"{moment}.pt").to(parameter.device) for moment in MOMENTS}
                step = torch.tensor(float(load_tensors(folder / name / "step.pt")))
                engine.optimizer.state[parameter] = {"step": step, **state}
        return
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    if dist.get_rank() == 0:
        # DeepSpeed's loaders need this file beside the tensors. It has the settings of this run.
        taken = torch.tensor(float(load_tensors(steps[0])))
        common = {"ds_version": deepspeed.__version__, "param_groups": settings}
        inner = {"state": {0: {"step": taken}}, "param_groups": settings}
        torch.save({**common, "optimizer_state_dict": inner}, folder / "optimizer_state.pt")
    dist.barrier()
    groups = groups_of_rank(engine.optimizer) if engine.zero_optimization_stage() < 3 else contextlib.nullcontext()
    with groups, only_safe_loads():
        engine.optimizer._load_universal_checkpoint(str(converted), True, False)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.update_lp_params()


def load_loss_scale(engine: deepspeed.DeepSpeedEngine, checkpoint: Path) -> None:
    """Loads fp16's loss scale and its history. With DeepSpeed's initial scale, the next steps would overflow."""
    current = getattr(engine.optimizer, "loss_scaler", None)
    files = sorted(checkpoint.glob("*_optim_states.pt"))
    if not engine.fp16_enabled() or current is None or not files:
        return
    state = load_tensors(files[0], mmap=True)["optimizer_state_dict"]
    if type(state.get("loss_scaler")) is type(current):
        engine.optimizer.loss_scaler = state["loss_scaler"]


@contextlib.contextmanager
def groups_of_rank(optimizer: Any) -> Iterator[None]:
    """Hides parameter groups of which this rank's shard has only padding, because DeepSpeed's loader fails on them."""
    inner, shards, groups = optimizer.optimizer, optimizer.bit16_groups, optimizer.optimizer.param_groups
    held = [number for number, shard in enumerate(shards) if any(each._hp_mapping is not None for each in shard)]
    inner.param_groups, optimizer.bit16_groups = [groups[number] for number in held], [shards[n] for n in held]
    try:
        yield
    finally:
        inner.param_groups, optimizer.bit16_groups = groups, shards


def set_weights(engine: deepspeed.DeepSpeedEngine, weights: dict[str, torch.Tensor]) -> None:
    """Copies whole weights into the model, sharded or not, and into the optimizer's float32 masters."""
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
    """Returns all weights, in float32 if the checkpoint has them in float32."""
    if written.zero_stage == 0:
        return metadata["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), only_safe_loads():
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def parameter_shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Size]:
    return {name: torch.Size(getattr(each, "ds_shape", each.shape)) for name, each in engine.module.named_parameters()}


def load_param(path: Path) -> torch.Tensor:
    value = load_tensors(path)
    return value["param"] if isinstance(value, dict) else value


def is_torch(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer)
