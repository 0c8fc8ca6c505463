"""A training whose belief is the true mask of drawn scenes: in its steps and in its test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from real_trainings import SMALL, VIT, run_well

from priorclip.data_shards import ShardSet, load_tokenizer
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.data_shards.synthetic.truth import draw_truth
from priorclip.model import from_pretrained
from priorclip.model.recall import retrieval_metrics
from priorclip.retrieval.__main__ import main as retrieval


def test_a_model_is_trained_and_tested_with_the_true_mask(
    drawn: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The reference encodes the test images with masks that are drawn again."""
    run_well("finetune", "closed", "--preset", "priorclip-tiny", *VIT, *SMALL, "--tokenizer", data / "tokenizer",
             "--model.text.context_length", 24, "--model.belief.mode", "given", "--model.belief.given", "complement",
             "--data.shards", drawn / "train", "--data.workers", 0, "--test.shards", drawn / "held-out",
             "--run.dir", tmp_path / "run", "--run.epochs", 2, "--run.engine.global_batch", 32,
             "--run.engine.zero", 0, "--run.progress", "false", "--run.optimizer.lr", "1e-3")  # fmt: skip
    report = json.loads((tmp_path / "run/report.json").read_text())
    model, shards = from_pretrained(tmp_path / "run/export").eval(), ShardSet(str(drawn / "held-out"))
    count = len(shards)
    images = torch.stack([torch.from_numpy(eval_transform(shards.read(n).image, 48)) for n in range(count)])
    masks = torch.stack([torch.from_numpy(draw_truth(0, 64 + n, 48).mask) for n in range(count)])
    captions = [shards.captions(n) for n in range(count)]
    owners = torch.tensor([n for n, texts in enumerate(captions) for _ in texts])
    tokenizer = load_tokenizer(str(data / "tokenizer"), 24)
    with torch.no_grad():
        texts = model(**tokenize(tokenizer, [text for each in captions for text in each]))["text_features"]
        told = model(images=images, masks=masks)["image_features"]
        other = model(images=images, masks=1 - masks)["image_features"]
    wanted = retrieval_metrics(told, texts, owners)
    assert report["test"]["mean_recall"] == pytest.approx(wanted["mean_recall"], abs=0.2)  # masks are rounded to 1/255
    assert float((told - other).abs().max()) > 1e-4  # the mask matters
    words = ["--model", tmp_path / "run/export", "--data", drawn / "held-out", "--device", "cpu"]
    assert retrieval(["evaluate", *map(str, words), "--output", str(tmp_path / "report.json")]) == 2
    assert "the belief of this model is given (belief.mode given, complement)" in capsys.readouterr().err
