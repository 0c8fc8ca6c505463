"""Activation memory of a forward and a backward pass, computed without memory or data.

    python -m model summary --preset priorclip-b32 --memory

The model and its inputs are torch's fake tensors: operators run by shapes only, and a storage counts from its creation
until nothing refers to it. This counts tensors that autograd keeps and temporaries that operators return. It does not
count memory that a kernel allocates inside. Attention is the fused kernel, as on GPUs.

During the backward pass activations are freed and gradients are allocated. The share of gradients on a rank depends on
the ZeRO stage. So the result is a curve: the most activation bytes while a share of the gradients exists. It is linear
in the micro batch. Losses are not included, because they need the global batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from priorclip.model.build import build_model
from priorclip.model.config import ModelConfig
from priorclip.model.without_memory import without_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 10  # points of the curve
BATCHES = (4, 12)  # the two micro batches that define the line


@dataclass
class Point:
    """Activation memory while a share of the gradients exists.

    Args:
        gradients: that share, in steps of 1 / STEPS, rounded down
        fixed: bytes that do not depend on the micro batch
        sample: bytes per sample
    """

    gradients: float
    fixed: float
    sample: float


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.sizes: dict[int, int] = {}
        self.excluded: list[torch.UntypedStorage] = []  # kept, so that no other storage gets their addresses
        self.peak_at_share = [0] * (STEPS + 1)
        self.gradients = 0
        self.all_gradients = 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.update_peak()
        return out

    def exclude(self, tensor: torch.Tensor) -> None:
        """Excludes a parameter or a buffer and its views."""
        self.excluded.append(tensor.untyped_storage())
        self.sizes[self.excluded[-1]._cdata] = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)

    def add_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        self.update_peak()

    def update_peak(self) -> None:
        share = STEPS * self.gradients // self.all_gradients
        self.peak_at_share[share] = max(self.peak_at_share[share], self.bytes - self.gradients)


def activation_curve(config: ModelConfig, precision: str, grad_checkpointing: bool) -> list[Point]:
    """Returns the curve of a preset without weights; ``precision`` is that of parameters and activations."""
    few, many = BATCHES
    peaks = pass_peaks(config, precision, grad_checkpointing, BATCHES)
    points = []
    for step, (low, high) in enumerate(zip(*peaks, strict=True)):
        sample = (high - low) / (many - few)
        points.append(Point(step / STEPS, low - few * sample, sample))
    return points


def pass_peaks(
    config: ModelConfig, precision: str, grad_checkpointing: bool, batches: Sequence[int]
) -> list[list[int]]:
    """Returns the most activation bytes at each share of the gradients, for each of the ``batches``."""
    with without_memory():
        model = build_model(config).train()
    model.set_grad_checkpointing(grad_checkpointing)
    with FakeTensorMode():
        make_fake(model, DTYPES[precision])
        return [peaks_of_pass(model, batch) for batch in batches]


def make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces a model's meta tensors by fake tensors; only parameters are cast, as in DeepSpeed."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                made.setdefault(id(parameter), nn.Parameter(fake, parameter.requires_grad))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def peaks_of_pass(model: Any, batch: int) -> list[int]:
    side, length = model.config.vision.image_size, model.config.text.context_length
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.exclude(tensor)
        images = torch.zeros((batch, 3, side, side), dtype=torch.uint8)
        tokens = torch.zeros((batch, length), dtype=torch.long)
        live.all_gradients = sum(parameter.nbytes for parameter in trained)
        hooks = [parameter.register_post_accumulate_grad_hook(live.add_gradient) for parameter in trained]
        given = {"masks": images[:, 0]} if model.told_belief is not None else {}
        outputs = model(images=images, input_ids=tokens, attention_mask=torch.ones_like(tokens), **given)
        surrogate_loss(outputs).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return live.peak_at_share


def surrogate_loss(outputs: dict[str, Any]) -> torch.Tensor:
    """Returns a scalar that depends on every output."""
    values = list(outputs.values())
    return torch.stack([value.float().sum() for value in values]).sum()
