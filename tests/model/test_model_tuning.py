"""Fine-tuning: learning rates by layer, frozen layers, adapters, cached features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_layer_decay
from tiny_models import BERT, tiny
from torch import nn

from priorclip.model import build_model, from_pretrained, parameter_groups, save_pretrained
from priorclip.model.config import EncoderConfig, LoraConfig, PAEConfig, TextConfig
from priorclip.model.encoders.feature_cache import FeatureCache
from priorclip.model.encoders.layers import layers_of
from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.lora import adapt, merge

IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0], [1, 3, 3, 2]])
MASK = (IDS > 0).long()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"])
def test_learning_rates_fall_as_in_timm(name: str) -> None:
    """timm's factors of the backbone alone give 1 to its last layer; here the layers after the backbone have 1."""
    encoder = ImageEncoder(EncoderConfig(name=name), pool=False)
    names = {id(parameter): name for name, parameter in encoder.model.named_parameters()}
    theirs, ours = {}, {}
    for group in param_groups_layer_decay(encoder.model, 0.1, ("pos_embed", "cls_token"), layer_decay=0.7):
        theirs |= {names[id(each)]: (group["lr_scale"], group["weight_decay"]) for each in group["params"]}
    for group in parameter_groups(nn.ModuleDict({"vision": encoder}), 0.1, lr=1.0, layer_decay=0.7):
        ours |= {names[id(each)]: (group["lr"] / 0.7, group["weight_decay"]) for each in group["params"]}
    assert len(ours) == len(names)
    for each, (scale, decay) in theirs.items():
        assert ours[each][0] == pytest.approx(scale), each
        assert ours[each][1] == decay or "relative_position_bias" in each, each
    assert len({scale for scale, _ in ours.values()}) > 10


def test_text_layers_are_counted_from_the_input() -> None:
    model = build_model(tiny("priorclip"))
    layers = layers_of(model.text.model)
    depth = {name: layer for name, layer in layers.items() if name.endswith("output.dense.weight")}
    assert layers["embeddings.word_embeddings.weight"] == 0
    assert sorted(set(layers.values())) == list(range(max(layers.values()) + 1))
    assert depth
    assert all(layer == int(name.split("layer.")[1].split(".")[0]) + 1 for name, layer in depth.items())


def test_without_decay_of_the_rate_there_are_two_groups_as_before() -> None:
    model = build_model(tiny("priorclip"))
    groups = parameter_groups(model, 0.2)
    assert [(group["name"], group["weight_decay"], "lr" in group) for group in groups] == [
        ("decay", 0.2, False), ("no_decay", 0.0, False)]  # fmt: skip
    decayed = parameter_groups(model, 0.2, lr=1e-3, layer_decay=0.5)
    assert decayed[0]["lr"] == 1e-3, "get_lr()[0], which is logged, is the run's own"
    count = sum(len(group["params"]) for group in groups)
    assert sum(len(group["params"]) for group in decayed) == count
    assert sum(len(group["params"]) > 0 for group in decayed) == len(decayed)


def test_locked_towers_train_their_last_layers_only() -> None:
    config = tiny("priorclip")
    config.vision.unlocked, config.text.unlocked = 1, 1
    config.text.config |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = build_model(config).train()
    for encoder in (model.visual.encoder, model.text):
        layers = layers_of(encoder.model)
        last = max(layers.values())
        trained = {name for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, layer in layers.items() if layer == last}
    states = [model.text.model.embeddings(IDS) for _ in range(2)]
    assert torch.equal(*states), "a locked layer has no dropout"
    loss = model(IMAGES, IDS, MASK)["text_features"].sum()
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.text.parameters())
    config.vision.unlocked = 99
    with pytest.raises(ValueError, match="layers"):
        build_model(config)


@pytest.mark.parametrize("missing", ["spatial", "temporal"])
def test_prior_itr_without_one_encoder_is_the_global_feature_there(missing: str) -> None:
    pae = PAEConfig(spatial_layers=missing != "spatial", temporal_cycles=missing != "temporal", heads=2, dropout=0.0)
    model = build_model(tiny("prioritr", pae=pae)).eval()
    outputs = model(IMAGES, IDS, MASK, return_belief=True)
    if missing == "spatial":
        expected = model.vision_projection(model.vision.tokens(IMAGES).pooled)
        assert torch.allclose(outputs["image_features"], nn.functional.normalize(expected, dim=-1), atol=1e-6)
        assert "belief" not in outputs
        assert not any(name.startswith("prior") for name, _ in model.named_parameters())
    else:
        expected = model.text.pool(model.text_projection(model.text(IDS, MASK)), MASK)
        assert torch.allclose(outputs["text_features"], nn.functional.normalize(expected, dim=-1), atol=1e-6)
        assert "belief" in outputs
    model.set_grad_checkpointing()


