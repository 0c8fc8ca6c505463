"""Training of the scene prior: a timm backbone learns to classify scenes. Its export instructs any other model.

python -m finetune prior --config finetune/configs/prior.yaml --data.shards data/aid-train --run.dir runs/prior
python -m pretrain ... --model.prior.weights runs/prior/export
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

from priorclip.data_shards import ShardSet, ShardStream, eval_batches
from priorclip.data_shards.dedupe.identical_images import warn_of_shared_images
from priorclip.data_shards.format.class_names import ClassIds
from priorclip.finetune.commands import PriorConfig
from priorclip.finetune.confusion_matrix import confusion, figures_of, write_confusion
from priorclip.finetune.scene_mixing import SceneTargets, soft_cross_entropy
from priorclip.model import SceneClassifier, SceneConfig, parameter_groups, save_pretrained
from priorclip.model.cost.flops import training_flops
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.training.loop import run_task
from priorclip.training.monitoring.measure import ModelFacts
from priorclip.training.ranks.distributed import Rank
from priorclip.training.task import Task


def train_prior(config: PriorConfig) -> dict[str, Any]:
    """Trains the prior and returns the report."""
    return run_task(config, config.run, lambda rank: scene_recognition(config, rank))


def scene_recognition(config: PriorConfig, rank: Rank) -> Task:
    """A scene classifier on labelled shards. Accuracy is measured on the evaluation shards, if there are any.

    The confusion matrix of the exported weights is written beside the report.

    Raises:
        ValueError: the shards have fewer than two scene classes, or the evaluation has a class that they lack.
    """
    run = config.run
    shards = ShardSet(config.data.shards, **config.data.access)
    classes = config.data.classes or shards.classes
    if len(classes) < 2:
        raise ValueError(f"{config.data.shards}: {len(classes)} scene classes; a prior needs labelled shards")
    config.data.classes = classes
    stream = ShardStream(
        shards, None, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
    )  # fmt: skip
    model = SceneClassifier(SceneConfig(backbone=config.backbone, classes=classes))
    model.set_grad_checkpointing(run.engine.grad_checkpointing)
    held_out = None
    if config.evaluation.shards:
        tested = ShardSet(config.evaluation.shards, **config.data.access)
        refuse_unknown(tested.classes, classes, config)
        warn_of_shared_images(shards, tested, rank.rank)
        held_out = eval_batches(
            tested, None, config.data.side, config.evaluation.batch_size,
            rank=rank.rank, world_size=rank.world_size, classes=classes,
        )  # fmt: skip

    targets = SceneTargets(len(classes), config.mixup, config.cutmix, config.label_smoothing)
    counted: list[torch.Tensor] = []  # confusion matrix of the exported weights

    def step(engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        labels = batch["labels"]
        images, soft = targets(batch["images"], labels)
        logits = engine(images).float()
        labelled = (labels >= 0).sum().clamp(min=1)
        return soft_cross_entropy(logits, soft), {"accuracy": (logits.argmax(dim=1) == labels).sum() / labelled}

    def evaluate(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        return figures_of(confusion(engine, held_out, len(classes), rank.device)) if held_out else {}

    def test(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        assert held_out is not None
        counted.append(confusion(engine, held_out, len(classes), rank.device))
        return figures_of(counted[-1])

    def export(weights: dict[str, torch.Tensor], report: dict[str, Any], folder: Path) -> None:
        if counted:
            write_confusion(counted[-1], classes, folder)
        save_pretrained(weights, model.config, folder / "export", extra=report)

    def build() -> SceneClassifier:
        settings = copy.deepcopy(model.config)
        settings.backbone.weights = None
        return SceneClassifier(settings)

    groups = parameter_groups(model, run.optimizer.weight_decay, run.optimizer.lr, run.optimizer.layer_decay)
    facts = ModelFacts(flops=partial(training_flops, build, config.data.side), peak_tflops=peak_of)
    return Task(model, groups, stream, step, evaluate, export, test=test if held_out else None, model_facts=facts)


def refuse_unknown(tested: list[str], classes: list[str], config: PriorConfig) -> None:
    """Raises ValueError if the evaluation has classes that the classifier cannot predict."""
    known = ClassIds(classes)
    unknown = [name for name in tested if known[name] < 0]
    if unknown:
        raise ValueError(
            f"evaluation.shards {config.evaluation.shards} has images of {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}: no class of data.shards {config.data.shards}, which has "
            f"{', '.join(classes)}. Leave them out (pack --classes), or use the same spelling"
        )
