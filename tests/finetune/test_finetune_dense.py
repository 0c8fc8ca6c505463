"""Priors of boxes, of masks and without labels: losses and figures against slow versions, and one training each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_trainings import metrics
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from priorclip.data_shards.config import DataConfig
from priorclip.experiments.sweep import run_words
from priorclip.finetune.box_objective import (
    THRESHOLDS,
    assign,
    average_precisions,
    box_loss,
    boxes_of,
    centres,
    match,
)
from priorclip.finetune.commands import PriorConfig
from priorclip.finetune.mask_objective import intersections_over_unions, mask_loss
from priorclip.finetune.self_objective import SomeSamples, nearest_label, vicreg, views
from priorclip.model import build_model, from_pretrained
from priorclip.model.config import EncoderConfig, ModelConfig, TextConfig
from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.networks.dense_heads import PriorNetwork
from priorclip.training.config import RunConfig

SIDE, GRID = 32, 4
BERT = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 80}  # fmt: skip
SMALL_MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision": EncoderConfig(name="test_vit", image_size=48),
    "text": TextConfig(config=BERT),
}
Box = list[float]


def draw_boxes(rng: np.random.Generator, count: int) -> list[Box]:
    corners = rng.uniform(0, SIDE - 4, (count, 2))
    return [[x, y, *(np.array([x, y]) + rng.uniform(0.5, [SIDE - x, SIDE - y])).tolist()] for x, y in corners.tolist()]


def stacked(boxes: list[list[Box]]) -> Tensor:
    made = torch.full((len(boxes), max(map(len, boxes)), 4), torch.nan)
    for row, each in zip(made, boxes, strict=True):
        row[: len(each)] = torch.tensor(each).reshape(-1, 4)
    return made


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def overlap(one: Box, other: Box) -> float:
    both = area([max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])])
    return both / (area(one) + area(other) - both)


def slow_owner(boxes: list[Box], middle: list[list[float]]) -> list[int]:
    """The smallest box around each centre; a box around none has the nearest centre."""
    owners: list[list[int]] = [[] for _ in middle]
    for number, (left, top, right, bottom) in enumerate(boxes):
        inside = [n for n, (x, y) in enumerate(middle) if left < x < right and top < y < bottom]
        x, y = (left + right) / 2, (top + bottom) / 2
        far = [(a - x) ** 2 + (b - y) ** 2 for a, b in middle]
        for n in inside or [far.index(min(far))]:
            owners[n].append(number)
    return [min(each, key=lambda n: area(boxes[n])) if each else -1 for each in owners]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), counts=st.lists(st.integers(0, 5), min_size=2, max_size=3))
def test_loss_of_boxes_equals_the_slow_version(seed: int, counts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    boxes = [draw_boxes(rng, count) for count in counts]
    outputs = torch.from_numpy(rng.normal(size=(len(boxes), GRID**2, 5)))
    middle = [[(x + 0.5) * SIDE / GRID, (y + 0.5) * SIDE / GRID] for y in range(GRID) for x in range(GRID)]
    owners = [slow_owner(torch.tensor(each).tolist(), middle) for each in boxes]
    assert assign(stacked(boxes), centres(GRID**2, SIDE)).tolist() == owners
    total, taken = 0.0, sum(owner >= 0 for each in owners for owner in each)
    for row, each, own in zip(outputs.tolist(), boxes, owners, strict=True):
        for (score, *reach), (x, y), owner in zip(row, middle, own, strict=True):
            p = 1 / (1 + math.exp(-score))
            total -= 0.25 * (1 - p) ** 2 * math.log(p) if owner >= 0 else 0.75 * p**2 * math.log(1 - p)
            if owner >= 0:
                left, top, right, bottom = (math.log1p(math.exp(z)) * 2 * SIDE / GRID for z in reach)
                mine, wanted = [x - left, y - top, x + right, y + bottom], each[owner]
                hull = area([*map(min, mine[:2], wanted[:2]), *map(max, mine[2:], wanted[2:])])
                iou = overlap(mine, wanted)
                union = (area(mine) + area(wanted)) / (1 + iou)
                total += 1 - iou + (hull - union) / hull
    loss, parts = box_loss(outputs, stacked(boxes), SIDE)
    assert float(loss) == pytest.approx(total / max(1, taken), rel=1e-5)
    assert float(parts["score_loss"] + parts["edge_loss"]) == pytest.approx(float(loss))


def test_a_place_predicts_the_box_around_its_centre() -> None:
    reach = torch.tensor([[[0.0, 3.0, 1.0, 7.0, 2.0]]]).expand(1, 16, 5)
    outputs = torch.cat([reach[..., :1], torch.log(torch.expm1(reach[..., 1:] * GRID / (2 * SIDE)))], 2)
    assert boxes_of(outputs, SIDE)[0, 6].tolist() == pytest.approx([20 - 3, 12 - 1, 20 + 7, 12 + 2], abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), true=st.integers(0, 4), found=st.integers(0, 8))
def test_right_boxes_and_their_precision_equal_the_slow_version(seed: int, true: int, found: int) -> None:
    rng = np.random.default_rng(seed)
    truth = draw_boxes(rng, true)
    near = [[z + rng.normal() for z in truth[rng.integers(true)]] for _ in range(found)] if true else []
    boxes = [[x, y, max(x + 0.1, a), max(y + 0.1, b)] for x, y, a, b in near or draw_boxes(rng, found)]
    wanted = []
    for threshold in THRESHOLDS:
        free, each = set(range(true)), []
        for box in boxes:
            best = max(free, key=lambda n: overlap(box, truth[n]), default=None)
            each.append(best is not None and overlap(box, truth[best]) >= threshold)
            free -= {best} if each[-1] else set()
        wanted.append(each)
    as_boxes = [torch.tensor(each, dtype=torch.float64).reshape(-1, 4) for each in (boxes, truth)]
    right = match(*as_boxes)
    assert right.T.tolist() == wanted
    scores = torch.from_numpy(rng.permutation(found).astype(float))
    figures = average_precisions(scores, torch.from_numpy(right), true)
    order = sorted(range(found), key=lambda n: -float(scores[n]))
    for column, figure in zip(right.T, figures.tolist(), strict=True):
        hits, total = 0, 0.0
        for rank, n in enumerate(order, 1):
            hits += bool(column[n])
            total += hits / rank if column[n] else 0
        assert math.isnan(figure) if not true else figure == pytest.approx(total / true)


def test_mask_figures_equal_the_slow_version() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, GRID, GRID, generator=generator, dtype=torch.float64)
    masks = (torch.rand(3, SIDE, SIDE, generator=generator) * 255).to(torch.uint8)
    masks[2] = 0
    entropies, dices = [], []
    for row, mask in zip(logits.numpy(), masks.numpy(), strict=True):
        share = mask.reshape(GRID, SIDE // GRID, GRID, SIDE // GRID).mean((1, 3)) / 255
        p = 1 / (1 + np.exp(-row))
        entropies.append(-(share * np.log(p) + (1 - share) * np.log(1 - p)).mean())
        dices.append(1 - (2 * (p * share).sum() + 1) / (p.sum() + share.sum() + 1))
    loss, _ = mask_loss(logits, masks)
    assert float(loss) == pytest.approx(np.mean(entropies) + np.mean(dices))
    whole = torch.randn(3, SIDE, SIDE, generator=generator)
    found = intersections_over_unions(whole, masks)
    for figure, row, mask in zip(found.tolist(), whole.numpy(), masks.numpy(), strict=False):
        mine, true = row > 0, mask >= 128
        assert figure == pytest.approx((mine & true).sum() / (mine | true).sum())
    assert len(found) == 2  # the last mask shows nothing


def test_the_places_of_a_token_lie_where_the_token_does() -> None:
    network = PriorNetwork(EncoderConfig(name="test_vit", image_size=64), "masks").eval()
    tokens = torch.zeros(1, 16, network.backbone.width)
    tokens[0, 6, 0] = 100
    network.head = torch.nn.Linear(network.backbone.width, 16, bias=False)
    torch.nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        network.head.weight[:, 0] = torch.arange(1, 17) / 100
    visual = network.backbone.tokens(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))._replace(tokens=tokens)
    logits = network.spread(visual)[0]
    assert logits.shape == (16, 16)
    torch.testing.assert_close(logits[4:8, 8:12], torch.arange(1.0, 17).view(4, 4))
    assert float(logits.detach().sum()) == pytest.approx(136)


def test_vicreg_equals_the_slow_version() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 7, 4)) * 0.7
    agree = sum((a - b) ** 2 for a, b in zip(one.ravel(), other.ravel(), strict=True)) / 28
    vary = differ = 0.0
    for view in (one, other):
        for i in range(4):
            vary += max(0.0, 1 - math.sqrt(view[:, i].var(ddof=1) + 1e-4)) / 4 / 2
            differ += sum(np.cov(view[:, i], view[:, j])[0, 1] ** 2 for j in range(4) if j != i) / 4
    loss, parts = vicreg(torch.from_numpy(one), torch.from_numpy(other))
    assert float(loss) == pytest.approx(25 * agree + 25 * vary + differ)
    assert [float(parts[name]) for name in ("agree", "vary", "differ")] == pytest.approx([agree, vary, differ])


def test_the_probe_equals_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (90, 40))
    labels = torch.randint(0, 4, (90,), generator=generator)
    theirs = KNeighborsClassifier(20, weights=lambda far: np.exp(-far / 0.07), metric="cosine")
    wanted = theirs.fit(known.numpy(), labels.numpy()).predict(asked.numpy())
    assert nearest_label(asked, known, labels, 4).tolist() == wanted.tolist()


def test_views_are_drawn_from_torchs_generator_and_differ() -> None:
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    torch.manual_seed(5)
    one, other = views(images), views(images)
    torch.manual_seed(5)
    assert torch.equal(views(images), one)
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (one.dtype, one.shape) == (torch.uint8, images.shape)


def test_the_samples_of_the_probe_lie_evenly() -> None:
    class Numbers:
        classes = ["a"]  # noqa: RUF012

        def __len__(self) -> int:
            return 11

    assert SomeSamples(Numbers(), 5).places == [0, 2, 5, 8, 10]  # type: ignore[arg-type]
    assert SomeSamples(Numbers(), 50).places == list(range(11))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "figure"), [("masks", "mask_iou"), ("boxes", "box_ap50"), ("self", "knn_accuracy")]
)
def test_a_prior_trains_is_judged_and_instructs(targets: str, figure: str, drawn: Path, tmp_path: Path) -> None:
    run, epochs = tmp_path / "prior", 12 if targets == "boxes" else 4
    words: list[object] = [
        "finetune", "prior", "--data.shards", drawn / "train", "--evaluation.shards", drawn / "train",
        "--data.workers", 0, "--run.dir", run, "--run.epochs", epochs, "--run.optimizer.lr", "3e-3",
        "--run.engine.threads", 1, "--run.engine.zero", 0, "--run.engine.global_batch", 16,
        "--run.progress", "false", "--backbone.name", "resnet10t", "--backbone.image_size", 48,
        "--backbone.kwargs", '{"channels": [24, 48, 96, 192], "stem_width": 16}', "--targets", targets,
        "--run.evaluate_every", 1, "--run.log_every", 1,
    ]  # fmt: skip
    assert run_words(list(map(str, words)), tmp_path / "log", 0) == 0, (tmp_path / "log").read_text()[-3000:]
    report = json.loads((run / "report.json").read_text())
    evaluations = list(metrics(run, f"eval/{figure}").values())
    assert report["test"][figure] == pytest.approx(evaluations[-1])
    losses = list(metrics(run, "train/loss").values())
    assert losses[-1] < losses[0]
    if targets != "self":
        assert evaluations[-1] > evaluations[0]  # it learns
    config = json.loads((run / "export/config.json").read_text())
    assert (config["learned"], config["classes"]) == (targets, [])
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    prior = from_pretrained(run / "export")
    kwargs = {"channels": [24, 48, 96, 192], "stem_width": 16}
    encoder = EncoderConfig("resnet10t", str(run / "export"), 48, trainable=False, kwargs=kwargs)
    torch.testing.assert_close(ImageEncoder(encoder, pool=True).eval()(images), prior.features(images))
    torch.testing.assert_close(
        build_model(ModelConfig(**SMALL_MODEL, prior=encoder)).eval().prior(images), prior(images)
    )
    encoder.projection = 24
    with pytest.raises(ValueError, match=r"has learned no scenes.*set prior.projection to null"):
        ImageEncoder(encoder, pool=True)


@pytest.mark.parametrize("target", ["masks", "self"])
def test_a_backbone_whose_pooling_has_weights_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="pooling of the encoder 'vit_base_patch16_siglip_224' has weights of"):
        PriorNetwork(EncoderConfig("vit_base_patch16_siglip_224", image_size=64, kwargs={"depth": 1}), target)  # type: ignore[arg-type]


def test_mixing_images_is_refused() -> None:
    with pytest.raises(ValueError, match="cutmix mixes scenes, not boxes"):
        PriorConfig(RunConfig("x"), DataConfig("y"), targets="boxes", cutmix=0.2)