@pytest.mark.parametrize("kind", ["priorclip", "prioritr"])
def test_adapters_start_without_effect_train_alone_and_merge(kind: str, tmp_path: Path) -> None:
    plain = build_model(tiny(kind)).eval()
    adapted = build_model(tiny(kind)).eval()
    adapted.load_state_dict(plain.state_dict())
    lora = LoraConfig(rank=3, alpha=6)
    adapt(adapted, lora)
    with torch.no_grad():
        for name, value in plain(IMAGES, IDS, MASK).items():
            assert torch.allclose(adapted(IMAGES, IDS, MASK)[name], value, atol=1e-6), name
    inside = {n for n, p in adapted.named_parameters() if p.requires_grad and ".model." in n}
    assert inside
    assert all("lora_" in name for name in inside)
    assert any(p.requires_grad for n, p in adapted.named_parameters() if "projection" in n)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = adapted(IMAGES, IDS, MASK)
    merged = merge(adapted.state_dict(), plain.config, lora)
    assert merged.keys() == plain.state_dict().keys()
    save_pretrained(merged, plain.config, tmp_path / "export")
    with torch.no_grad():
        found = from_pretrained(tmp_path / "export")(IMAGES, IDS, MASK)
        before = plain(IMAGES, IDS, MASK)
    for name in ("image_features", "text_features"):
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
        assert not torch.allclose(found[name], before[name], atol=1e-3), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_locked_layers_have_no_adapter_and_every_adapter_learns(name: str) -> None:
    """EVA uses the weight of its qkv and never calls the layer, so an adapter there would learn nothing."""
    side = 70 if "14" in name else 64
    encoder = ImageEncoder(EncoderConfig(name=name, image_size=side, unlocked=2, kwargs={"img_size": side}), pool=False)
    adapt(encoder, LoraConfig(rank=2))
    layers = layers_of(encoder.model)
    adapters = {n: p for n, p in encoder.model.named_parameters() if p.requires_grad}
    assert {layers[each] for each in adapters} == {max(layers.values()) - 1, max(layers.values())}
    encoder(torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)).square().sum().backward()
    assert not [n for n, p in adapters.items() if "lora_B" in n and not p.grad.abs().max() > 0]


def test_lora_names_the_existing_layers() -> None:
    with pytest.raises(ValueError, match="qkv"):
        adapt(build_model(tiny("priorclip")), LoraConfig(rank=2, targets=["quarry"]))


@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_remembered_features_are_those_of_the_encoder(vision: str, tmp_path: Path) -> None:
    settings = tiny("priorclip", vision).vision
    settings.trainable = False
    torch.manual_seed(0)
    plain = ImageEncoder(settings, pool=False)
    settings.remember = str(tmp_path)
    plain.eval()
    first, second = ImageEncoder(settings, pool=False), ImageEncoder(settings, pool=False)
    first.load_state_dict(plain.state_dict())
    second.load_state_dict(plain.state_dict())
    twice = IMAGES[[0, 1, 0, 2]]
    assert torch.allclose(first(twice), plain(twice), atol=1e-6)
    files = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == 3, "each image once"
    second.model = nn.Identity()  # would be called if it were not remembered
    second.feature_cache.encoder = plain.model
    assert torch.equal(second(IMAGES), first(IMAGES))
    with torch.no_grad():
        next(plain.parameters()).add_(1)
    changed = FeatureCache(tmp_path, plain.model, first.feature_cache.facts)
    changed(lambda images: torch.zeros(len(images), 2), IMAGES)
    assert len(list(tmp_path.iterdir())) == 2, "other weights remember elsewhere"


def test_images_that_were_written_to_are_other_images_for_the_cache(tmp_path: Path) -> None:
    """Vision encoder and prior share the hashes of a tensor; a change of the tensor must void them."""
    settings = tiny("priorclip").vision
    settings.trainable, settings.remember = False, str(tmp_path)
    encoder = ImageEncoder(settings, pool=False).eval()
    images = torch.rand(2, *IMAGES.shape[1:])
    before = encoder(images).clone()
    assert torch.equal(encoder(images), before)
    images[0] = 1 - images[0]
    after = encoder(images)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    with torch.inference_mode():
        again = images.clone()
        assert torch.equal(encoder(again), after)
        again[0] = 1 - again[0]
        assert torch.allclose(encoder(again), before, atol=1e-6)


def test_only_frozen_encoders_remember() -> None:
    with pytest.raises(ValueError, match="trainable"):
        EncoderConfig(remember="features")
    with pytest.raises(ValueError, match="trainable"):
        TextConfig(remember="features")


@pytest.mark.parametrize("remember", [False, True])
def test_a_frozen_text_encoder_has_no_dropout_from_the_first_step_on(remember: bool, tmp_path: Path) -> None:
    """transformers creates models in training mode, and a run calls train() only after its first evaluation."""
    noisy = {**BERT, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    torch.manual_seed(0)
    text = TextConfig(config=noisy, context_length=4, trainable=False, remember=str(tmp_path) if remember else None)
    model = build_model(tiny("priorclip", text=text))
    first = model.text(IDS, MASK)
    assert model.training, "the rest is"
    torch.testing.assert_close(first, model.eval().text.states(IDS, MASK))
    partly = build_model(tiny("priorclip", text=TextConfig(config=noisy, context_length=4, unlocked=1)))
    modes = {name: module.training for name, module in partly.text.model.named_modules() if name.endswith("dropout")}
    last = max(int(name.split(".")[2]) for name in modes if "layer." in name)
    assert modes == {name: f"layer.{last}." in name for name in modes}
    if remember:
        model.text.model.train()
        with pytest.raises(ValueError, match="remember: BertModel is in training mode"):
            model.text(IDS, MASK)
