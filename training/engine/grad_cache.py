"""Gradient caching: the losses see the whole batch of a rank, but the device holds one micro batch at a time.

    features of each micro batch, without a graph               4 x 128 samples -> (512, d)
    losses over the features of all ranks, and their gradient   (512, d)
    each micro batch again, with a graph, backward from its rows of that gradient

The gradient equals that of one pass over the whole batch. It costs one more forward pass, about a third of a step.
Plain gradient accumulation does not need that pass, but its losses see the negatives of one micro batch only.

Dropout draws the same masks both times, because we set the random number generators back. Batch norms use the
statistics of a micro batch, as under accumulation, and count each only once. Outputs that depend on no sample (the
scales, tensors without dimensions) get their gradient from the losses too, in equal shares from the micro batches. Each
micro batch then touches every parameter, as ZeRO's gradient hooks expect.

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
    """A step as two functions: the losses need only the features, not the model."""

    def encode(self, engine: deepspeed.DeepSpeedEngine, batch: Batch) -> Features:
        """Returns tensors with one row a sample, and tensors without dimensions that depend on no sample."""
        ...

    def losses(self, features: Features, batch: Batch) -> tuple[Tensor, Parts]:
        """Returns the loss and its parts. It may read only those values of the batch that are not encoded."""
        ...


def backward_cached(
    engine: deepspeed.DeepSpeedEngine,
    micro_batches: Sequence[Callable[[], Batch]],
    whole: Batch,
    feature_losses: FeatureLosses,
    after_backward: Callable[[], None],
    screen_loss: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Parts]:
    """Accumulates the gradient of the losses over all micro batches. Returns the loss and its parts, detached.

    Args:
        engine: its gradient accumulation steps are the number of micro batches
        micro_batches: return the micro batches on the device; each is called twice
        whole: the batch that the losses read
        feature_losses: the model's features and their losses
        after_backward: called after the backward pass of each micro batch
        screen_loss: takes the loss, returns a factor of the gradient
    """
    states, cached = [], []
    with torch.no_grad(), unchanged_batch_norms(engine.module):
        for get in micro_batches:
            states.append(torch_rng_states())
            cached.append(feature_losses.encode(engine, get()))
    loss, parts, gradients = feature_gradients(cached, whole, feature_losses)
    factor = torch.ones_like(loss) if screen_loss is None else screen_loss(loss)
    for get, state, gradient in zip(micro_batches, states, gradients, strict=True):
        set_torch_rng_states(state)
        features = feature_losses.encode(engine, get())
        # The surrogate has the cached gradient in the features. The gradients of the micro batches add up undivided.
        surrogate = torch.stack([(features[name] * value).sum() for name, value in gradient.items()]).sum() * factor
        engine.backward(surrogate, scale_wrt_gas=False)
        after_backward()
    return loss, parts


def feature_gradients(
    cached: list[Features], whole: Batch, feature_losses: FeatureLosses
) -> tuple[Tensor, Parts, list[dict[str, Tensor]]]:
    """Returns the loss over the features of all micro batches, its parts, and its gradient in each one's features."""
    leaves: dict[str, Tensor | None] = {}
    for name, first in cached[0].items():
        if first is None:
            leaves[name] = None
        else:
            joined = first if first.ndim == 0 else torch.cat([features[name] for features in cached])
            leaves[name] = joined.detach().requires_grad_()
    with torch.enable_grad():
        loss, parts = feature_losses.losses(leaves, whole)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    shares: list[dict[str, Tensor]] = [{} for _ in cached]
    for name, gradient in zip(wanted, found, strict=True):
        if gradient.ndim:
            rows = [len(features[name]) for features in cached]
            values = gradient.split(rows)
        else:
            values = (gradient / len(cached),) * len(cached)
        for share, value in zip(shares, values, strict=True):
            share[name] = value
    return loss.detach(), {name: value.detach() for name, value in parts.items()}, shares


@contextmanager
def unchanged_batch_norms(model: nn.Module) -> Iterator[None]:
    """Batch norms in training mode use the statistics of a batch, but do not update their running statistics."""
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
    """States of torch's generators of the CPU and of this process's accelerator."""
    accelerator = deepspeed.get_accelerator()
    states = [torch.get_rng_state()]
    return states if accelerator.device_name() == "cpu" else [*states, accelerator.get_rng_state()]


def set_torch_rng_states(states: list[Tensor]) -> None:
    """Sets the generators to what `torch_rng_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        deepspeed.get_accelerator().set_rng_state(state)
