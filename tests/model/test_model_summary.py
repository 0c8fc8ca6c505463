"""Compares the parameter tables of the presets with counts of the reference implementations."""

import json

import pytest
import torch
from tiny_models import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from priorclip.model.__main__ import main
from priorclip.model.build import build_model
from priorclip.model.cost.flops import count_flops, total_flops
from priorclip.model.cost.summary import Row, pair_flops, summarise
from priorclip.model.presets import load_preset


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


def rows(preset: str) -> dict[str, Row]:
    return {row.part: row for row in summarise(load_preset(preset))}


@pytest.mark.parametrize(("preset", "name"), [
    ("priorclip-b32", "ViT-B-32-quickgelu"), ("priorclip-b16", "ViT-B-16-quickgelu"),
    ("priorclip-l14", "ViT-L-14-quickgelu"),
])  # fmt: skip
def test_the_towers_have_the_sizes_of_open_clips(preset: str, name: str):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        peer = open_clip.create_model(name, device="meta")
    found = rows(preset)
    total = found["all"].trained + found["all"].frozen
    ours = total - found["prior"].frozen - found["instruction"].trained - 1  # the attribution scale
    assert ours == count(peer)


def test_the_closed_domain_preset_has_the_sizes_of_its_encoders():
    found = rows("prioritr")
    assert round(found["vision"].trained / 1e6, 2) == 27.52  # timm's Swin-T without its classifier
    assert round(found["prior"].frozen / 1e6, 2) == 23.51  # ResNet-50 without
    assert round(found["text"].trained / 1e6, 2) == 108.89  # BERT-base without its pooler
    assert found["prior"].trained == 0
    assert found["Temporal-PAE"].trained * 2 == found["Spatial-PAE"].trained * 3  # 3 cycles, 2 layers


def test_flops_of_the_vision_tower_are_those_of_its_matrix_products():
    width, tokens, layers = 768, 51, 12  # instruction, class and 49 patches
    patches = 2 * 49 * (3 * 32 * 32) * width
    products = layers * 2 * tokens * 12 * width**2
    attention = layers * 2 * 2 * tokens**2 * width
    belief = 2 * 49 * width
    assert rows("priorclip-b32")["vision"].image_flops == patches + products + attention + belief


@pytest.mark.parametrize("preset", ["priorclip-tiny", "prioritr-tiny"])
def test_parts_add_up_to_the_whole(preset: str):
    found = rows(preset)
    whole = found.pop("all")
    for name in ("trained", "frozen"):
        assert getattr(whole, name) == sum(getattr(row, name) for row in found.values()) > 0
    outside = 2 * 9 * 192  # belief: the product of the instruction with 3 x 3 tokens, in no module of its own
    for name in ("image_flops", "text_flops"):
        missing = getattr(whole, name) - sum(getattr(row, name) for row in found.values())
        assert 0 <= missing <= outside


def test_the_command_prints_markdown_and_json(capsys):
    assert main(["summary", "--preset", "priorclip-tiny"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1] == "|---|---:|---:|---:|---:|---:|"
    assert table[-1].startswith("| all | 2.41 |")
    assert main(["summary", "--preset", "priorclip-tiny", "--format", "json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert parts[-1]["trained"] + parts[-1]["frozen"] == pytest.approx(2.41e6, rel=0.01)
    assert main(["summary", "--preset", "priorclip-b23"]) == 2
    assert "did you mean 'priorclip-b32'" in capsys.readouterr().err


@pytest.mark.parametrize("trained", [False, True])
def test_flops_of_training_are_those_of_a_real_step(trained):
    config = tiny()
    config.prior.trainable = trained
    model = build_model(config).train()
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    tokens = torch.ones(4, 20, dtype=torch.long)
    # The fused kernel computes the scores again in its backward pass, which is no work of the model.
    with sdpa_kernel(SDPBackend.MATH), count_flops() as counter:
        outputs = model(images, tokens, torch.ones_like(tokens))
        (outputs["image_features"].sum() + outputs["text_features"].sum()).backward()
    assert pair_flops(model.config, 64) == pytest.approx(total_flops(counter) / 4, rel=1e-9)
    assert model.config.prior.trainable == trained
