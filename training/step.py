"""One optimizer step: micro batches -> losses -> gradient -> DeepSpeed's optimizer.

parts = optimize(engine, batch, step, device)       # {"loss": 0.71, "contrastive": 0.69, ...}

without feature_losses   each micro batch has losses of its own; their gradients accumulate
with feature_losses      all micro batches have the losses of the rank's whole batch (engine/grad_cache.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import deepspeed
import torch

from priorclip.training.bad_steps import no_update
from priorclip.training.engine.grad_cache import FeatureLosses, backward_cached
from priorclip.training.stream_protocol import Batch

Step = Callable[[deepspeed.DeepSpeedEngine, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
# Takes the loss before the last backward pass. Returns a factor of the gradient: 1, or NaN to drop the step.
ScreenLoss = Callable[[torch.Tensor], torch.Tensor]


def optimize(
    engine: deepspeed.DeepSpeedEngine,
    batch: Batch,
    step: Step,
    device: torch.device,
    feature_losses: FeatureLosses | None = None,
    on_gradients: Callable[[], None] | None = None,
    screen_loss: ScreenLoss | None = None,
) -> dict[str, torch.Tensor]:
    """Takes one optimizer step on this rank's share of the global batch.

    Args:
        engine: its gradient accumulation steps are the number of micro batches
        batch: tensors with one row a sample; every micro batch gets all other values as they are
        step: loss of a micro batch, and the parts of the loss
        device: where the micro batches go
        feature_losses: features and losses as two functions, for gradient caching instead of accumulation
        on_gradients: called when the gradient is complete, before the optimizer uses it
        screen_loss: can drop the step; then weights and optimizer state stay as they are

    Returns:
        The loss and its parts, detached: means over the micro batches, or values of the whole batch with
        ``feature_losses``. Also ``grad_norm`` if the engine does not keep it.
    """
    pieces = engine.gradient_accumulation_steps()
    totals: dict[str, torch.Tensor] = {}

    def after_backward() -> None:
        if on_gradients is not None and engine.is_gradient_accumulation_boundary():
            on_gradients()
        plain = engine.zero_optimization_stage() == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled())
        if plain and engine.is_gradient_accumulation_boundary():
            # Without ZeRO and in float32, DeepSpeed clips the gradient but does not keep its norm.
            gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
            totals["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
            if screen_loss is not None and not math.isfinite(float(totals["grad_norm"])):
                with no_update(engine.optimizer):
                    engine.step()
                return
        engine.step()

    micro_batches = [partial(micro_batch, batch, piece, pieces, device) for piece in range(pieces)]
    if feature_losses is not None and pieces > 1:
        loss, parts = backward_cached(engine, micro_batches, batch, feature_losses, after_backward, screen_loss)
        return totals | {name: value.float() for name, value in {"loss": loss, **parts}.items()}
    for number, get in enumerate(micro_batches, start=1):
        loss, parts = step(engine, get())
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / pieces
        engine.backward(loss if screen_loss is None or number < pieces else loss * screen_loss(totals["loss"]))
        after_backward()
    return totals


def micro_batch(batch: Batch, piece: int, pieces: int, device: torch.device) -> Batch:
    """Rows of one of ``pieces`` equal parts of a batch, on the device."""
    return {
        name: value.tensor_split(pieces)[piece].to(device, non_blocking=True) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }
