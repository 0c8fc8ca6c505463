"""The parts of `finetune prior`: soft and mixed targets, the confusion matrix, the check of test classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import Tensor
from torch.nn.functional import cross_entropy

from priorclip.data_shards.config import DataConfig, EvaluationConfig
from priorclip.finetune.commands import PriorConfig
from priorclip.finetune.confusion_matrix import figures_of, write_confusion
from priorclip.finetune.scene_mixing import SceneTargets, soft_cross_entropy
from priorclip.finetune.train_prior import refuse_unknown
from priorclip.training.config import RunConfig


def batch(count: int) -> Tensor:
    """Every pixel of image i is 10 * i, so the pixels show which images are mixed."""
    return (10 * torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(count, 3, 8, 8).contiguous()


def test_smoothed_targets_equal_those_of_torch() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, -1, 2, 2, -1])
    images, soft = SceneTargets(5, mixup=0.0, cutmix=0.0, smoothing=0.1)(batch(6), labels)
    assert images.dtype == torch.uint8
    wanted = cross_entropy(logits, labels, ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, soft), wanted)
    assert soft_cross_entropy(logits, torch.zeros(6, 5)) == 0, "without labels the loss is 0"


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2], [3, -1, 0, 1, 2, -1, 1], [-1, 2, -1]])
def test_pixels_and_targets_are_mixed_by_the_same_share(labels: list[int]) -> None:
    """In a pair (i, j), image i becomes share * i + (1 - share) * j. So does its target. An unpaired image stays."""
    mix = SceneTargets(4, mixup=1.0, cutmix=0.0, smoothing=0.0)
    torch.manual_seed(2)
    images, soft = mix(batch(len(labels)), torch.tensor(labels))
    known = [place for place, label in enumerate(labels) if label >= 0]
    paired = known[: len(known) // 2 * 2]
    before = batch(len(labels)).float() / 255
    own = torch.tensor([[float(label == name) for name in range(4)] for label in labels])
    shares = []
    for place in range(len(labels)):
        if place not in paired:
            assert torch.equal(images[place], before[place])
            assert torch.equal(soft[place], own[place])
            continue
        other = paired[::-1][paired.index(place)]
        share = float((images[place] - before[other])[0, 0, 0] / (before[place] - before[other])[0, 0, 0])
        torch.testing.assert_close(soft[place], share * own[place] + (1 - share) * own[other])
        shares.append(share)
    assert np.ptp(shares or [0]) < 1e-5
    assert all(0 < share < 1 for share in shares)
    torch.manual_seed(2)
    again = mix(batch(len(labels)), torch.tensor(labels))
    assert torch.equal(again[0], images), "the same seed gives the same images"


def test_confusion_equals_that_of_scikit_learn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["Sea Lake", "São Paulo", "never tested", "dense_residential"]
    labels = rng.choice([0, 1, 3], 60)
    predicted = np.where(rng.random(60) < 0.7, labels, rng.integers(0, 4, 60))
    counts = torch.tensor(confusion_matrix(labels, predicted, labels=range(4)))
    figures = figures_of(counts)
    assert figures["accuracy"] == pytest.approx(100 * (labels == predicted).mean())
    with pytest.warns(UserWarning, match="not in y_true"):
        assert figures["mean_class_accuracy"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted))
    write_confusion(counts, names, tmp_path)
    written = json.loads((tmp_path / "confusion.json").read_text(encoding="utf-8"))
    assert written["class_accuracy"]["never tested"] is None
    assert written["class_accuracy"]["Sea Lake"] == pytest.approx(100 * (predicted == labels)[labels == 0].mean())
    assert sum(pair["images"] for pair in written["confused"]) == (labels != predicted).sum()
    assert Image.open(tmp_path / "confusion.png").width > 300


def test_a_test_class_that_is_not_learned_is_refused() -> None:
    config = PriorConfig(RunConfig(dir="x"), DataConfig("aid"), evaluation=EvaluationConfig("resisc"))
    refuse_unknown(["airport", "sea_lake"], ["Airport", "River", "SeaLake"], config)
    with pytest.raises(ValueError, match=r"resisc has images of volcano: no class of .* aid, which"):
        refuse_unknown(["airport", "volcano"], ["Airport", "River"], config)
    for wrong in ({"label_smoothing": 1.0}, {"mixup": -0.1}, {"cutmix": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PriorConfig(RunConfig(dir="x"), DataConfig("aid"), **wrong)
