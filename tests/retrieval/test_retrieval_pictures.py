"""`retrieval pictures`: what the pictures show, against slow versions, `retrieval evaluate` and the model itself."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from picture_calls import config, export
from PIL import Image
from small_galleries import SCENES, TestSet

from priorclip.data_shards.images.transforms import eval_transform
from priorclip.model.networks.belief import affinity, keep_top, soft_weights
from priorclip.model.pictures.belief_maps import hard_map, paint_kept, soft_map
from priorclip.model.pictures.retrieval_pictures import RIGHT, WRONG
from priorclip.retrieval import Encoder, evaluate
from priorclip.retrieval.commands import EvaluateConfig, PicturesConfig
from priorclip.retrieval.confusion_sheets import GAP, LINE, SIDE
from priorclip.retrieval.pictures.belief import belief_rows
from priorclip.retrieval.pictures.draw import draw_pictures
from priorclip.retrieval.pictures.material import Material
from priorclip.retrieval.pictures.panel import HIGH, TEXT
from priorclip.retrieval.pictures.tsne import draw_sample, scene_colours, silhouettes, tsne_points

K = 5


@dataclass(frozen=True)
class Drawn:
    """One call of the command on two models: its configuration, its report, and its two figures."""

    config: PicturesConfig
    report: dict
    tsne: Figure
    scenes: Figure

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


@pytest.fixture(scope="module")
def models(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(export(test_set, root / "with" / "export", 1)), str(export(test_set, root / "without" / "export", 2))


@pytest.fixture(scope="module")
def drawn(test_set: TestSet, models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    asked = config(
        test_set, folder, model=models[0], other=models[1], features=str(folder / "features"), k=K, sample=20
    )
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(
            Figure, "savefig", lambda self, *words, **more: (figures.append(self), save(self, *words, **more))
        )
        report = draw_pictures(asked)
    return Drawn(asked, report, *figures)


@pytest.fixture(scope="module")
def material(drawn: Drawn) -> Material:
    return Material(drawn.config)


def slow_silhouette(values: np.ndarray, labels: np.ndarray) -> float:
    """Rousseeuw's definition, with cosine distances."""
    scores = []
    for i, own in enumerate(labels):
        mean = {}
        for scene in set(labels.tolist()):
            others = [j for j in range(len(labels)) if labels[j] == scene and j != i]
            distances = [
                1 - values[i] @ values[j] / math.sqrt((values[i] @ values[i]) * (values[j] @ values[j])) for j in others
            ]
            mean[scene] = sum(distances) / len(distances) if distances else None
        near = min(value for scene, value in mean.items() if scene != own)
        inner = mean[own]
        scores.append(0.0 if inner is None else (near - inner) / max(near, inner))
    return sum(scores) / len(scores)


def test_silhouettes_are_rousseeuws_and_stand_in_the_titles(drawn: Drawn, material: Material) -> None:
    sample = draw_sample(material.features[0], 20, 0)
    titles = [axis.get_title() for axis in drawn.tsne.axes]
    assert len(titles) == 2
    for shown, features, title in zip(material.models, material.features, titles, strict=True):
        images, texts = features.images.double().numpy()[sample.images], features.texts.double().numpy()[sample.texts]
        labels = features.labels.numpy()[sample.images]
        scores = silhouettes(features, sample)
        assert scores["images"] == pytest.approx(slow_silhouette(images, labels), abs=1e-9)
        assert scores["captions"] == pytest.approx(slow_silhouette(texts, labels), abs=1e-9)
        together = slow_silhouette(np.concatenate([images, texts]), np.tile(labels, 2))
        assert scores["both"] == pytest.approx(together, abs=1e-9)
        assert drawn.report["pictures"]["tsne"]["models"][shown.name]["silhouette"] == scores
        assert title == (
            f"{shown.name}\nsilhouette by scene: images {scores['images']:.3f}, captions {scores['captions']:.3f}, "
            f"both {scores['both']:.3f}"
        )
    assert [shown.name for shown in material.models] == ["with/export", "without/export"]


