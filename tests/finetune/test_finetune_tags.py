"""The objects that captions name as targets of a prior: words, targets, loss, average precision, and a training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_trainings import metrics, run_well

from priorclip.data_shards import ShardSet
from priorclip.data_shards.config import DataConfig
from priorclip.finetune.commands import PriorConfig
from priorclip.finetune.object_tags import TAGS, WORDS, TagTargets, owners, tags_of
from priorclip.finetune.prior_objective import mean_average_precision, tag_loss
from priorclip.model.config import EncoderConfig
from priorclip.training.config import RunConfig


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("Two Planes are parked next to the terminal.", {"airplane", "terminal"}),
        ("many cars in a car park near some buses", {"car", "parking lot"}),
        ("a carpet of planets and a planetree", set()),
        ("white storage tanks, factories and a church", {"storage tank", "factory", "church"}),
        ("a football field and a baseball field", {"playground", "baseball field"}),
        ("an overpass crosses the railways", {"viaduct", "railway"}),
    ],
)
def test_words_are_found_whole_in_both_numbers_and_the_longer_word_wins(caption: str, tags: set[str]) -> None:
    assert tags_of([caption]) == tags
    assert tags_of(["nothing here", caption]) == tags


def test_no_word_stands_for_two_tags() -> None:
    assert len({word for words in WORDS.values() for word in words}) == sum(map(len, WORDS.values()))
    assert all(tags_of([f"the {word}, here"]) == {tag} for word, tag in owners().items())


def test_targets_are_those_of_all_captions(data: Path) -> None:
    source = ShardSet(str(data / "train"))
    rows = TagTargets(source, "captions")(torch.tensor([3, 0, 3]))
    for row, image in zip(rows, (3, 0, 3), strict=True):
        assert {TAGS[n] for n in row.nonzero().flatten()} == tags_of(source.captions(image))
    assert torch.equal(rows[0], rows[2])
    assert rows.sum() > 0


def test_an_image_without_captions_has_no_target_and_a_set_without_any_is_refused(data: Path) -> None:
    targets = TagTargets(ShardSet(str(data / "train")), "stories")
    assert torch.equal(targets(torch.tensor([0])), torch.full((1, len(TAGS)), -1.0))
    with pytest.raises(ValueError, match=r"data/x: no image has a text in 'stories'.*--targets scenes"):
        targets.require_captions("data/x")


def test_loss_is_the_mean_over_tags_and_images_with_captions() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5, dtype=torch.float64), (torch.rand(4, 5) > 0.5).double()
    targets[2] = -1
    expected = [
        -math.log(1 / (1 + math.exp(-x if y else x)))
        for row, wanted in zip(logits.tolist(), targets.tolist(), strict=True) if wanted[0] >= 0
        for x, y in zip(row, wanted, strict=True)
    ]  # fmt: skip
    assert float(tag_loss(logits, targets)) == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert float(tag_loss(logits, torch.full_like(targets, -1))) == 0


def slow_average_precision(scores: list[float], wanted: list[float]) -> float:
    """Mean over the positives of the precision at their rank; the scores differ."""
    order = sorted(range(len(scores)), key=lambda n: -scores[n])
    found, total = 0, 0.0
    for rank, n in enumerate(order, 1):
        if wanted[n]:
            found += 1
            total += found / rank
    return total / found


@settings(max_examples=30, deadline=None)
@given(images=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_average_precision_equals_the_slow_version(images: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, 4, generator=generator, dtype=torch.float64)
    targets = (torch.rand(images, 4, generator=generator) > 0.6).double()
    there = [k for k in range(4) if targets[:, k].any()]
    found = mean_average_precision(scores, targets)
    if there:
        each = [slow_average_precision(scores[:, k].tolist(), targets[:, k].tolist()) for k in there]
        assert found == pytest.approx(100 * np.mean(each))
    else:
        assert math.isnan(found)


def test_mixing_images_is_refused_with_tags() -> None:
    with pytest.raises(ValueError, match="mixup mixes scenes, not tags"):
        PriorConfig(RunConfig("x"), DataConfig("y"), targets="tags", mixup=0.2)


@pytest.mark.parametrize(("targets", "epochs"), [("tags", 1), ("scenes+tags", 10)])
def test_a_prior_of_tags_trains_is_judged_and_instructs(targets: str, epochs: int, data: Path, tmp_path: Path) -> None:
    words = [
        "--data.shards", data / "train", "--evaluation.shards", data / "train", "--data.workers", "0",
        "--run.dir", tmp_path / "prior", "--run.epochs", epochs,
        "--run.optimizer.lr", "3e-3", "--run.engine.threads", "1",
        "--run.engine.global_batch", "16", "--backbone.name", "resnet10t", "--backbone.image_size", "48",
        "--data.scale", "1", "--targets", targets, "--run.checkpoint.best", "tag_map", "--run.export", "best",
    ]  # fmt: skip
    run_well("finetune", "prior", *words)
    report = json.loads((tmp_path / "prior/report.json").read_text())
    evaluations = list(metrics(tmp_path / "prior", "eval/tag_map").values())
    assert report["test"]["tag_map"] == pytest.approx(max(evaluations))
    if epochs > 1:
        assert max(evaluations) > 2 * evaluations[0]  # it learns
    config = json.loads((tmp_path / "prior/export/config.json").read_text())
    assert config["tags"] == list(TAGS)
    assert bool(config["classes"]) == ("accuracy" in report["test"]) == ("scenes" in targets)
    from priorclip.model import from_pretrained
    from priorclip.model.encoders.vision import ImageEncoder

    classifier = from_pretrained(tmp_path / "prior/export")
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    assert classifier(images).shape == (2, len(config["classes"]) + len(TAGS))
    encoder = EncoderConfig(name="resnet10t", image_size=48, weights=str(tmp_path / "prior/export"), trainable=False)
    torch.testing.assert_close(ImageEncoder(encoder, pool=True).eval()(images), classifier.eval().features(images))
