"""Belief maps: the maps that a model returns, and their pictures."""

import numpy as np
import pytest
import torch
from tiny_models import tiny

from priorclip.model.build import build_model
from priorclip.model.config import BeliefConfig, LossConfig
from priorclip.model.objective import RetrievalObjective
from priorclip.model.pictures.belief_maps import belief_panel, brightness, paint_belief


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "vision", "grid"), [
    ("priorclip", "vit", (4, 4)), ("priorclip", "swin", (8, 8)), ("priorclip", "resnet", (2, 2)),
    ("prioritr", "vit", (4, 4)), ("prioritr", "swin", (8, 8)),
])  # fmt: skip
def test_belief_comes_with_the_features_on_request(kind, vision, grid):
    model = build_model(tiny(kind, vision)).eval()
    with torch.no_grad():
        plain, asked = model(pixels()), model(pixels(), return_belief=True)
    assert "belief" not in plain
    assert torch.equal(plain["image_features"], asked["image_features"])
    assert asked["belief"].shape == (2, *grid)
    torch.testing.assert_close(asked["belief"].flatten(1).sum(1), torch.ones(2))
    assert not torch.allclose(asked["belief"][0], asked["belief"][1])


@pytest.mark.parametrize("kind", ["priorclip", "prioritr"])
def test_belief_is_the_same_whatever_the_mode_makes_of_it(kind):
    models = [build_model(tiny(kind, belief=belief)).eval() for belief in (
        BeliefConfig(), BeliefConfig(mode="hard", k=3), BeliefConfig(mode="none"), BeliefConfig(compat="released"),
    )]  # fmt: skip
    first = models[0].belief_map(pixels())
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        torch.testing.assert_close(model.belief_map(pixels()), first)


def test_belief_of_a_place_is_where_that_place_is():
    """Row-major, not transposed: a change in one patch of the image changes the belief of that place only."""
    model = build_model(tiny()).eval()
    images = torch.full((2, 3, 64, 64), 90, dtype=torch.uint8)
    images[1, :, 16:32, 48:64] = 200  # second row, fourth column of patches of 16 pixels
    tokens = model.visual.encoder.model(model.visual.encoder.normalise(images), None, None, embed_only=True)
    changed = (tokens[0] - tokens[1]).abs().sum(-1)[model.visual.encoder.model.num_prefix_tokens :].view(4, 4)
    assert changed.nonzero().tolist() == [[1, 3]]
    same_prior = torch.ones(2, model.prior.width)
    belief = model.visual.belief_map(images, same_prior).log()
    moved = (belief[0] - belief[1]).flatten()
    moved = (moved - moved.median()).view(4, 4).abs()  # the softmax shifts all others alike
    assert moved.argmax() == 7
    assert (moved > 1e-4).sum() == 1


def hottest(picture) -> tuple[int, int]:
    colour = np.asarray(picture).astype(int)
    warmth = colour[..., 0] - colour[..., 2]
    return tuple(int(place) for place in np.unravel_index(warmth.argmax(), warmth.shape))


def test_the_brightest_place_of_the_picture_is_that_of_highest_belief():
    belief = torch.full((7, 7), 0.01)
    belief[1, 5] = 0.52
    row, column = hottest(paint_belief(torch.full((3, 70, 140), 128, dtype=torch.uint8), belief))
    assert 10 <= row < 20
    assert 100 <= column < 120


def test_an_even_belief_is_painted_evenly_in_the_middle_of_the_scale():
    even = brightness(torch.full((3, 4), 1 / 12) + torch.linspace(-1e-7, 1e-7, 12).view(3, 4))
    torch.testing.assert_close(even, torch.full((3, 4), 0.5), atol=1e-4, rtol=0)
    picture = np.asarray(paint_belief(torch.full((3, 20, 20), 128, dtype=torch.uint8), torch.full((5, 5), 0.04)))
    assert (picture == picture[0, 0]).all()


def test_what_is_no_image_is_refused():
    for image, belief in ((torch.rand(3, 8, 8), torch.ones(2, 2)), (torch.zeros(3, 8, 8).byte(), torch.ones(4))):
        with pytest.raises(ValueError, match="a picture takes an image uint8"):
            paint_belief(image, belief)


def test_a_panel_has_each_image_above_its_belief():
    images = pixels(3)
    panel = belief_panel(images, torch.rand(3, 4, 4), gap=2)
    assert panel.size == (3 * 66 - 2, 130)
    assert (np.asarray(panel)[:64, 66:130] == images[1].permute(1, 2, 0).numpy()).all()
    assert not (np.asarray(panel)[66:, 66:130] == images[1].permute(1, 2, 0).numpy()).all()


class HeldOut:
    """Batches of three images; the second is padding."""

    def images(self):
        yield {"images": pixels(3), "index": torch.tensor([0, -1, 1])}
        raise AssertionError("more than one batch is read")


def test_the_pictures_of_an_evaluation_are_of_held_out_images_without_padding():
    objective = RetrievalObjective(LossConfig(), torch.device("cpu"))
    picture = objective.pictures(build_model(tiny()).eval(), HeldOut())["belief"]
    assert picture.size == (2 * 68 - 4, 132)
    assert (np.asarray(picture)[:64, 68:] == pixels(3)[2].permute(1, 2, 0).numpy()).all()
    assert objective.pictures(build_model(tiny("clip")).eval(), HeldOut()) == {}  # no prior, no belief
