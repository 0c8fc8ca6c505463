"""The parameter tables of the presets, against counts of the reference implementations."""

import pytest
import torch

from model.build import build_model
from model.config import load_preset


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_released_architecture_has_the_size_of_the_authors_checkpoint():
    with torch.device("meta"):
        model = build_model(load_preset("priorclip-b32-released"))
    assert round(count(model) / 1e6, 1) == 188.9
    # A CLIP ResNet-50 with attention pooling to 512, and a linear layer with bias from there to the ViT's width.
    assert model.prior.width == 512
    assert count(model.visual.instruction) == 512 * 768 + 768
    # What is left is CLIP ViT-B/32, of 151.28 M parameters, and the scale of the Attribution loss.
    assert count(model) - count(model.prior) - count(model.visual.instruction) - 1 == 151_277_313


def test_a_projection_is_for_priors_alone():
    config = load_preset("priorclip-b32-released")
    config.vision.projection = 512
    with torch.device("meta"), pytest.raises(ValueError, match="only a prior"):
        build_model(config)
