"""Models of 4 x 4 visual tokens for the tests of `retrieval pictures`, and the options of a call."""

from __future__ import annotations

from pathlib import Path

import torch
from small_galleries import TestSet

from priorclip.data_shards import load_tokenizer
from priorclip.model import build_model, load_preset, save_pretrained
from priorclip.retrieval.commands import PicturesConfig


def export(test_set: TestSet, folder: Path, seed: int, **changes) -> Path:
    """A random model of 4 x 4 visual tokens."""
    torch.manual_seed(seed)
    tokens = test_set.export.with_name("export-tokenizer")
    config = load_preset("priorclip-tiny")
    config.vision.image_size = config.prior.image_size = 128
    config.text.context_length = 24
    for name, value in changes.items():
        setattr(config, name, value)
    model = build_model(config, vocab_size=len(load_tokenizer(str(tokens), 24)))
    return save_pretrained(model.state_dict(), model.config, folder, tokenizer_folder=tokens)


def config(test_set: TestSet, output: Path, **changes) -> PicturesConfig:
    values = {"model": str(test_set.export), "data": str(test_set.json), "images": str(test_set.images)}
    return PicturesConfig(**(values | {"device": "cpu", "output": str(output)} | changes))
