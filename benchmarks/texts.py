"""Padding of texts: a training step and an evaluation with captions cut to their batch's longest, and padded as before.

    python -m benchmarks.texts --json dataset_rsicd.json                      # CLIP's text tower, 77 tokens
    python -m benchmarks.texts --json dataset_rsicd.json --batch 8 --captions 150 --runs 2

Weights are random, captions real. Both ways take turns in one process; the ratio is that of the processor time of all
threads. ``step`` is forward, loss and backward of the whole model. ``captions`` encodes all captions of a split: each
distinct one once, sorted by length and cut, against all in their order with padding. The features of both are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from priorclip.data_shards import eval_batches, load_tokenizer
from priorclip.data_shards.sources import RecordSet, karpathy
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.model import build_model
from priorclip.model.convert.clip_tokenizer import write_clip_tokenizer
from priorclip.model.encoders.padding import kept_length
from priorclip.model.evaluation import encode_texts
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.networks.two_towers import TwoTowers
from priorclip.model.presets import load_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="Karpathy JSON with captions")
    parser.add_argument("--split", default="test")
    parser.add_argument("--preset", default="priorclip-b32", help="one with CLIP's text tower")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--captions", type=int, default=500, help="of these many captions features are compared")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    settings = load_preset(options.preset)
    settings.vision.weights = settings.prior.weights = settings.text.weights = None
    model = build_model(settings)
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(folder, settings.text.context_length)
        tokenizer = load_tokenizer(folder, settings.text.context_length)
    records = [record for record in karpathy(options.json, options.json.parent) if record.split == options.split]
    compare_steps(model.train(), tokenizer, records, options)
    compare_evaluations(model.eval(), tokenizer, records, options)


def compare_steps(model: Any, tokenizer: Any, records: list[Any], options: argparse.Namespace) -> None:
    draw = random.Random(0)
    side = model.config.vision.image_size
    pixels = torch.randint(0, 256, (options.batch, 3, side, side), dtype=torch.uint8)
    ids, loss = torch.arange(options.batch), RetrievalLoss()

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss(model(pixels, batch["input_ids"], batch["attention_mask"]), ids)[0].backward()
        model.zero_grad()

    lengths, ratios, seconds = [], [], []
    for turn in range(options.runs + 1):
        chosen = [draw.choice(record.captions) for record in draw.sample(records, options.batch)]
        batch = tokenize(tokenizer, chosen)
        cut, whole = processor_time(partial(step, batch)), in_the_old_way(partial(step, batch))
        if turn:  # the first warms up
            lengths.append(kept_length(batch["attention_mask"]))
            ratios.append(cut / whole)
            seconds.append(whole)
    length = model.config.text.context_length
    print(f"step: batch {options.batch}, cut to {min(lengths)} to {max(lengths)} of {length} tokens: "
          f"{statistics.median(ratios):.2f} of the padded step's {statistics.median(seconds):.2f} s")  # fmt: skip


def compare_evaluations(model: Any, tokenizer: Any, records: list[Any], options: argparse.Namespace) -> None:
    batches = eval_batches(RecordSet(records[: options.captions // 5]), tokenizer, 224, 64)
    features: dict[str, torch.Tensor] = {}

    def forward(**inputs: torch.Tensor) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    def encode(name: str) -> None:
        features[name] = encode_texts(forward, batches, torch.device("cpu"))

    distinct = batches.distinct
    ratios, seconds = [], []
    for _ in range(options.runs):
        batches.distinct = distinct
        cut = processor_time(lambda: encode("cut"))
        batches.distinct = list(range(len(batches.captions)))
        whole = in_the_old_way(lambda: encode("whole"))
        ratios.append(cut / whole)
        seconds.append(whole)
    error = (features["cut"] - features["whole"]).abs().max().item()
    print(f"captions: {len(batches.captions)}, {len(distinct)} distinct: {statistics.median(ratios):.3f} of the padded "
          f"way's {statistics.median(seconds):.1f} s, features differ by {error:.1e} at most")  # fmt: skip


def in_the_old_way(work: Callable[[], None]) -> float:
    with patch.object(TwoTowers, "cuts_padding", False):
        return processor_time(work)


def processor_time(work: Callable[[], None]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
