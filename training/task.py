"""A training as its package describes it: model, data, losses, evaluation, export.

def prepare(rank: Rank) -> Task: ...                # opens the shards, builds the model
report = run_task(config, config.run, prepare)      # training/loop.py: the same for all trainings
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from PIL import Image

from priorclip.training.engine.grad_cache import FeatureLosses
from priorclip.training.monitoring.measure import ModelFacts
from priorclip.training.step import Step
from priorclip.training.stream_protocol import Stream

Evaluate = Callable[[deepspeed.DeepSpeedEngine], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What differs between trainings.

    Args:
        model: the model to train
        groups: its optimizer parameter groups
        stream: batches of this rank
        step: loss of a batch, and the parts of the loss
        evaluate: metrics of the engine in eval mode; a collective in which all ranks call the engine equally often
        export: writes the trained model; gets whole float32 weights, the report and the run directory, on rank 0 only
        feature_losses: features and losses as two functions, for gradient caching; None if the losses need more of the
            model than its features
        test: metrics of the exported weights, once after training; a collective like ``evaluate``
        pictures: drawn by the engine in eval mode after each evaluation, for TensorBoard; a collective
        model_facts: facts about the model that the run's metrics need
    """

    model: torch.nn.Module
    groups: list[dict[str, Any]]
    stream: Stream
    step: Step
    evaluate: Evaluate
    export: Callable[[dict[str, torch.Tensor], dict[str, Any], Path], object]
    feature_losses: FeatureLosses | None = None
    test: Evaluate | None = None
    pictures: Callable[[deepspeed.DeepSpeedEngine], dict[str, Image.Image]] | None = None
    model_facts: ModelFacts = field(default_factory=ModelFacts)
