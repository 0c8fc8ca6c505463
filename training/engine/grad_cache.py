"""Gradient caching: the losses see the whole batch of a rank, of which the device holds one micro batch at a time.

    features of each micro batch, without a graph               4 x 128 samples -> (512, d)
    losses over the features of all ranks, and their gradient   (512, d)
    each micro batch again, with a graph, backward from its rows of that gradient

The gradient is that of one pass over the whole batch. It costs one more forward pass, about a third of a step; plain
gradient accumulation, which saves that, would show the losses the negatives of one micro batch only.

Dropout draws the same masks both times, for the generators are set back. Batch norms take the statistics of a micro
batch, as under accumulation, and count each only once. What depends on no sample (the scales, tensors without
dimensions) gets its gradient from the losses too, in equal shares from the micro batches, each of which then touches
every parameter, as ZeRO's gradient hooks expect.

Source: GradCache, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from priorclip.training.stream_protocol import Batch

Parts = dict[str, Tensor]
Features = Mapping[str, Any]  # a tensor, or None, by name


class FeatureLosses(Protocol):
    """A step in two halves, of which the second needs no more than the first one's outputs."""

    def encode(self, engine: deepspeed.DeepSpeedEngine, batch: Batch) -> Features:
        """Of a (micro) batch: tensors with one row a sample, tensors without dimensions that no sample changes."""
        ...

    def losses(self, features: Features, batch: Batch) -> tuple[Tensor, Parts]:
        """The loss to go backward from, and its parts; of the batch only what is not encoded may be read."""
        ...


def backward_cached(
    engine: deepspeed.DeepSpeedEngine,
    pieces: Sequence[Callable[[], Batch]],
    whole: Batch,
    step: FeatureLosses,
    finish: Callable[[], None],
    judge: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Parts]:
    """Accumulate the gradient of the losses over all micro batches; returns the loss and its parts, detached.

    Args:
        engine: its gradient accumulation steps are the micro batches
        pieces: give the micro batches on the device, each called twice
        whole: the batch that the losses read
        step: the model's features and their losses
        finish: called after the backward pass of each micro batch
        judge: takes the loss, gives a factor of the gradient
    """
    states, cached = [], []
    with torch.no_grad(), statistics_kept(engine.module):
        for piece in pieces:
            states.append(torch_rng_states())
            cached.append(step.encode(engine, piece()))
    loss, parts, gradients = feature_gradients(cached, whole, step)
    factor = torch.ones_like(loss) if judge is None else judge(loss)
    for piece, state, gradient in zip(pieces, states, gradients, strict=True):
        set_torch_rng_states(state)
        features = step.encode(engine, piece())
        # Its gradient in the features is the one wanted. Not divided by the number of micro batches: they add up.
        surrogate = torch.stack([(features[name] * value).sum() for name, value in gradient.items()]).sum() * factor
        engine.backward(surrogate, scale_wrt_gas=False)
        finish()
    return loss, parts


def feature_gradients(
    cached: list[Features], whole: Batch, step: FeatureLosses
) -> tuple[Tensor, Parts, list[dict[str, Tensor]]]:
    """The loss over the features of all micro batches, its parts, and its gradient in each micro batch's features."""
    leaves: dict[str, Tensor | None] = {}
    for name, first in cached[0].items():
        if first is None:
            leaves[name] = None
        else:
            joined = first if first.ndim == 0 else torch.cat([features[name] for features in cached])
            leaves[name] = joined.detach().requires_grad_()
    with torch.enable_grad():
        loss, parts = step.losses(leaves, whole)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    shares: list[dict[str, Tensor]] = [{} for _ in cached]
    for name, gradient in zip(wanted, found, strict=True):
        if gradient.ndim:
            rows = [len(features[name]) for features in cached]
            split = gradient.split(rows)
        else:
            split = (gradient / len(cached),) * len(cached)
        for share, value in zip(shares, split, strict=True):
            share[name] = value
    return loss.detach(), {name: value.detach() for name, value in parts.items()}, shares


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norms of the model use a batch's statistics in training, and do not remember them."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    training = [norm for norm in norms if norm.training]
    for norm in training:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in training:
            norm.track_running_stats = True


def torch_rng_states() -> list[Tensor]:
    """Of the CPU and of the accelerator of this process."""
    accelerator = deepspeed.get_accelerator()
    states = [torch.get_rng_state()]
    return states if accelerator.device_name() == "cpu" else [*states, accelerator.get_rng_state()]


def set_torch_rng_states(states: list[Tensor]) -> None:
    """Set them back to what `torch_rng_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        deepspeed.get_accelerator().set_rng_state(state)
