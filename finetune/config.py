"""What each of the three trainings is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.config import OptimizerConfig, RunConfig
from data_shards.config import DataConfig, EvaluationConfig
from model.config import EncoderConfig, LoraConfig, LossConfig, ModelConfig, architecture


@dataclass
class PriorConfig:
    """Train the instruction encoder on scene recognition.

    Args:
        run: the run directory, length, optimizer, DeepSpeed and checkpoints
        data: training shards with scene labels
        backbone: the image encoder; its export plugs in as model.prior.weights of any model
        label_smoothing: share of the target spread over all classes
        mixup: alpha of timm's mixup; 0 for none
        cutmix: alpha of timm's cutmix; 0 for none; with both, each batch takes one of them
        evaluation: held-out shards with scene labels
    """

    run: RunConfig
    data: DataConfig
    backbone: EncoderConfig = field(default_factory=EncoderConfig)
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share: 0 <= label_smoothing < 1, not {self.label_smoothing}")
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is the alpha of a beta distribution, or 0, not {getattr(self, name)}")


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
        lora: adapters in the encoders that are trained; their own weights stay
        evaluation: recall while training
        test: shards whose recall is taken once, by the weights that are exported
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
        lora: adapters in the encoders that are trained; their own weights stay
        evaluation: recall while training
        test: shards whose recall is taken once, by the weights that are exported
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


@dataclass
class SweepConfig:
    """Run a family of experiments, or a study, over several seeds: a table with mean and spread, and a plot.

    Args:
        name: a family, or one experiment, of finetune/experiments, or a study of finetune/studies
        seeds: how many
        first_seed: the first of them
        folds: so many seeds, one after the other, are the splits of one cross-validation: their mean is one figure
        data: a file of finetune/data by its name, or a path: where shards and weights are, and options that it sets
        output: folder of the runs and the table; null takes runs/sweeps/NAME
        ranks: processes of each training, under the deepspeed launcher; 0 trains in one process
        jobs: trainings at a time
        rows: names of the experiments to run; null runs all of the family
        levels: of a study, in place of its own
        keep: of a run that is done: all; export, without its checkpoints; report, without export and tokenizer too
        options: options of the trainings that win over all others, as JSON or YAML: '{run: {epochs: 2}}'
        dry_run: print the commands and run nothing
    """

    name: str
    seeds: int = 3
    first_seed: int = 0
    folds: int = 1
    data: str = "default"
    output: str | None = None
    ranks: int = 0
    jobs: int = 1
    rows: list[str] | None = None
    levels: list[float] | None = None
    keep: Literal["all", "export", "report"] = "all"
    options: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "folds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.seeds % self.folds:
            raise ValueError(f"--seeds {self.seeds} is no multiple of --folds {self.folds}: a cross-validation is cut")


@dataclass
class ResplitConfig:
    """Deal the images of a Karpathy JSON anew into train, val and test, within each scene, for cross-validation.

    Args:
        json: Karpathy JSON
        output: folder of split-0.json, split-1.json ...
        count: how many splits
        test: share of each scene's images that become the test set
        validation: share of each scene's images that become the validation set
        train: share of each scene's images to train on, the others are left out; null trains on all that are left
        among: deal the images of this split only and leave out the others; null deals all
        seed: of the order in which a scene's images take turns at being tested
    """

    json: str
    output: str
    count: int = 1
    test: float = 0.2
    validation: float = 0.0
    train: float | None = None
    among: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.test < 0 or self.validation < 0 or not self.test + self.validation < 1:
            raise ValueError(
                f"--test {self.test} and --validation {self.validation} are shares that leave some to train"
            )
        if self.train is not None and not 0 < self.train <= 1:
            raise ValueError(f"--train {self.train} is a share of each scene's images, above 0 and up to 1")


COMMANDS: dict[str, type[Any]] = {
    "prior": PriorConfig,
    "instruct": InstructConfig,
    "closed": ClosedConfig,
    "resplit": ResplitConfig,
    "sweep": SweepConfig,
}


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
