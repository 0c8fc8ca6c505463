"""Export folders: they load without other files, errors name what does not fit, and a crash keeps the old folder."""

import json
import math

import pytest
import torch
from tiny_models import tiny
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor

from priorclip.data_shards import train_tokenizer
from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, SceneConfig
from priorclip.model.convert.positions import resampled
from priorclip.model.export import folder as export_folder
from priorclip.model.export.folder import from_pretrained, load_weights, save_pretrained
from priorclip.model.networks.priorclip import PriorCLIP
from priorclip.model.networks.scene_classifier import SceneClassifier


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return build_model(tiny(), vocab_size=70).eval()


@pytest.fixture
def folder(made, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "config.json").write_text("the tokenizer's own")
    (tokenizer / "model.safetensors").write_text("not these weights")
    figures = {"stage_two": {"mean_recall": 42.1234}, "seed": 3}
    return save_pretrained(made.state_dict(), made.config, tmp_path / "export", tokenizer, extra=figures)


@pytest.mark.parametrize("vision", ["vit", "registers", "swin", "eva"])
def test_weights_fit_another_image_size(vision, tmp_path):
    """Positions are resampled as in open_clip; all other weights are those saved."""
    small = build_model(tiny("clip", vision), vocab_size=70)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_(std=0.05)
    folder = save_pretrained(small.state_dict(), small.config, tmp_path / "export")
    config = tiny("clip", vision)
    config.vision.image_size = side = {"swin": 128, "eva": 84}.get(vision, 96)
    large = build_model(config, vocab_size=70)
    load_weights(large, folder)
    before, after = small.state_dict(), large.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert [name.rpartition(".")[2] for name in changed] == ([] if vision == "swin" else ["pos_embed"])
    for name in changed:
        old, new = before[name][0], after[name][0]
        class_token = len(old) - math.isqrt(len(old)) ** 2
        with_one = old if class_token else torch.cat([old[:1], old])
        wanted = resampled([with_one], torch.Size([len(new) + 1 - class_token, new.shape[1]]))
        torch.testing.assert_close(new, wanted[1 - class_token :])
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    assert large.eval()(images=images)["image_features"].isfinite().all()


def test_another_architecture_is_not_resampled(tmp_path):
    vit = build_model(tiny("clip"), vocab_size=70)
    folder = save_pretrained(vit.state_dict(), vit.config, tmp_path / "export")
    config = tiny("clip")
    config.vision.kwargs = {"embed_dim": 96}
    with pytest.raises(ValueError, match="other shape"):
        load_weights(build_model(config, vocab_size=70), folder)


