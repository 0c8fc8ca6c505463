"""The scene prior as a story: a timm backbone learns to name scenes; its export is the instruction encoder of any model.

    python -m finetune prior --config finetune/configs/prior.yaml --data.shards data/aid-train --run.dir runs/prior
    python -m pretrain ... --model.prior.weights runs/prior/export
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from cluster.distributed import seed_everything, start
from cluster.engine import build_engine, full_state_dict
from cluster.loop import prepare_folder, total_steps, train
from cluster.report import set_up_logging, write_report
from data_shards import ShardSet, ShardStream, eval_batches
from finetune.config import PriorConfig
from model import SceneClassifier, SceneConfig, parameter_groups, save_pretrained

logger = logging.getLogger(__name__)


def train_prior(config: PriorConfig) -> dict[str, Any]:
    """Run the training; returns the report, which rank 0 also writes to ``report.json`` beside ``export/``.

    Raises:
        ValueError: the shards have fewer than two scene classes.
    """
    run = config.run
    rank = start(run.engine)
    set_up_logging(rank)
    folder = prepare_folder(config, run, rank)
    seed_everything(run.seed, run.deterministic)

    shards = ShardSet(config.data.shards)
    classes = config.data.classes or shards.classes
    if len(classes) < 2:
        raise ValueError(f"{config.data.shards}: {len(classes)} scene classes in the manifest; a prior needs labelled shards")
    config.data.classes = classes
    stream = ShardStream(
        shards, None, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
    )  # fmt: skip

    scene = SceneConfig(backbone=config.backbone, classes=classes)
    model = SceneClassifier(scene)
    model.set_grad_checkpointing(run.engine.grad_checkpointing)
    groups = parameter_groups(model, run.optimizer.weight_decay)
    steps = total_steps(run, len(stream))
    engine = build_engine(model, groups, run, total_steps=steps, world_size=rank.world_size)

    def step(engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = engine(batch["images"]).float()
        labels = batch["labels"]
        labelled = (labels >= 0).sum().clamp(min=1)
        summed = cross_entropy(
            logits, labels, label_smoothing=config.label_smoothing, ignore_index=-1, reduction="sum"
        )
        return summed / labelled, {"accuracy": (logits.argmax(dim=1) == labels).sum() / labelled}

    held_out = ShardSet(config.evaluation.shards) if config.evaluation.shards else None

    def evaluate() -> dict[str, float]:
        if held_out is None:
            return {}
        batches = eval_batches(
            held_out, None, config.data.image_size, config.evaluation.batch_size, rank=rank.rank,
            world_size=rank.world_size, classes=classes,
        )  # fmt: skip
        return accuracy_of(engine, batches, rank.device)

    report = train(run, rank, engine, stream, step, evaluate)
    state = full_state_dict(engine)
    if rank.is_first:
        save_pretrained(state, model.config, folder / "export", extra=report)
        write_report(folder, report)
    return report


def accuracy_of(engine: deepspeed.DeepSpeedEngine, batches: Any, device: torch.device) -> dict[str, float]:
    """Top-1 accuracy in percent over the held-out images that have a label, of all ranks."""
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches.images():
        predicted = engine(batch["images"].to(device)).argmax(dim=1)
        labels = batch["labels"].to(device)
        counted = (batch["index"].to(device) >= 0) & (labels >= 0)
        counts += torch.stack([(predicted == labels)[counted].sum(), counted.sum()])
    dist.all_reduce(counts)
    right, of = counts.tolist()
    return {"accuracy": 100 * right / of if of else float("nan")}
