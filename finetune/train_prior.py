"""Training of the scene prior: a timm backbone learns to classify scenes, to name objects, to find them, or without
labels. Its export instructs any other model.

python -m finetune prior --config finetune/configs/prior.yaml --data.shards data/aid-train --run.dir runs/prior
python -m pretrain ... --model.prior.weights runs/prior/export
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from priorclip.common.hub import fetched_by
from priorclip.data_shards import ShardSet, ShardStream, eval_batches
from priorclip.data_shards.dedupe.identical_images import warn_of_shared_images
from priorclip.data_shards.format.class_names import ClassIds
from priorclip.finetune.box_objective import BoxObjective
from priorclip.finetune.commands import PriorConfig
from priorclip.finetune.confusion_matrix import write_confusion
from priorclip.finetune.mask_objective import MaskObjective
from priorclip.finetune.object_tags import TagTargets
from priorclip.finetune.prior_objective import PriorObjective
from priorclip.finetune.self_objective import BANK, SelfObjective, SomeSamples
from priorclip.model import SceneClassifier, SceneConfig, parameter_groups, save_pretrained
from priorclip.model.cost.flops import training_flops
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.networks.dense_heads import PriorNetwork, backbone_weights
from priorclip.training.loop import run_task
from priorclip.training.monitoring.measure import ModelFacts
from priorclip.training.ranks.distributed import Rank
from priorclip.training.task import Task


def train_prior(config: PriorConfig) -> dict[str, Any]:
    """Trains the prior and returns the report."""
    with fetched_by(f"--timm {config.backbone.name}"):
        prepare = scene_recognition if config.targets in ("scenes", "tags", "scenes+tags") else without_scenes
        return run_task(config, config.run, lambda rank: prepare(config, rank))


def scene_recognition(config: PriorConfig, rank: Rank) -> Task:
    """A scene classifier on labelled shards. Accuracy is measured on the evaluation shards, if there are any.

    The confusion matrix of the exported weights is written beside the report.

    Raises:
        ValueError: the shards have fewer than two scene classes, or the evaluation has a class that they lack.
    """
    run = config.run
    shards = ShardSet(config.data.shards, **config.data.access)
    classes = config.data.classes or shards.classes
    if len(classes) < 2 and "scenes" in config.targets:
        raise ValueError(f"{config.data.shards}: {len(classes)} scene classes; a prior needs labelled shards")
    config.data.classes = classes
    stream = ShardStream(
        shards, None, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
    )  # fmt: skip
    held_out, held_out_tags = None, None
    if config.evaluation.shards:
        tested = ShardSet(config.evaluation.shards, **config.data.access)
        if "scenes" in config.targets:
            refuse_unknown(tested.classes, classes, config)
        warn_of_shared_images(shards, tested, rank.rank)
        held_out = eval_batches(
            tested, None, config.data.side, config.evaluation.batch_size,
            rank=rank.rank, world_size=rank.world_size, classes=classes, bands=config.data.bands,
        )  # fmt: skip
        held_out_tags = TagTargets(tested, config.evaluation.caption_field)
    tags = TagTargets(shards, config.data.caption_field)
    if "tags" in config.targets:
        tags.require_captions(str(config.data.shards))
    objective = PriorObjective(config, classes, tags, held_out, held_out_tags, rank.device)
    model = SceneClassifier(SceneConfig(backbone=config.backbone, classes=objective.classes, tags=objective.tag_names))
    model.set_grad_checkpointing(run.engine.grad_checkpointing)

    def export(weights: dict[str, torch.Tensor], report: dict[str, Any], folder: Path) -> None:
        if objective.counts is not None:
            write_confusion(objective.counts, classes, folder)
        save_pretrained(weights, model.config, folder / "export", extra=report)

    def build() -> SceneClassifier:
        settings = copy.deepcopy(model.config)
        settings.backbone.weights = None
        return SceneClassifier(settings)

    groups = parameter_groups(model, run.optimizer.weight_decay, run.optimizer.lr, run.optimizer.layer_decay)
    facts = ModelFacts(
        flops=partial(training_flops, build, config.data.side, bands=config.backbone.bands), peak_tflops=peak_of
    )
    # The test of a run is its last evaluation, so the confusion matrix is that of the exported weights.
    test = objective.evaluate if held_out else None
    return Task(model, groups, stream, objective.step, objective.evaluate, export, test=test, model_facts=facts)


def without_scenes(config: PriorConfig, rank: Rank) -> Task:
    """A backbone that learns boxes, masks, or without labels; the export is the backbone alone.

    Raises:
        ValueError: the shards have no boxes or masks, or the backbone's pooling has weights of its own
    """
    run, targets = config.run, config.targets
    assert targets in ("boxes", "masks", "self")
    truth: Any = None if targets == "self" else targets
    shards = ShardSet(config.data.shards, **config.data.access)
    stream = ShardStream(
        shards, None, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed, truth=truth,
    )  # fmt: skip
    classes = config.data.classes or shards.classes
    size: dict[str, Any] = {
        "image_size": config.data.side,
        "batch_size": config.evaluation.batch_size,
        "rank": rank.rank,
        "world_size": rank.world_size,
        "classes": classes,
    }
    held_out = None
    if config.evaluation.shards:
        tested = ShardSet(config.evaluation.shards, **config.data.access)
        warn_of_shared_images(shards, tested, rank.rank)
        held_out = eval_batches(tested, None, **size, truth=truth)
    objective: MaskObjective | BoxObjective | SelfObjective
    if targets == "self":
        bank = eval_batches(SomeSamples(shards, BANK), None, **size) if held_out and len(classes) > 1 else None  # type: ignore[arg-type]
        objective = SelfObjective(bank, held_out, rank.device)
    else:
        objective = (MaskObjective if targets == "masks" else BoxObjective)(held_out, rank.device)
    model = PriorNetwork(config.backbone, targets)
    model.set_grad_checkpointing(run.engine.grad_checkpointing)

    def export(weights: dict[str, torch.Tensor], report: dict[str, Any], folder: Path) -> None:
        save_pretrained(backbone_weights(weights), model.config, folder / "export", extra=report)

    def build() -> PriorNetwork:
        settings = copy.deepcopy(model.config.backbone)
        settings.weights = None
        return PriorNetwork(settings, targets)

    groups = parameter_groups(model, run.optimizer.weight_decay, run.optimizer.lr, run.optimizer.layer_decay)
    facts = ModelFacts(flops=partial(training_flops, build, config.data.side), peak_tflops=peak_of)
    test = objective.evaluate if held_out else None
    return Task(model, groups, stream, objective.step, objective.evaluate, export, test=test, model_facts=facts)


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
