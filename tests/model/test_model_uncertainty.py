"""Images and texts as distributions: the loss against slow versions, what it learns, and the model's variances."""

from __future__ import annotations

from pathlib import Path

import loss_reference as reference
import pytest
import torch
from tiny_models import tiny
from torch.nn.functional import normalize

from priorclip.model.build import build_model
from priorclip.model.config import LossConfig, ModelConfig, add_bias
from priorclip.model.export.folder import from_pretrained, load_weights, save_pretrained
from priorclip.model.losses.probabilistic import as_products
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.losses.sigmoid import SigmoidLoss
from priorclip.model.networks.uncertainty import START, means_only

GENERATOR = torch.Generator().manual_seed(3)
PIXELS = torch.rand(4, 3, 64, 64, generator=GENERATOR)
WORDS = torch.randint(4, 60, (4, 9), generator=GENERATOR)


@pytest.mark.parametrize("chunk", [1, 5, 4096])
@pytest.mark.parametrize("knows_words", [True, False])
def test_the_loss_equals_the_reference(chunk: int, knows_words: bool) -> None:
    data = reference.batch(12, 7)
    (image, of_image), (text, of_text) = reference.halves(data["image"]), reference.halves(data["text"])
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    leaves = [each.detach().requires_grad_() for each in (image, of_image, text, of_text, scale, bias)]
    captions = data["captions"] if knows_words else None
    mu, u, nu, v, s, b = leaves
    found = SigmoidLoss(chunk)(*as_products(mu, nu, u, v, s, b), data["ids"], captions)
    expected = reference.probabilistic(*leaves, data["ids"], captions)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs, leaf in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), leaves, strict=True
    ):
        if leaf.ndim == 2:  # a mean, whose length does not change
            mine, theirs = (each - (each * leaf).sum(1, keepdim=True) * leaf for each in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_the_distance_is_that_of_samples() -> None:
    """The mean squared distance of 200,000 samples of two normal distributions."""
    mu, nu = normalize(torch.randn(2, 5, generator=GENERATOR, dtype=torch.float64), dim=1)
    sigma, tau = torch.rand(2, 5, generator=GENERATOR, dtype=torch.float64)
    drawn = torch.randn(2, 200_000, 5, generator=GENERATOR, dtype=torch.float64)
    samples = ((mu + sigma * drawn[0]) - (nu + tau * drawn[1])).square().sum(1).mean()
    one = torch.ones(1, dtype=torch.float64)
    u, v = sigma.square().sum().view(1), tau.square().sum().view(1)
    # One pair, which is right: the loss is -log sigmoid(-distance).
    loss = SigmoidLoss()(*as_products(mu[None], nu[None], u, v, one[0], 0 * one[0]), torch.arange(1))
    distance = torch.log(torch.expm1(loss))
    assert distance.item() == pytest.approx(samples.item(), rel=0.01)


def test_a_caption_of_many_images_becomes_unsure() -> None:
    """Eight images share a caption, eight have their own. Only the loss tells the variances which is which."""
    torch.manual_seed(0)
    captions = torch.tensor([0] * 8 + list(range(1, 9)))
    image = torch.nn.Parameter(torch.randn(16, 16))
    text, logs = torch.nn.Parameter(torch.randn(9, 16)), torch.nn.Parameter(torch.full((9,), -2.0))
    scale, bias = torch.tensor(5.0), torch.tensor(5.0)
    optimizer = torch.optim.Adam([image, text, logs], lr=0.1)
    for _ in range(600):
        nothing = torch.zeros(16)
        unit = normalize(image, dim=1), normalize(text, dim=1)[captions]
        loss = SigmoidLoss()(*as_products(*unit, nothing, logs.exp()[captions], scale, bias), torch.arange(16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unsure = logs.detach().exp()
    assert unsure[0] > 2 * unsure[1:].max()


@pytest.mark.parametrize("kind", ["priorclip", "prioritr", "clip"])
def test_variances_of_a_model_and_of_its_export(kind: str, tmp_path: Path) -> None:
    config = tiny(kind)
    add_bias(config, LossConfig(kind="probabilistic"))
    model = build_model(config).eval()
    outputs = model(PIXELS, WORDS)
    for name in ("image_uncertainty", "text_uncertainty"):
        assert outputs[name].shape == (4,)
        assert outputs[name].min() > 0
        torch.testing.assert_close(outputs[name].mean(), torch.tensor(START), rtol=0.2, atol=0)
    loss, _ = RetrievalLoss(kind="probabilistic")(outputs, torch.arange(4))
    slow = reference.probabilistic(
        outputs["image_features"], outputs["image_uncertainty"], outputs["text_features"], outputs["text_uncertainty"],
        outputs["logit_scale"], outputs["logit_bias"], torch.arange(4),
    )  # fmt: skip
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-5)
    loss.backward()
    heads = {name: each.grad for name, each in model.named_parameters() if name.startswith("uncertainty.")}
    assert len(heads) == 8
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in heads.values())
    again = from_pretrained(save_pretrained(model.state_dict(), model.config, tmp_path / "export"))
    torch.testing.assert_close(again(PIXELS, WORDS)["image_uncertainty"], outputs["image_uncertainty"])
    # Another loss leaves the heads alone, but ZeRO finds a gradient of each.
    model.zero_grad()
    RetrievalLoss()(model(PIXELS, WORDS), torch.arange(4))[0].backward()
    assert all(each.grad is not None and each.grad.abs().max() == 0 for each in model.uncertainty.parameters())


def test_what_the_loss_needs_is_said() -> None:
    model = build_model(tiny(logit_bias_init=5.0)).eval()
    with pytest.raises(ValueError, match=r"model\.uncertainty true"):
        RetrievalLoss(kind="probabilistic")(model(PIXELS, WORDS), torch.arange(4))
    with pytest.raises(ValueError, match=r"loss\.kind is probabilistic"):
        LossConfig(kind="probabilistic", hard_negatives=0.1)
    given = ModelConfig(logit_bias_init=2.0)
    add_bias(given, LossConfig(kind="probabilistic"))
    assert (given.logit_bias_init, given.uncertainty) == (2.0, True)


def test_a_model_starts_from_one_without_variances_and_back(tmp_path: Path) -> None:
    plain, unsure = build_model(tiny("clip")), build_model(tiny("clip", uncertainty=True, logit_bias_init=5.0))
    save_pretrained(plain.state_dict(), plain.config, tmp_path / "plain")
    save_pretrained(unsure.state_dict(), unsure.config, tmp_path / "unsure")
    head = unsure.uncertainty.text.linear.weight.clone()
    load_weights(unsure, tmp_path / "plain")
    assert torch.equal(unsure.uncertainty.text.linear.weight, head)
    assert torch.equal(unsure.text_projection.weight, plain.text_projection.weight)
    without = build_model(tiny("clip", logit_bias_init=5.0))
    load_weights(without, tmp_path / "unsure")
    # The fusion layer of a PriorCLIP has another width than the vision encoder of the CLIP that it starts from.
    prior = build_model(tiny(uncertainty=True, logit_bias_init=5.0, vision="resnet"))
    clip = build_model(tiny("clip", uncertainty=True, logit_bias_init=5.0, vision="resnet"))
    save_pretrained(clip.state_dict(), clip.config, tmp_path / "clip")
    assert clip.uncertainty.image.linear.in_features != prior.uncertainty.image.linear.in_features
    load_weights(prior, tmp_path / "clip")


def test_formats_without_variances_get_the_logits_of_the_means(tmp_path: Path) -> None:
    model = build_model(tiny("clip", uncertainty=True, logit_bias_init=5.0, logit_scale_init=6.0)).eval()
    means = means_only(model)
    assert model.uncertainty is not None
    assert means.uncertainty is None
    outputs, theirs = model(PIXELS, WORDS), means(PIXELS, WORDS)
    distance = (outputs["image_features"][:, None] - outputs["text_features"]).square().sum(-1)
    logits = theirs["logit_scale"] * theirs["image_features"] @ theirs["text_features"].T + theirs["logit_bias"]
    torch.testing.assert_close(logits, outputs["logit_bias"] - outputs["logit_scale"] * distance, rtol=0, atol=1e-4)
    assert means_only(means) is means
