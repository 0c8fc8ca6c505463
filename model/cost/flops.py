"""Floating-point operations of a call, a multiply-add as two, as torch's counter finds them operator by operator.

    with count_flops() as counter:
        model(images)
    total(counter)                      # whole call
    under(counter, "PriorCLIP.prior")   # what ran inside that module

The counter knows matrix products, convolutions and attention; torch leaves out the attention kernel of CPUs, which is
added here. Elementwise work does not count, as is usual where FLOPs are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def cpu_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the forward kernel, from the shapes (B, heads, L, width)."""
    return sdpa_flop_count(query, key, value)


def cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward,
}


def count_flops() -> FlopCounterMode:
    """A context in which every operator is counted, on any device and on tensors without data."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def training_flops(build: Callable[[], nn.Module], side: int, text_length: int | None = None) -> float:
    """FLOPs of one sample in training, forward and backward, without data or weights.

    Args:
        build: makes the model, on whatever device torch has set; frozen parts get no backward pass
        side: of the images, pixels
        text_length: tokens of a caption; None for a model of images alone
    """
    count = 2  # batch norms refuse a batch of one
    with torch.device("meta"):
        model = build().train()
        inputs = [torch.zeros((count, 3, side, side), dtype=torch.uint8)]
        if text_length is not None:
            tokens = torch.zeros((count, text_length), dtype=torch.long)
            inputs += [tokens, torch.ones_like(tokens)]
    with count_flops() as counter:
        outputs = model(*inputs)
        values = outputs.values() if isinstance(outputs, dict) else [outputs]
        torch.stack([value.sum() for value in values if value is not None and value.requires_grad]).sum().backward()
    return total(counter) / count


def total(counter: FlopCounterMode) -> int:
    return int(counter.get_total_flops())


def under(counter: FlopCounterMode, module: str) -> int:
    """FLOPs of the module of that dotted name and of all within it; 0 where none of them ran.

    A module that is never called itself, such as a list, has no count: then those of its outermost parts are added.
    """
    counts = {name: sum(values.values()) for name, values in counter.get_flop_counts().items()}
    if module in counts:
        return int(counts[module])
    within = [name for name in counts if name.startswith(f"{module}.")]
    outermost = [name for name in within if not any(name.startswith(f"{other}.") for other in within)]
    return int(sum(counts[name] for name in outermost))
