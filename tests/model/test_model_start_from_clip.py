"""A PriorCLIP that starts from a plain CLIP keeps its image features, also with fusion layers of another width."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from torch import Tensor

from priorclip.model import build_model
from priorclip.model.config import BeliefConfig, FusionConfig, ModelConfig
from priorclip.model.export.folder import load_weights, save_pretrained

IMAGES = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def without_belief(vision: str, width: int | None) -> ModelConfig:
    """No fusion layers and no belief: image feature = projection of norm(instruction + mean of the tokens)."""
    return tiny("priorclip", vision, fusion=FusionConfig(width=width, layers=0), belief=BeliefConfig(mode="none"))


def started(vision: str, width: int | None, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A plain CLIP with weights of its own, and a PriorCLIP that starts from its export folder."""
    torch.manual_seed(0)
    clip = build_model(tiny("clip", vision), vocab_size=70).eval()
    save_pretrained(clip.state_dict(), clip.config, folder)
    model = build_model(without_belief(vision, width), vocab_size=70).eval()
    load_weights(model, folder)
    return clip, model


def centred(x: Tensor) -> Tensor:
    """What a LayerNorm and an L2-norm leave of a feature, in float64."""
    x = x.double() - x.double().mean(1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("vision", ["resnet", "swin", "convnext"])
def test_image_features_of_stage_one_are_kept(vision: str, tmp_path: Path) -> None:
    """fusion.width = embed_dim. Without an instruction the feature is CLIP's, centred by the LayerNorm."""
    clip, model = started(vision, 16, tmp_path / "export")
    with torch.no_grad():
        model.visual.instruction.weight.zero_()
        model.visual.instruction.bias.zero_()
        pooled = clip.visual(IMAGES).double() @ clip.image_projection.weight.double().T
        found = model(images=IMAGES)["image_features"]
    torch.testing.assert_close(found.double(), centred(pooled), atol=2e-4, rtol=0)  # LayerNorm adds 1e-5 to variances
    assert centred(pooled).std(0).max() > 0.01, "the images must differ"
    for name, value in clip.text.state_dict().items():
        assert torch.equal(model.text.state_dict()[name], value)


def test_a_projection_that_fits_is_taken_as_it_is(tmp_path: Path) -> None:
    clip, model = started("resnet", None, tmp_path / "export")
    assert torch.equal(model.image_projection.weight, clip.image_projection.weight)


def test_a_projection_that_fits_nowhere_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, model = started("resnet", 24, tmp_path / "export")
    assert "fusion.width 24 is neither the backbone's width nor embed_dim 16" in caplog.text
    assert model.image_projection.weight.shape == (16, 24)


def test_another_embed_dim_is_still_refused(tmp_path: Path) -> None:
    clip = build_model(tiny("clip", "resnet"), vocab_size=70)
    save_pretrained(clip.state_dict(), clip.config, tmp_path / "export")
    other = tiny("priorclip", "resnet", embed_dim=24, fusion=FusionConfig(width=24, layers=0))
    with pytest.raises(ValueError, match="other shape"):
        load_weights(build_model(other, vocab_size=70), tmp_path / "export")
