"""Stage two and closed domain as a story: a model trained on human captions of one or more benchmarks.

Both draw one caption an image and epoch and take the contrastive loss, with the Attribution loss where scenes are
labelled. ``instruct`` starts from a stage-one export; ``closed`` from its preset's encoders, by the paper's recipe.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from PIL import Image

from priorclip.data_shards import EvalBatches, ShardSet, ShardStream, eval_batches, load_tokenizer
from priorclip.data_shards.config import EvaluationConfig
from priorclip.finetune.commands import ClosedConfig, InstructConfig
from priorclip.model import RetrievalObjective, build_model, load_weights, parameter_groups, save_pretrained
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.cost.summary import pair_flops, tower_of
from priorclip.model.encoders.lora import adapt, merge
from priorclip.training.monitoring.measure import Subject
from priorclip.training.ranks.distributed import Rank, gather_rows
from priorclip.training.task import Task, run_task


def train_on_captions(config: InstructConfig | ClosedConfig) -> dict[str, Any]:
    """Run stage two or the closed-domain training; returns the report."""
    return run_task(config, config.run, lambda rank: captioned(config, rank))


def captioned(config: InstructConfig | ClosedConfig, rank: Rank) -> Task:
    """A model on captioned shards, judged by recall on the evaluation shards where there are any."""
    run, text = config.run, config.model.text
    tokenizer = load_tokenizer(config.tokenizer or config.init_from or text.name, text.context_length)
    stream = ShardStream(
        ShardSet(config.data.shards, **config.data.access), tokenizer, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
    )  # fmt: skip
    model = build_model(config.model, vocab_size=len(tokenizer))
    if config.init_from:
        load_weights(model, config.init_from)
    if config.lora.rank:
        adapt(model, config.lora)
    model.set_grad_checkpointing(run.engine.grad_checkpointing)
    objective = RetrievalObjective(config.loss, rank.device, gather_rows)
    held_out, test = (held_out_batches(part, config, stream, rank) for part in (config.evaluation, config.test))

    def evaluate(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        return objective.evaluate(engine, held_out) if held_out else {}

    def pictures(engine: deepspeed.DeepSpeedEngine) -> dict[str, Image.Image]:
        return objective.pictures(engine, held_out) if held_out else {}

    def export(weights: dict[str, torch.Tensor], report: dict[str, Any], folder: Path) -> None:
        if config.lora.rank:
            weights = merge(weights, model.config, config.lora)
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        save_pretrained(weights, model.config, folder / "export", folder / "tokenizer", extra=report)

    groups = parameter_groups(model, run.optimizer.weight_decay, run.optimizer.lr, run.optimizer.layer_decay)
    subject = Subject(tower_of, partial(pair_flops, model.config, config.data.image_size), peak_of)
    return Task(
        model, groups, stream, objective.step, evaluate, export, split=objective, pictures=pictures, subject=subject,
        test=(lambda engine: objective.evaluate(engine, test)) if test else None,
    )  # fmt: skip


def held_out_batches(
    part: EvaluationConfig, config: InstructConfig | ClosedConfig, stream: ShardStream, rank: Rank
) -> EvalBatches | None:
    """This rank's batches of the evaluation or test shards; None where there are none."""
    if not part.shards:
        return None
    return eval_batches(
        ShardSet(part.shards, **config.data.access), stream.fetcher.tokenizer, config.data.image_size, part.batch_size,
        rank=rank.rank, world_size=rank.world_size, caption_field=part.caption_field, training=stream.source,
    )  # fmt: skip
