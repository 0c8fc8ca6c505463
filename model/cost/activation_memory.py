"""Memory of a forward and a backward pass beside the parameters, found without any memory or data.

    python -m model summary --preset priorclip-b32 --memory

The model and its inputs are torch's fake tensors: every operator runs by its shapes alone, and each storage counts from
when it is made until nothing refers to it. What is counted is therefore what autograd keeps, and the temporaries that
operators return; what a kernel allocates inside itself is not. Attention is the fused one, as on GPUs.

During the backward pass activations go and gradients come. How much of the latter a rank keeps depends on the ZeRO
stage, so that the result is a curve: the most activation bytes that are alive while a share of the gradients is there.
It is a line in the micro batch, from which the losses are left out: they see the whole batch at once.
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 10  # points of the curve
BATCHES = (4, 12)  # micro batches of which the line is made


@dataclass
class Point:
    """Activations while a share of the gradients is there.

    Args:
        gradients: that share, in steps of 1 / STEPS, rounded down
        fixed: bytes whatever the micro batch
        sample: bytes for each of its samples
    """

    gradients: float
    fixed: float
    sample: float


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and something still refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.known: dict[int, int] = {}
        self.beside: list[torch.UntypedStorage] = []  # kept, so that no other storage takes their addresses
        self.peak_at_share = [0] * (STEPS + 1)
        self.gradients = 0
        self.all_gradients = 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.note()
        return out

    def leave_out(self, tensor: torch.Tensor) -> None:
        """A parameter or a buffer: views of it are no memory of their own."""
        self.beside.append(tensor.untyped_storage())
        self.known[self.beside[-1]._cdata] = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.bytes -= self.known.pop(key)

    def accumulated(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        self.note()

    def note(self) -> None:
        share = STEPS * self.gradients // self.all_gradients
        self.peak_at_share[share] = max(self.peak_at_share[share], self.bytes - self.gradients)


def activation_curve(config: ModelConfig, precision: str, grad_checkpointing: bool) -> list[Point]:
    """The curve of a preset without weights; ``precision`` is that of parameters and activations."""
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
    """Most activation bytes at each share of the gradients, of a forward and backward pass over so many pairs each."""
    with torch.device("meta"):
        model = build_model(config).train()
    model.set_grad_checkpointing(grad_checkpointing)
    with FakeTensorMode():
        make_fake(model, DTYPES[precision])
        return [counted_pass(model, batch) for batch in batches]


def make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake tensors in the place of a model's meta tensors; parameters alone are cast, as DeepSpeed does it."""
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


def counted_pass(model: Any, batch: int) -> list[int]:
    side, length = model.config.vision.image_size, model.config.text.context_length
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.leave_out(tensor)
        images = torch.zeros((batch, 3, side, side), dtype=torch.uint8)
        tokens = torch.zeros((batch, length), dtype=torch.long)
        live.all_gradients = sum(parameter.nbytes for parameter in trained)
        hooks = [parameter.register_post_accumulate_grad_hook(live.accumulated) for parameter in trained]
        outputs = model(images=images, input_ids=tokens, attention_mask=torch.ones_like(tokens))
        surrogate(outputs).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return live.peak_at_share


def surrogate(outputs: dict[str, Any]) -> torch.Tensor:
    """A scalar that every output has a part in."""
    values = [outputs[key] for key in ("image_features", "text_features", "logit_scale", "attribution_scale")]
    return torch.stack([value.float().sum() for value in values]).sum()
