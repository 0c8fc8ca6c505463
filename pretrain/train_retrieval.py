"""Training of a retrieval model, the same for stage one, stage two and the closed domain.

    open the shards -> build the model -> objective -> Task, which training.task runs

Stage one (``pretrain``) trains on web captions. ``finetune instruct`` starts from a stage-one export and ``finetune
closed`` from its preset's encoders; both train on human captions, can adapt the encoders by LoRA, and can measure
recall on a test set once after training.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import deepspeed
import torch
from PIL import Image

from priorclip.common.hub import fetch_export, fetched_by
from priorclip.data_shards import EvalBatches, ShardSet, ShardStream, eval_batches, load_tokenizer
from priorclip.data_shards.config import DataConfig, EvaluationConfig
from priorclip.data_shards.dedupe.identical_images import warn_of_shared_images
from priorclip.model import RetrievalObjective, build_model, load_weights, parameter_groups, save_pretrained
from priorclip.model.bootstrap import Hits
from priorclip.model.config import LoraConfig, LossConfig, ModelConfig
from priorclip.model.cost.peak_tflops import peak_of
from priorclip.model.cost.summary import pair_flops, tower_of
from priorclip.model.image_hits import IMAGE_FILE, image_hits, write_image_hits
from priorclip.model.lora import adapt, merge
from priorclip.model.recall import recall_figures
from priorclip.training.config import RunConfig
from priorclip.training.loop import run_task
from priorclip.training.monitoring.measure import ModelFacts
from priorclip.training.ranks.distributed import Rank, gather_rows_no_grad
from priorclip.training.task import Task


class RetrievalConfig(Protocol):
    """The options that the three trainings share."""

    run: RunConfig
    data: DataConfig
    tokenizer: str | None
    init_from: Any
    model: ModelConfig
    loss: LossConfig
    evaluation: EvaluationConfig


def train_retrieval(
    config: RetrievalConfig, lora: LoraConfig | None = None, test: EvaluationConfig | None = None
) -> dict[str, Any]:
    """Trains a retrieval model and returns the report.

    Args:
        config: the options of the command
        lora: adapters in the encoders; None or rank 0 trains the encoders' own weights
        test: shards on which the exported weights' recall is measured once, after training
    """
    preset = getattr(config, "preset", None)
    with fetched_by(f"--init_from {config.init_from}" if config.init_from else f"--preset {preset}"):
        return run_task(config, config.run, lambda rank: retrieval_task(config, rank, lora or LoraConfig(rank=0), test))


def retrieval_task(config: RetrievalConfig, rank: Rank, lora: LoraConfig, test: EvaluationConfig | None) -> Task:
    """The model, its batches and its loss. Recall is measured on the evaluation shards, if there are any.

    What each test image contributes to the recalls is written beside the report.
    """
    run, text = config.run, config.model.text
    truth = truth_of(config.model)
    start = str(fetch_export(config.init_from)) if config.init_from else None
    tokenizer = load_tokenizer(config.tokenizer or start or text.name, text.context_length)
    stream = ShardStream(
        ShardSet(config.data.shards, **config.data.access), tokenizer, config.data,
        global_batch=run.engine.global_batch, rank=rank.rank, world_size=rank.world_size, seed=run.seed,
        truth=truth,
    )  # fmt: skip
    model = build_model(config.model, vocab_size=len(tokenizer))
    if start:
        load_weights(model, start)
    if lora.rank:
        adapt(model, lora)
    model.set_grad_checkpointing(run.engine.grad_checkpointing)
    objective = RetrievalObjective(
        config.loss, rank.device, gather_rows_no_grad, config.model.vision.bands, len(stream.classes)
    )
    held_out = held_out_batches(config.evaluation, config, stream, rank)
    tested = held_out_batches(test, config, stream, rank) if test else None
    test_hits: list[Hits] = []  # of the exported weights

    def evaluate(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        return objective.evaluate(engine, held_out) if held_out else {}

    def measure_test(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
        assert tested is not None
        test_hits.append(objective.query_hits(engine, tested))
        return recall_figures(test_hits[-1])

    def pictures(engine: deepspeed.DeepSpeedEngine) -> dict[str, Image.Image]:
        return objective.pictures(engine, held_out) if held_out else {}

    def export(weights: dict[str, torch.Tensor], report: dict[str, Any], folder: Path) -> None:
        if test_hits and tested:
            scenes = tested.scenes(list(range(tested.image_count)))
            write_image_hits(folder / IMAGE_FILE, image_hits(test_hits[-1], tested.keys(), scenes))
        if lora.rank:
            weights = merge(weights, model.config, lora)
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        save_pretrained(weights, model.config, folder / "export", folder / "tokenizer", extra=report)

    groups = parameter_groups(model, run.optimizer.weight_decay, run.optimizer.lr, run.optimizer.layer_decay)
    facts = ModelFacts(tower_of, partial(pair_flops, model.config, config.data.side), peak_of)
    return Task(
        model, groups, stream, objective.step, evaluate, export, feature_losses=objective, pictures=pictures,
        model_facts=facts,
        test=measure_test if tested else None,
    )  # fmt: skip


def held_out_batches(
    part: EvaluationConfig, config: RetrievalConfig, stream: ShardStream, rank: Rank
) -> EvalBatches | None:
    """This rank's batches of the evaluation or test shards. None if the configuration names no shards."""
    if not part.shards:
        return None
    shards = ShardSet(part.shards, **config.data.access)
    warn_of_shared_images(stream.source, shards, rank.rank)
    return eval_batches(
        shards, stream.fetcher.tokenizer, config.data.side, part.batch_size,
        rank=rank.rank, world_size=rank.world_size, caption_field=part.caption_field, truth=truth_of(config.model),
        bands=config.data.bands,
    )  # fmt: skip


def truth_of(model: ModelConfig) -> Literal["masks"] | None:
    """Returns what the images must come with besides their captions: masks, if they are the model's belief."""
    return "masks" if model.belief.needs_masks and model.kind != "clip" else None
