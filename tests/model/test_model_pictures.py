"""Hard negatives and similarities by scene: the choice against a loop, the pictures pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from tiny_models import tiny

from priorclip.model.build import build_model
from priorclip.model.config import LossConfig
from priorclip.model.cost.summary import tower_of
from priorclip.model.objective import RetrievalObjective, draw_similarities
from priorclip.model.pictures import retrieval_pictures
from priorclip.model.pictures.retrieval_pictures import (
    HardNegative,
    fit_text,
    hard_negatives,
    hard_negatives_panel,
    load_font,
    similarity_panel,
    wrap_text,
)
from priorclip.model.recall import retrieval_metrics


def by_loop(images, texts, owners, captions, count):
    """(image, own caption, other caption, margin), by a slow loop."""
    found = []
    for i, image in enumerate(images):
        scores = [float(image @ text) for text in texts]
        own = [t for t in range(len(texts)) if owners[t] == i]
        words = {captions[t] for t in own}
        other = [t for t in range(len(texts)) if captions[t] not in words]
        if own and other:
            best, worst = max(own, key=scores.__getitem__), max(other, key=scores.__getitem__)
            found.append((i, best, worst, scores[worst] - scores[best]))
    return sorted(found, key=lambda each: -each[3])[:count]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), images=st.integers(1, 9), each=st.integers(1, 3), words=st.integers(1, 30),
       count=st.integers(1, 5), rows=st.integers(1, 4))  # fmt: skip
def test_hard_negatives_are_those_of_a_loop(seed, images, each, words, count, rows):
    generator = torch.Generator().manual_seed(seed)
    captions = [f"word {int(n)}" for n in torch.randint(0, words, (images * each,), generator=generator)]
    owners = torch.arange(images).repeat_interleave(each)
    a, b = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (images, images * each))
    before, retrieval_pictures.ROWS = retrieval_pictures.ROWS, rows  # pieces, as of many images
    try:
        found = hard_negatives(a, b, owners, captions, count)
    finally:
        retrieval_pictures.ROWS = before
    wanted = by_loop(a, b, owners, captions, count)
    assert [(one.image, one.own, one.other) for one in found] == [one[:3] for one in wanted]
    for one, (*_, lost) in zip(found, wanted, strict=True):
        assert one.other_score - one.own_score == pytest.approx(lost, abs=1e-12)


def test_panel_shows_each_image_with_the_caption_that_wins_and_its_own():
    pixels = torch.stack([torch.full((3, 40, 50), shade, dtype=torch.uint8) for shade in (60, 130)])
    found = [HardNegative(4, 1, 0, 0.2, 0.5), HardNegative(7, 0, 1, 0.6, 0.4)]
    panel = np.asarray(hard_negatives_panel(pixels, found, ["a long beach " * 40, "two ships"])).astype(int)
    row = 6 * 19 + 8
    assert panel.shape == (2 * row - 8, 900, 3)
    assert (panel[:40, :50] == 60).all()
    assert (panel[row : row + 40, :50] == 130).all()
    assert (panel[40:114, :50] == 255).all()
    red = (panel[..., 0] - panel[..., 1]) > 60
    green = (panel[..., 1] - panel[..., 0]) > 60
    assert red[:row].sum() > 500, "the caption that wins is red"
    assert not red[row:].any(), "where the own caption wins, the other is no error"
    assert green[:row].any()
    assert green[row:].any()


def test_lines_are_as_wide_as_the_panel_at_most():
    font = load_font(15)
    lines = wrap_text("there are four blue vehicles beside a pond parked on tarmac", font, 150)
    assert " ".join(lines) == "there are four blue vehicles beside a pond parked on tarmac"
    assert len(lines) > 2
    assert all(font.getlength(line) <= 150 for line in lines)
    for text in ("antidisestablishmentarianism a", f"{'W' * 40}/harbour_{'i' * 90}.tif", "São Paulo " * 9, ""):
        lines = wrap_text(text, font, 60)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(font.getlength(line) <= 60 for line in lines)
        short = fit_text(text, font, 60, lines=2)
        assert all(font.getlength(line) <= 60 for line in short)
        assert short == lines[:2] if len(lines) <= 2 else len(short) == 2 and short[-1].endswith("…")


def test_matrix_is_drawn_cell_by_cell():
    values = torch.tensor([[0.9, -0.1, 0.0], [0.2, 0.8, 0.1], [0.3, 0.4, 0.7]])
    panel = np.asarray(similarity_panel(values, ["airport", "beach", "beach"])).astype(int)
    cell, left = 240, 150
    for row in range(3):
        for column in range(3):
            wanted = np.array(colormaps["viridis"]((float(values[row, column]) + 0.1) / 1.0)[:3]) * 255
            centre = panel[row * cell + cell // 2, left + column * cell + cell // 2]
            assert np.abs(centre - wanted).max() <= 1, (row, column)
    assert (panel[0, left : left + cell] == 255).all(), "a scene has a white frame"
    assert (panel[cell, left + cell : left + 3 * cell] == 255).all()
    assert not (panel[2 * cell, left + cell + 5 : left + 3 * cell - 5] == 255).all(), "no frame within a scene"
    assert (panel[:20, :100] < 128).any(), "the scene's name"


class Scenes:
    """Eight images with alternating scenes and two captions each; the features tell only the scene."""

    captions = tuple(f"caption {n}" for n in range(16))
    text_image = np.arange(8).repeat(2)
    image_count = 8

    def images(self):
        generator = torch.Generator().manual_seed(1)
        yield {
            "images": torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator),
            "index": torch.arange(8),
        }

    def texts(self):
        ids = torch.arange(16 * 12).view(16, 12) % 60 + 1
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": torch.arange(16)}

    def pixels(self, images):
        return next(self.images())["images"][images]

    def scenes(self, images):
        return [("river", "")[image % 2] for image in images]


def test_similarities_are_ordered_draw_similarities():
    features = torch.eye(2)[torch.arange(8) % 2]
    panel = np.asarray(draw_similarities(features, features.repeat_interleave(2, 0), Scenes())).astype(int)
    bright, dark = (np.array(colormaps["viridis"](end)[:3]) * 255 for end in (1.0, 0.0))
    for row in range(8):
        for column in range(8):
            centre = panel[row * 90 + 45, 150 + column * 90 + 45]
            wanted = bright if (row < 4) == (column < 4) else dark
            assert np.abs(centre - wanted).max() <= 1, "images with a scene come first, both axes alike"


def test_an_evaluation_is_drawn_once_with_its_own_features():
    objective = RetrievalObjective(LossConfig(), torch.device("cpu"))
    model = build_model(tiny()).eval()
    with torch.no_grad():
        figures = objective.evaluate(model, Scenes())
        images, texts = objective.encoded
        assert figures == retrieval_metrics(images, texts, torch.as_tensor(Scenes.text_image))
        drawn = objective.pictures(model, Scenes())
        assert set(drawn) == {"belief", "hard_negatives", "similarity"}
        worst = by_loop(images, texts, Scenes.text_image, Scenes.captions, 1)[0][0]
        shown = np.asarray(drawn["hard_negatives"])[:64, :64]
        assert (shown == Scenes().pixels([worst])[0].permute(1, 2, 0).numpy()).all()
        assert set(objective.pictures(model, Scenes())) == {"belief"}, "the features are those of an older model"


@pytest.mark.parametrize("kind", ["priorclip", "prioritr", "clip"])
def test_every_parameter_belongs_to_a_part(kind):
    names = [name for name, _ in build_model(tiny(kind)).named_parameters()]
    parts = {tower_of(name) for name in names}
    assert {"vision", "text", "scales"} <= parts
    assert "other" not in parts
    assert ("prior" in parts) == (kind != "clip")
    assert [tower_of(f"base_model.model.{name}.lora_A.default") for name in names] == [tower_of(name) for name in names]
    assert tower_of("adapter.weight") == "other"
