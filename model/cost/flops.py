"""Floating-point operations of a call, counted per operator by torch; a multiply-add counts as two.

    with count_flops() as counter:
        model(images)
    total_flops(counter)                      # the whole call
    module_flops(counter, "PriorCLIP.prior")  # of one module

The counter counts matrix products, convolutions and attention. torch does not count the attention kernel of CPUs, so it
is added here. Elementwise operations do not count, as is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from priorclip.model.encoders.bands import blank_images


def cpu_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of the forward kernel by the shapes (B, heads, L, width)."""
    return sdpa_flop_count(query, key, value)


def cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward,
}


def count_flops() -> FlopCounterMode:
    """Returns a context that counts every operator, on any device and on tensors without data."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def training_flops(
    build: Callable[[], nn.Module], side: int, text_length: int | None = None, bands: Sequence[str] | None = None
) -> float:
    """Returns FLOPs of one sample in training, forward and backward, without data or weights.

    Args:
        build: builds the model on torch's current device; frozen parts get no backward pass
        side: of the images, pixels
        text_length: tokens of a caption; None for a model of images only
        bands: bands of the images; None for pictures
    """
    count = 2  # batch norms need more than one sample
    with torch.device("meta"):
        model = build().train()
        inputs = [blank_images(count, side, bands)]
        if text_length is not None:
            tokens = torch.zeros((count, text_length), dtype=torch.long)
            inputs += [tokens, torch.ones_like(tokens)]
    with count_flops() as counter:
        outputs = model(*inputs)
        values = outputs.values() if isinstance(outputs, dict) else [outputs]
        torch.stack([value.sum() for value in values if value is not None and value.requires_grad]).sum().backward()
    return total_flops(counter) / count


def total_flops(counter: FlopCounterMode) -> int:
    return int(counter.get_total_flops())


def module_flops(counter: FlopCounterMode, module: str) -> int:
    """Returns FLOPs of the module with that dotted name and of all modules in it; 0 if none of them ran.

    A module that is never called, such as a list, has no count: then the counts of its outermost parts are added.
    """
    counts = {name: sum(values.values()) for name, values in counter.get_flop_counts().items()}
    if module in counts:
        return int(counts[module])
    within = [name for name in counts if name.startswith(f"{module}.")]
    outermost = [name for name in within if not any(name.startswith(f"{other}.") for other in within)]
    return int(sum(counts[name] for name in outermost))