def test_the_planes_show_the_same_sample_in_the_same_colours(drawn: Drawn, material: Material) -> None:
    features = material.features[0]
    sample = draw_sample(features, 20, 0)
    assert len(set(sample.images.tolist())) == 20
    assert features.owner[sample.texts].tolist() == sample.images.tolist()
    colours = scene_colours(len(features.classes))
    assert len({*colours.values()}) == len(SCENES) + 1
    wanted = [tuple(colours[label]) for label in features.labels.numpy()[sample.images]]
    for axis, each in zip(drawn.tsne.axes, material.features, strict=True):
        points = tsne_points(each, sample, 0)
        images, texts = axis.collections
        np.testing.assert_allclose(images.get_offsets(), points[:20], atol=1e-4)
        np.testing.assert_allclose(texts.get_offsets(), points[20:], atol=1e-4)
        for dots in (images, texts):
            np.testing.assert_allclose(dots.get_facecolor()[:, :3], np.array(wanted)[:, :3])
        assert len(images.get_paths()[0].vertices) != len(texts.get_paths()[0].vertices)  # a circle, a triangle
    legend = [text.get_text() for text in drawn.tsne.legends[0].get_texts()]
    assert legend == ["images", "captions", *sorted(SCENES)]


def test_the_same_command_draws_the_same_pictures(drawn: Drawn, tmp_path: Path) -> None:
    again = copy.replace(drawn.config, output=str(tmp_path)) if hasattr(copy, "replace") else None
    again = again or PicturesConfig(**(vars(drawn.config) | {"output": str(tmp_path)}))
    assert draw_pictures(again) == drawn.report
    for path in sorted(drawn.folder.glob("*.png")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((tmp_path / "pictures.json").read_text()) == drawn.report
    other = PicturesConfig(**(vars(again) | {"seed": 1}))
    assert [row["image"] for row in draw_pictures(other)["pictures"]["panel"]["queries"]] != [
        row["image"] for row in drawn.report["pictures"]["panel"]["queries"]
    ]


def test_panel_has_the_best_answers_and_marks_the_right_ones(drawn: Drawn, test_set: TestSet) -> None:
    encoder = Encoder.load(drawn.config.model, "cpu")
    entries = test_set.entries()[:24]
    keys = [entry["filename"].removesuffix(".png") for entry in entries]
    pictures = [encoder.image((test_set.images / entry["filename"]).read_bytes()).double() for entry in entries]
    texts = [(n, row["raw"]) for n, entry in enumerate(entries) for row in entry["sentences"]]
    vectors = [encoder.text(text).double() for _, text in texts]
    queries = drawn.report["pictures"]["panel"]["queries"]
    assert len({row["image"] for row in queries}) == 6
    page = Image.open(drawn.folder / "panel.png").convert("RGB")
    rights = 0
    for number, query in enumerate(queries):
        own = keys.index(query["image"])
        scores = [float(pictures[own] @ vector) for vector in vectors]
        best = sorted(range(len(texts)), key=lambda n: -scores[n])[:5]
        assert [row["score"] for row in query["captions"]] == pytest.approx([scores[n] for n in best], abs=1e-5)
        assert [row["right"] for row in query["captions"]] == [texts[n][0] == own for n in best]
        assert [row["caption"] for row in query["captions"]] == [texts[n][1] for n in best]
        first = next(n for n, (owner, _) in enumerate(texts) if owner == own)
        assert query["caption"] == texts[first][1]
        scores = [float(picture @ vectors[first]) for picture in pictures]
        best = sorted(range(24), key=lambda n: -scores[n])[:5]
        assert [row["image"] for row in query["images"]] == [keys[n] for n in best]
        assert [row["right"] for row in query["images"]] == [n == own for n in best]
        rights += sum(row["right"] for row in (*query["captions"], *query["images"]))
        for place, row in enumerate(query["images"]):
            corner = 2 * GAP + SIDE + TEXT + place * (SIDE + GAP), number * HIGH + GAP + 2 * LINE
            frame = tuple(round(255 * part) for part in to_rgb(RIGHT if row["right"] else WRONG))
            assert page.getpixel(corner) == frame
    assert rights > 0  # otherwise no mark of a right answer was tested


def test_queries_choose_the_images_of_panel_and_belief(test_set: TestSet, drawn: Drawn, tmp_path: Path) -> None:
    asked = config(test_set, tmp_path, only="belief,panel", queries=["river/river_5", "stadium_3.png"])
    found = draw_pictures(asked)["pictures"]
    assert [row["image"] for row in found["panel"]["queries"]] == ["river/river_5", "stadium/stadium_3"]
    assert [row["image"] for row in found["belief"]["images"]] == ["river/river_5", "stadium/stadium_3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["belief.png", "panel.png", "pictures.json"]


def test_belief_maps_are_those_of_the_model_in_float64(drawn: Drawn, material: Material, test_set: TestSet) -> None:
    encoder = material.first.model.encoder
    model = copy.deepcopy(encoder.model).double()
    rows = belief_rows(material, encoder)
    assert [row.key for row in rows] == [row["image"] for row in drawn.report["pictures"]["belief"]["images"]]
    assert len(rows) == 6
    for row, told in zip(rows, drawn.report["pictures"]["belief"]["images"], strict=True):
        pixels = torch.from_numpy(eval_transform((test_set.images / f"{row.key}.png").read_bytes(), 128))[None]
        with torch.no_grad():
            tokens = model.visual.narrow(model.visual.encoder.tokens(pixels).tokens)
            instruction = model.visual.instruction(model.prior(pixels))
        kept = tokens[0][row.hard.flatten()]
        wanted = keep_top(tokens, instruction, K)[0]
        assert len(kept) == K
        assert {tuple(each.tolist()) for each in kept} == {tuple(each.tolist()) for each in wanted}
        weights = soft_weights(tokens, instruction)[0]
        torch.testing.assert_close(row.soft.flatten(), weights, atol=1e-9, rtol=0)
        torch.testing.assert_close(row.belief.flatten(), affinity(tokens, instruction)[0].softmax(0), atol=1e-9, rtol=0)
        assert told["kept"] == [n for n in range(16) if row.hard.flatten()[n]]
    about = drawn.report["pictures"]["belief"]
    assert (about["k"], about["tokens"], about["mode"]) == (K, 16, "soft")


def test_kept_places_keep_their_colours_and_others_are_dark() -> None:
    belief = torch.tensor([[0.1, 0.4], [0.3, 0.2]], dtype=torch.float64)
    assert hard_map(belief, 2).tolist() == [[False, True], [True, False]]
    ranks = [[4, 1], [2, 3]]
    wanted = [[belief[i, j].item() + 1 / math.sqrt(ranks[i][j]) for j in range(2)] for i in range(2)]
    assert soft_map(belief).tolist() == [pytest.approx(line) for line in wanted]
    image = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    image[0] = 90
    painted = np.asarray(paint_kept(image, hard_map(belief, 2)))
    assert (painted[:20, 20:] == (90, 200, 200)).all()
    assert (painted[20:, :20] == (90, 200, 200)).all()
    assert painted[:20, :20].max() == painted[20:, 20:].max() < 60
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"cannot keep {k} of 4"):
            hard_map(belief, k)


def test_bars_are_the_recalls_of_evaluate(drawn: Drawn, test_set: TestSet) -> None:
    reports = [
        evaluate(EvaluateConfig(model=model, data=str(test_set.json), images=str(test_set.images), device="cpu"))
        for model in (drawn.config.model, drawn.config.other)
    ]
    classes = [report["classes"] for report in reports]
    order = sorted(SCENES, key=lambda scene: (-classes[0][scene]["mean_recall"], scene))
    (axis,) = drawn.scenes.axes
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert labels == [f"{scene} ({classes[0][scene]['images']} images)" for scene in order]
    for bars, figures in zip(axis.containers, classes, strict=True):
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx([figures[scene]["mean_recall"] for scene in order], abs=1e-9)
    first = [bar.get_y() for bar in axis.containers[0]]
    top, bottom = axis.get_ylim()[::-1]
    assert first == sorted(first)
    assert top < bottom, "the axis points down, so the best scene is on top"
    overall = drawn.report["pictures"]["scenes"]["mean_recall"]
    assert [*overall.values()] == pytest.approx([report["mean_recall"] for report in reports], abs=1e-9)
