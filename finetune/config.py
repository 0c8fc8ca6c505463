"""What each of the three trainings is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.config import OptimizerConfig, RunConfig
from data_shards.config import DataConfig, EvaluationConfig
from model.config import EncoderConfig, LossConfig, ModelConfig, architecture


@dataclass
class PriorConfig:
    """Train the instruction encoder on scene recognition.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards with scene labels
        backbone: the image encoder; its export plugs in as model.prior.weights of any model
        label_smoothing: share of the target spread over all classes
        evaluation: held-out shards with scene labels
    """

    run: RunConfig
    data: DataConfig
    backbone: EncoderConfig = field(default_factory=EncoderConfig)
    label_smoothing: float = 0.1
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class InstructConfig:
    """Stage two: vision-instruction tuning of a stage-one model on human captions.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards
        init_from: export folder of stage one, or of `python -m model convert`, whose architecture, weights and
            tokenizer the run starts from; with --model.kind priorclip a plain CLIP gets a fresh prior
        tokenizer: hub id, local folder or package:NAME; null takes the one of init_from
        model: the architecture, key by key; defaults to that of init_from
        loss: the objective
        evaluation: recall while training
    """

    run: RunConfig
    data: DataConfig
    init_from: str
    tokenizer: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class ClosedConfig:
    """Closed domain: train PriorITR (Spatial-PAE, Temporal-PAE) on one benchmark.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards
        tokenizer: hub id, local folder or package:NAME; null takes the one of init_from or of the text encoder
        preset: architecture: a name in model/presets, whose values are the defaults of model.*
        init_from: export folder whose weights (and architecture) the run starts from
        model: the architecture, key by key
        loss: the objective
        evaluation: recall while training
    """

    run: RunConfig
    data: DataConfig
    tokenizer: str | None = None
    preset: str = "prioritr"
    init_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(lambda_cs=1.0))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


COMMANDS: dict[str, type[Any]] = {"prior": PriorConfig, "instruct": InstructConfig, "closed": ClosedConfig}


def instruct_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults of ``model.*`` are the architecture that ``--init_from`` was trained with."""
    return {"model": architecture(given["init_from"], "")} if given.get("init_from") else {}


def closed_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The paper's closed-domain recipe (design.md section 5), and ``model.*`` from ``--init_from`` or ``--preset``."""
    recipe = OptimizerConfig(lr=6e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, schedule="linear", warmup=0.1)
    return {
        "model": architecture(given.get("init_from"), given["preset"]),
        "run": {"epochs": 50, "optimizer": vars(recipe), "engine": {"global_batch": 128}},
    }


DEFAULTS = {"instruct": instruct_defaults, "closed": closed_defaults}
