"""Stage one as a story: open the shards, build PriorCLIP, say what a step is; cluster.task runs it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from PIL import Image

from priorclip.data_shards import ShardSet, ShardStream, eval_batches, load_tokenizer
from priorclip.model import RetrievalObjective, build_model, load_weights, parameter_groups, save_pretrained
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.cost.summary import pair_flops, tower_of
from priorclip.pretrain.commands import PretrainConfig
from priorclip.training.monitoring.measure import Subject
from priorclip.training.ranks.distributed import Rank, gather_rows
from priorclip.training.task import Task, run_task


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run stage one; returns the report."""
    return run_task(config, config.run, lambda rank: stage_one(config, rank))


def stage_one(config: PretrainConfig, rank: Rank) -> Task:
    """PriorCLIP on image-text shards, judged by recall on the evaluation shards where there are any."""
    run, text = config.run, config.model.text
    tokenizer = load_tokenizer(config.tokenizer or config.init_from or text.name, text.context_length)
    stream = ShardStream(
        ShardSet(config.data.shards, **config.data.access), tokenizer, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
    )  # fmt: skip
    model = build_model(config.model, vocab_size=len(tokenizer))
    if config.init_from:
        load_weights(model, config.init_from)
    model.set_grad_checkpointing(run.engine.grad_checkpointing)
    objective = RetrievalObjective(config.loss, rank.device, gather_rows)
    held_out = None
    if config.evaluation.shards:
        held_out = eval_batches(
            ShardSet(config.evaluation.shards, **config.data.access), tokenizer,
            config.data.image_size, config.evaluation.batch_size,
            rank=rank.rank, world_size=rank.world_size, caption_field=config.evaluation.caption_field,
            training=stream.source,
        )  # fmt: skip

    def evaluate(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        return objective.evaluate(engine, held_out) if held_out else {}

    def pictures(engine: deepspeed.DeepSpeedEngine) -> dict[str, Image.Image]:
        return objective.pictures(engine, held_out) if held_out else {}

    def export(weights: dict[str, torch.Tensor], report: dict[str, Any], folder: Path) -> None:
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        save_pretrained(weights, model.config, folder / "export", folder / "tokenizer", extra=report)

    groups = parameter_groups(model, run.optimizer.weight_decay, run.optimizer.lr, run.optimizer.layer_decay)
    subject = Subject(tower_of, partial(pair_flops, model.config, config.data.image_size), peak_of)
    return Task(
        model, groups, stream, objective.step, evaluate, export, split=objective, pictures=pictures, subject=subject
    )
