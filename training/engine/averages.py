"""An exponential moving average of the trained weights, under any ZeRO stage: each rank averages its own piece.

    averages = Averages(engine, AverageConfig(decay=0.999))
    averages.update()                          # after each step
    weights = averages.state_dict()            # whole, on the CPU; a collective
    with averages.in_place(): evaluate()       # the engine computes with the averages; a collective
    averages.load(checkpoint)                  # the averages of a checkpoint of any world size and ZeRO stage

We average the optimizer's float32 masters. In the module's bfloat16 copy, a step of (1 - decay) of a difference would
be lost by rounding. Under ZeRO 1 to 3 a rank holds a shard of the masters and averages that shard: it takes the memory
of one more float32 shard, and an update needs no communication. Buffers (batch-norm statistics) are not averaged.
timm's ModelEmaV3 does the arithmetic on the shards.

ZeRO cannot swap its weights for others. So `in_place` gathers weights and averages whole on the CPU and copies them
into the module and back. This is fast enough for evaluations, but not for every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from priorclip.common.checkpoint_files import join_pieces, load_ranks
from priorclip.common.late_imports import late_imports
from priorclip.training.config import AverageConfig
from priorclip.training.engine.build import full_state_dict


class Averages:
    """Moving averages of an engine's trained parameters.

    Args:
        engine: averages start from its weights, so make them before its first step
        config: decay and warm-up
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, config: AverageConfig) -> None:
        with late_imports():  # here, because few runs need it and timm takes seconds to import
            from timm.utils import ModelEmaV3

        self.engine = engine
        trained = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.kept = ModelEmaV3(
            Pieces(self.parameters), decay=config.decay, use_warmup=config.warmup, dtype=torch.float32
        )

    def update(self) -> None:
        """Moves the averages towards the weights. Call it after each step."""
        self.kept.update(Pieces(self.parameters), step=self.engine.global_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages in the form of `full_state_dict`. A collective."""
        with self.swapped():
            return full_state_dict(self.engine)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it, the optimizer's masters hold the averages. A bfloat16 module keeps its own weights."""
        held = [value.detach().clone() for value in Pieces(self.parameters).values]
        self.write(list(self.kept.module.values))
        try:
            yield
        finally:
            self.write(held)

    @torch.no_grad()
    def write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            if hasattr(parameter, "ds_id"):
                safe_set_local_fp32_param(parameter, value.detach())
            elif value.numel():
                piece(parameter).copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the engine computes with the averages. A collective at entry and at exit."""
        own, averaged = full_state_dict(self.engine), self.state_dict()
        copy_weights(self.engine.module, averaged)
        try:
            yield
        finally:
            copy_weights(self.engine.module, own)

    def named(self) -> dict[str, Tensor]:
        """Returns this rank's pieces by parameter name, for a checkpoint."""
        return dict(zip(self.names, self.kept.module.values, strict=True))

    @torch.no_grad()
    def load(self, checkpoint: Path) -> bool:
        """Continues from the averages of a checkpoint. A collective.

        Returns False if the checkpoint has none; then the averages start from the current weights.
        """
        ranks = load_ranks(checkpoint, "averages")
        if not ranks:
            self.kept.set(Pieces(self.parameters))
            return False
        for name, parameter, kept in zip(self.names, self.parameters, self.kept.module.values, strict=True):
            count = getattr(parameter, "ds_numel", parameter.numel())
            whole = join_pieces([rank[name] for rank in ranks], count)
            kept.copy_(own_part(whole, parameter, kept).view_as(kept))
        return True


class Pieces(nn.Module):
    """This rank's float32 pieces of the parameters: views if possible, empty if another rank has the parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(piece(each), requires_grad=False) for each in parameters)


def piece(parameter: nn.Parameter) -> Tensor:
    """Returns this rank's piece of a parameter's float32 master."""
    if hasattr(parameter, "ds_id"):
        return safe_get_local_fp32_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        return torch.empty(0, device=parameter.device) if mapping is None else mapping.hp_fragment.data
    return parameter.data


@torch.no_grad()
def copy_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies whole weights into the module's parameters, sharded or not, in their dtype; not into the masters."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
            if not sharded or dist.get_rank() == 0:
                parameter.data.copy_(state[name].to(parameter.dtype))


def own_part(whole: Tensor, parameter: nn.Parameter, piece: Tensor) -> Tensor:
    """Returns this rank's piece of a whole flat tensor. ZeRO 3 pads the last pieces."""
    if hasattr(parameter, "ds_id"):
        start = dist.get_rank() * piece.numel()
        own = whole[start : start + piece.numel()]
        return torch.cat([own, own.new_zeros(piece.numel() - own.numel())])
    if hasattr(parameter, "_hp_mapping") and piece.numel():
        address = parameter._hp_mapping.lp_fragment_address
        return whole[address.start : address.start + address.numel]
    return whole[: piece.numel()]