def test_a_saved_model_loads_to_the_same_features(made, folder):
    loaded = from_pretrained(folder)
    assert type(loaded) is PriorCLIP
    assert not loaded.training
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ids, mask = torch.randint(1, 70, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    for key, value in made(images, ids, mask).items():
        assert torch.equal(loaded(images, ids, mask)[key], value), key
    assert from_pretrained(folder).config == loaded.config


def test_files_of_the_folder(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "tokenizer.json"}
    assert json.loads((folder / "config.json").read_text())["kind"] == "priorclip"
    card = (folder / "README.md").read_text()
    assert "stage_two.mean_recall | 42.12" in card
    assert json.loads((folder / "preprocessor_config.json").read_text())["crop_size"]["height"] == 64
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_limits_of_earlier_uses_of_a_tokenizer_are_left_out(made, tmp_path):
    """A tokenizer remembers its last call, and a processor of transformers prefers that to model_max_length."""
    long = "a river beside many planes " * 9
    words = train_tokenizer([long], tmp_path / "words", 300, 9)
    words([long], truncation=True, max_length=9, padding="max_length")
    words.save_pretrained(str(tmp_path / "used"))
    assert json.loads((tmp_path / "used" / "tokenizer.json").read_text())["truncation"]["max_length"] == 9
    export = save_pretrained(made.state_dict(), made.config, tmp_path / "export", tmp_path / "used")
    length = made.config.text.context_length
    for source, wanted in ((tmp_path / "used", 9), (export, length)):
        processor = CLIPProcessor(CLIPImageProcessor(), AutoTokenizer.from_pretrained(str(source)))
        assert len(processor(text=[long], truncation=True)["input_ids"][0]) == wanted


def test_no_path_of_this_machine_is_written(made, tmp_path):
    config = build_model(tiny()).config
    config.vision.weights = config.prior.weights = str(tmp_path / "somewhere.pth")
    config.text.name = config.text.weights = str(tmp_path)
    folder = save_pretrained(build_model(tiny()).state_dict(), config, tmp_path / "export")
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in text


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(made, tmp_path):
    state = made.state_dict()
    state["surplus"] = state.pop("logit_scale")
    with pytest.raises(ValueError, match="missing: logit_scale; unexpected: surplus"):
        save_pretrained(state, made.config, tmp_path / "export")
    state = made.state_dict() | {"logit_scale": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"other shape: logit_scale \(3,\), wanted \(1,\)"):
        save_pretrained(state, made.config, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_missing_keys_of_a_file_are_named(made, folder):
    from safetensors.torch import save_file

    state = made.state_dict()
    state.pop("text_projection.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors do not fit PriorCLIP: missing: text_projection\.weight"):
        from_pretrained(folder)


def test_a_crash_while_writing_leaves_the_old_export(made, folder, monkeypatch):
    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(export_folder, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(made.state_dict(), made.config, folder)
    assert type(from_pretrained(folder)) is PriorCLIP
    assert sorted(path.name for path in folder.parent.iterdir()) == ["export", "tokenizer"]


def test_saving_again_replaces(made, folder):
    state = made.state_dict() | {"logit_scale": torch.tensor([1.5])}
    save_pretrained(state, made.config, folder)
    assert from_pretrained(folder).logit_scale.item() == 1.5
    assert not (folder / "tokenizer.json").exists()


def test_folders_that_are_no_export_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"is no export folder: it has no config\.json"):
        from_pretrained(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(ValueError, match="is of format 99"):
        from_pretrained(folder)


def test_a_scene_classifier_becomes_the_prior_of_a_model(tmp_path):
    torch.manual_seed(0)
    backbone = EncoderConfig(name="test_resnet", image_size=32, mean=[0.2, 0.5, 0.7], std=[0.3, 0.2, 0.1])
    config = SceneConfig(backbone, classes=["airport", "beach", "river"])
    scene = SceneClassifier(config).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert scene(images).shape == (2, 3)
    folder = save_pretrained(scene.state_dict(), scene.config, tmp_path / "scene")
    loaded = from_pretrained(folder)
    assert loaded.classes == ["airport", "beach", "river"]
    assert torch.equal(loaded(images), scene(images))
    prior = EncoderConfig(name="test_resnet", image_size=32, weights=str(folder), trainable=False)  # with its mean, std
    clip = build_model(tiny(prior=prior))
    assert torch.equal(clip.prior(images), scene.features(images))
    other = EncoderConfig(name="test_convnext", image_size=32, weights=str(folder))
    with pytest.raises(ValueError, match="are those of 'test_resnet', but this encoder is 'test_convnext'"):
        build_model(tiny(prior=other))
    with pytest.raises(ValueError, match="needs the names of its classes"):
        SceneClassifier(SceneConfig())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_resnet", {}), ("test_convnext", {}), ("test_vit", {}), ("test_efficientnet", {}),
     ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4})],
)  # fmt: skip
def test_the_scores_of_scenes_are_the_instruction_where_the_projection_is_of_their_number(name, kwargs, tmp_path):
    torch.manual_seed(0)
    backbone = EncoderConfig(name=name, image_size=64, kwargs=kwargs)
    scene = SceneClassifier(SceneConfig(backbone, classes=["airport", "beach", "river"])).eval()
    torch.nn.init.normal_(scene.head.bias)
    folder = save_pretrained(scene.state_dict(), scene.config, tmp_path / "scene")
    settings = {"name": name, "image_size": 64, "kwargs": kwargs, "weights": str(folder), "trainable": False}
    prior = build_model(tiny(prior=EncoderConfig(**settings, projection=3))).eval().prior
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert prior.width == 3
    with torch.no_grad():
        torch.testing.assert_close(prior(images), scene(images))
    with pytest.raises(ValueError, match=r"do not fit .*other shape: .*\(3, .*wanted \(4, "):
        build_model(tiny(prior=EncoderConfig(**settings, projection=4)))


def test_encoder_weights_of_another_kind_of_export_are_refused(folder):
    with pytest.raises(ValueError, match="holds a 'priorclip' model; encoder weights are taken from a 'scene' export"):
        build_model(tiny(prior=EncoderConfig(name="test_convnext", image_size=32, weights=str(folder))))
