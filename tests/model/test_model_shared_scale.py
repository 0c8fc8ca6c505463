"""`model.shared_scale`: one temperature for contrastive and Attribution loss; what was stored before still loads."""

from __future__ import annotations

import math

import loss_reference as reference
import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

from priorclip.model.build import build_model
from priorclip.model.config import ModelConfig, from_dict, to_dict
from priorclip.model.export.folder import from_pretrained, save_pretrained
from priorclip.model.losses.retrieval_loss import RetrievalLoss

KINDS = ["priorclip", "prioritr", "clip"]


def built(kind: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return build_model(tiny(kind, **changes)).double()


def outputs_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's scales, with the features of a drawn batch, so that the losses do not depend on the encoders."""
    data = reference.batch()
    return {**model(), "image_features": data["image"], "text_features": data["text"]}


def losses(outputs: dict[str, Tensor], contrastive: float = 0.5, lambda_cs: float = 3.0) -> Tensor:
    data = reference.batch()
    return RetrievalLoss(contrastive, lambda_cs)(outputs, data["ids"], data["labels"])[0]


def log_scale_gradient(limit: float) -> tuple[float, float]:
    """The gradient of the sum of both losses in a log scale that both use, by the reference and by the model."""
    data = reference.batch()
    log_scale = torch.tensor(math.log(limit), dtype=torch.float64, requires_grad=True)
    image, text, scale = data["image"], data["text"], log_scale.exp()
    wanted = 0.5 * reference.contrastive(image, text, scale, data["ids"])
    wanted = wanted + 3 * reference.attribution(image, text, scale, data["labels"])
    model = built("clip", shared_scale=True, logit_scale_init=limit)
    losses(outputs_of(model)).backward()
    return torch.autograd.grad(wanted, log_scale)[0].item(), model.logit_scale.grad.item()


@pytest.mark.parametrize("kind", KINDS)
def test_both_losses_read_one_tensor(kind: str):
    model = built(kind, shared_scale=True, logit_scale_init=9.0, attribution_scale_init=4.0)
    outputs = model()
    assert outputs["attribution_scale"] is outputs["logit_scale"]
    assert outputs["logit_scale"].item() == pytest.approx(9, rel=1e-6)
    assert not model.attribution_scale.requires_grad
    losses(outputs_of(model)).backward()
    assert model.attribution_scale.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_each_loss_has_its_own(kind: str):
    model = built(kind, logit_scale_init=9.0, attribution_scale_init=4.0)
    losses(outputs_of(model)).backward()
    assert [model()[name].item() for name in ("logit_scale", "attribution_scale")] == pytest.approx([9, 4], rel=1e-6)
    assert model.logit_scale.grad != 0
    assert model.attribution_scale.grad != 0


@pytest.mark.parametrize("scale", [0.5, 7.0, 60.0])
def test_its_gradient_is_that_of_both_losses(scale: float):
    wanted, found = log_scale_gradient(scale)
    assert abs(wanted) > 1e-3
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_constant_scale_is_constant_for_both():
    model = built("clip", shared_scale=True, learn_logit_scale=False)
    assert not any(scale.requires_grad for scale in (model()["logit_scale"], model()["attribution_scale"]))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_fit_with_and_without(kind: str):
    """The names are the same, so a stored model can be trained on with one temperature."""
    apart, shared = built(kind), built(kind, shared_scale=True)
    shared.load_state_dict(apart.state_dict())
    apart.load_state_dict(shared.state_dict())


def test_an_export_keeps_the_option(tmp_path):
    model = build_model(tiny("clip", shared_scale=True))
    loaded = from_pretrained(save_pretrained(model.state_dict(), model.config, tmp_path / "model"))
    assert loaded.config.shared_scale
    outputs = loaded()
    assert outputs["attribution_scale"] is outputs["logit_scale"]


def test_a_configuration_from_before_reads_as_two_scales():
    before = to_dict(tiny())
    del before["shared_scale"]
    assert from_dict(ModelConfig, before) == tiny()
    assert not tiny().shared_scale
