"""Stage two and closed domain as a story: an image-text model trained on captioned images of one or more benchmarks.

Both draw one human caption an image and epoch and take the contrastive loss, with the Attribution loss where scenes are
labelled. ``instruct`` starts from a stage-one export; ``closed`` from the presets' encoders, by the paper's recipe.
"""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch

from cluster.distributed import gather_rows, seed_everything, start
from cluster.engine import build_engine, full_state_dict
from cluster.loop import prepare_folder, total_steps, train
from cluster.report import set_up_logging, write_report
from data_shards import ShardSet, ShardStream, eval_batches, load_tokenizer
from finetune.config import ClosedConfig, InstructConfig
from model import RetrievalLoss, build_model, load_weights, parameter_groups, save_pretrained
from model.evaluation import evaluate_retrieval

logger = logging.getLogger(__name__)


def train_on_captions(config: InstructConfig | ClosedConfig) -> dict[str, Any]:
    """Run the training; returns the report, which rank 0 also writes to ``report.json`` beside ``export/``."""
    run = config.run
    rank = start(run.engine)
    set_up_logging(rank)
    folder = prepare_folder(config, run, rank)
    seed_everything(run.seed, run.deterministic)

    tokenizer = load_tokenizer(
        config.tokenizer or config.init_from or config.model.text.name, config.model.text.context_length
    )
    stream = ShardStream(
        ShardSet(config.data.shards), tokenizer, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
    )  # fmt: skip
    model = build_model(config.model, vocab_size=len(tokenizer))
    if config.init_from:
        load_weights(model, config.init_from)
    model.set_grad_checkpointing(run.engine.grad_checkpointing)
    groups = parameter_groups(model, run.optimizer.weight_decay)
    steps = total_steps(run, len(stream))
    engine = build_engine(model, groups, run, total_steps=steps, world_size=rank.world_size)
    loss = RetrievalLoss(**vars(config.loss))
    held_out = ShardSet(config.evaluation.shards) if config.evaluation.shards else None

    def step(engine: deepspeed.DeepSpeedEngine, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs = engine(batch["images"], batch["input_ids"], batch["attention_mask"])
        total, parts = loss(outputs, batch["image_ids"], batch["labels"])
        return total, {**parts, "logit_scale": outputs["logit_scale"].detach()}

    def evaluate() -> dict[str, float]:
        if held_out is None:
            return {}
        batches = eval_batches(
            held_out, tokenizer, config.data.image_size, config.evaluation.batch_size,
            rank=rank.rank, world_size=rank.world_size, caption_field=config.evaluation.caption_field,
        )  # fmt: skip
        return evaluate_retrieval(engine, batches, rank.device, gather=gather_rows)

    report = train(run, rank, engine, stream, step, evaluate)
    state = full_state_dict(engine)
    if rank.is_first:
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        save_pretrained(state, model.config, folder / "export", folder / "tokenizer", extra=report)
        write_report(folder, report)
    return report
