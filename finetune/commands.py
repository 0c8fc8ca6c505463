"""The options of ``python -m finetune``: one dataclass a training, importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from priorclip.data_shards.config import DataConfig, EvaluationConfig
from priorclip.model.config import EncoderConfig, LoraConfig, LossConfig, ModelConfig, add_bias
from priorclip.model.export_config import starting_architecture
from priorclip.pretrain.commands import follow_model
from priorclip.training.config import OptimizerConfig, RunConfig

TARGETS = ("scenes", "tags", "scenes+tags", "boxes", "masks", "self")


@dataclass
class PriorConfig:
    """Train the instruction encoder on scenes, on the objects that captions name, on boxes or masks, or without labels.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards with scene labels
        backbone: the image encoder; its export is a value of model.prior.weights for any model
        targets: scenes: the scene labels. tags: the objects that an image's captions name, from a fixed list of nouns
            (finetune/object_tags.py). scenes+tags: both, the sum of the two losses. boxes, masks: where drawn scenes
            show what their captions name (`data_shards pack --source synthetic --masks true`). self: nothing, two views
            of an image are the same one; the labels only probe what was learned
        label_smoothing: share of the target that is spread over all classes
        mixup: alpha of timm's mixup; 0 turns it off
        cutmix: alpha of timm's cutmix; 0 turns it off; with both, each batch uses one of them
        evaluation: held-out shards with scene labels
    """

    run: RunConfig
    data: DataConfig
    backbone: EncoderConfig = field(default_factory=EncoderConfig)
    targets: Literal["scenes", "tags", "scenes+tags", "boxes", "masks", "self"] = "scenes"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        follow_model(self.data, self.run.dir, self.backbone)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be a share, 0 <= label_smoothing < 1, not {self.label_smoothing}")
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be the alpha of a beta distribution, or 0, not {getattr(self, name)}")
            if getattr(self, name) and self.targets != "scenes":
                others = "tags" if "tags" in self.targets else self.targets
                raise ValueError(f"{name} mixes scenes, not {others}: set {name} to 0, or targets to scenes")
        if self.targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)}, not '{self.targets}'")


@dataclass
class InstructConfig:
    """Stage two: vision-instruction tuning of a stage-one model on human captions.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards
        init_from: export folder of stage one or of `python -m model convert`, or hf://user/name; the run starts from
            its architecture, weights and tokenizer; with --model.kind priorclip a plain CLIP gets a fresh prior
        tokenizer: hub id, local folder or package:NAME; null takes the one of init_from
        model: the architecture, key by key; defaults to that of init_from
        loss: the objective
        lora: trains adapters in the encoders, whose own weights stay
        evaluation: recall during training
        test: shards on which the recall of the exported weights is measured once
    """

    run: RunConfig
    data: DataConfig
    init_from: str
    tokenizer: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    test: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        follow_model(self.data, self.run.dir, self.model.vision, self.model.prior)
        add_bias(self.model, self.loss)


@dataclass
class ClosedConfig:
    """Closed domain: train PriorITR (Spatial-PAE, Temporal-PAE) on one benchmark.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards
        tokenizer: hub id, local folder or package:NAME; null takes the one of init_from or of the text encoder
        preset: name of an architecture in model/presets; its values are the defaults of model.*
        init_from: export folder, or hf://user/name on the hub; the run starts from its weights and architecture
        model: the architecture, key by key
        loss: the objective
        lora: trains adapters in the encoders, whose own weights stay
        evaluation: recall during training
        test: shards on which the recall of the exported weights is measured once
    """

    run: RunConfig
    data: DataConfig
    tokenizer: str | None = None
    preset: str = "prioritr"
    init_from: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(lambda_cs=1.0))
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    test: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        follow_model(self.data, self.run.dir, self.model.vision, self.model.prior)
        add_bias(self.model, self.loss)


COMMANDS: dict[str, type[Any]] = {
    "prior": PriorConfig,
    "instruct": InstructConfig,
    "closed": ClosedConfig,
}


def instruct_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the architecture of ``--init_from`` as the defaults of ``model.*``."""
    return {"model": starting_architecture(given["init_from"], "")} if given.get("init_from") else {}


def closed_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the paper's closed-domain recipe, and ``model.*`` from ``--init_from`` or ``--preset``."""
    recipe = OptimizerConfig(lr=6e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, schedule="linear", warmup=0.1)
    return {
        "model": starting_architecture(given.get("init_from"), given["preset"]),
        "run": {"epochs": 50, "optimizer": vars(recipe), "engine": {"global_batch": 128}},
    }


DEFAULTS = {"instruct": instruct_defaults, "closed": closed_defaults}
