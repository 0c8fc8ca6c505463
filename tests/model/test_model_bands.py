"""Encoders of bands start as the encoders of colours that they were, normalise by band, and survive an export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import VISION, tiny

from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, ModelConfig, SceneConfig
from priorclip.model.cost.flops import training_flops
from priorclip.model.cost.summary import forward_flops
from priorclip.model.encoders.bands import widened_kernel
from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.export.folder import from_pretrained, load_weights, save_pretrained
from priorclip.model.export.to_onnx import export_onnx
from priorclip.model.export.to_open_clip import export_open_clip
from priorclip.model.export.to_transformers import export_transformers
from priorclip.model.export_config import read_export_config
from priorclip.model.networks.scene_classifier import SceneClassifier
from priorclip.model.pictures.colours import in_colours
from priorclip.model.without_memory import without_memory

BANDS = ["nir", "red", "green", "blue"]
MEAN, STD = [2400.0, 800.0, 700.0, 600.0], [1200.0, 300.0, 250.0, 200.0]


def banded(name: str = "test_vit", size: int = 64, **more) -> EncoderConfig:
    return EncoderConfig(**{"name": name, "image_size": size, "bands": BANDS, "mean": MEAN, "std": STD, **more})


def measured(count: int = 2, size: int = 64) -> torch.Tensor:
    draw = torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(0))
    return draw * torch.tensor(STD).view(4, 1, 1) + torch.tensor(MEAN).view(4, 1, 1)


def banded_model(**changes) -> ModelConfig:
    prior = EncoderConfig("test_convnext", image_size=32, trainable=False, bands=["red", "nir"],
                          mean=[800.0, 2400.0], std=[300.0, 1200.0])  # fmt: skip
    return tiny(vision=banded(), prior=prior, **changes)


def test_a_band_without_deviation_adds_nothing() -> None:
    kernel, images = torch.randn(8, 3, 3, 3), torch.randn(2, 4, 9, 9)
    images[:, 0] = 0
    found = F.conv2d(images, widened_kernel(kernel, BANDS, "meaning"))
    assert torch.allclose(found, F.conv2d(images[:, 1:], kernel), atol=1e-5)


def test_other_bands_start_from_the_mean_and_repeat_is_timms_way() -> None:
    kernel = torch.randn(8, 3, 3, 3)
    wide = widened_kernel(kernel, ["Blue", "swir1", "red", "nir", "green"], "meaning")
    expected = [kernel[:, 2], kernel.mean(1), kernel[:, 0], kernel.mean(1), kernel[:, 1]]
    assert torch.equal(wide, torch.stack(expected, 1))
    repeated = widened_kernel(kernel, BANDS, "repeat")
    assert torch.allclose(repeated, torch.cat([kernel, kernel[:, :1]], 1) * 3 / 4)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_encoder_of_bands_starts_as_that_of_colours(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=0, **({"img_size": 64} if name == "test_vit" else {}))
    save_file(source.state_dict(), tmp_path / "rgb.safetensors")
    images = measured()
    images[:, 0] = MEAN[0]
    encoder = ImageEncoder(banded(name, weights=str(tmp_path / "rgb.safetensors")), pool=True).eval()
    colours = (images[:, 1:] - torch.tensor(MEAN[1:]).view(3, 1, 1)) / torch.tensor(STD[1:]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(encoder(images), source.eval()(colours), atol=1e-4)
        images[:, 0] += 500
        assert not torch.allclose(encoder(images), source(colours), atol=1e-2)


def test_values_are_normalised_by_band_also_in_half_precision() -> None:
    encoder, images = ImageEncoder(banded(), pool=True).eval(), measured()
    expected = (images.numpy() - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert encoder.normalise(images).numpy() == pytest.approx(expected, abs=1e-4)
    assert encoder.bfloat16().normalise(images).float().numpy() == pytest.approx(expected, abs=2e-2)


def test_the_prior_reads_its_bands_of_the_batch_by_name() -> None:
    torch.manual_seed(0)
    model = build_model(banded_model()).eval()
    alone = ImageEncoder(model.config.prior, pool=True).eval()
    alone.load_state_dict(model.prior.state_dict())
    images = measured()
    with torch.no_grad():
        assert torch.equal(model.prior(images), alone(images[:, [1, 0]]))
        first = model(images)["image_features"]
        images[:, 3] += 100  # blue, which only the vision encoder reads
        assert torch.equal(model.prior(images), alone(images[:, [1, 0]]))
        assert not torch.equal(model(images)["image_features"], first)


def test_an_export_keeps_bands_mean_and_deviation(tmp_path: Path) -> None:
    model = build_model(banded_model()).eval()
    save_pretrained(model.state_dict(), model.config, tmp_path / "export")
    stored = json.loads((tmp_path / "export/config.json").read_text())
    assert [stored["vision"][name] for name in ("bands", "mean", "std")] == [BANDS, MEAN, STD]
    assert stored["prior"]["bands"] == ["red", "nir"]
    assert not (tmp_path / "export/preprocessor_config.json").exists()
    assert "nir, red, green, blue" in (tmp_path / "export/README.md").read_text()
    with torch.no_grad():
        loaded = from_pretrained(tmp_path / "export")(measured())["image_features"]
        assert torch.equal(loaded, model(measured())["image_features"])
    for write, form in ((export_transformers, "transformers"), (export_open_clip, "open_clip")):
        with pytest.raises(ValueError, match=f"--format {form} holds models of red, green and blue.*nir"):
            write(model, tmp_path / "out", tmp_path / "export")


def test_onnx_takes_measured_values(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (tmp_path / "tokenizer").mkdir()
    model = build_model(tiny("clip", vision=banded("test_resnet"))).eval()
    save_pretrained(model.state_dict(), model.config, tmp_path / "export", tmp_path / "tokenizer")
    export_onnx(model, tmp_path / "out", tmp_path / "export")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/image.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": measured(3).numpy()})
    with torch.no_grad():
        expected = model(measured(3))["image_features"].numpy()
    assert found == pytest.approx(expected, abs=1e-5)
    assert json.loads((tmp_path / "out/onnx.json").read_text())["bands"] == BANDS


def test_a_model_of_bands_starts_from_an_export_of_colours(tmp_path: Path) -> None:
    colours = build_model(tiny("clip")).eval()
    save_pretrained(colours.state_dict(), colours.config, tmp_path / "rgb")
    for bands in (BANDS, ["blue", "nir", "red"]):
        vision = EncoderConfig("test_vit", image_size=64, bands=bands, mean=[0.5] * len(bands), std=[0.5] * len(bands))
        model = build_model(tiny("clip", vision=vision)).eval()
        load_weights(model, tmp_path / "rgb")
        kernel = colours.visual.encoder.model.patch_embed.proj.weight
        places = {"red": kernel[:, 0], "green": kernel[:, 1], "blue": kernel[:, 2], "nir": kernel.mean(1)}
        found = model.visual.encoder.model.patch_embed.proj.weight
        assert torch.equal(found, torch.stack([places[band] for band in bands], 1))
    save_pretrained(model.state_dict(), model.config, tmp_path / "bands")
    for other, message in (
        (tiny("clip", vision=banded()), "reads the bands blue, nir, red, but the model nir, red, green, blue"),
        (tiny("clip"), "reads the bands blue, nir, red, but the model pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(build_model(other), tmp_path / "bands")


def test_a_scene_prior_of_bands_brings_its_normalisation(tmp_path: Path) -> None:
    backbone = banded("test_resnet", size=32)
    classifier = SceneClassifier(SceneConfig(backbone=backbone, classes=["a", "b"])).eval()
    save_pretrained(classifier.state_dict(), classifier.config, tmp_path / "prior")
    prior = EncoderConfig("test_resnet", image_size=32, bands=BANDS, weights=str(tmp_path / "prior"), trainable=False)
    model = build_model(tiny(vision=banded(), prior=prior)).eval()
    assert (model.config.prior.mean, model.config.prior.std) == (MEAN, STD)
    with torch.no_grad():
        assert torch.equal(model.prior(measured()), classifier.features(measured()))
    prior.take_statistics({}, "stats.json")  # the export has its own
    other = EncoderConfig("test_resnet", image_size=32, bands=BANDS[::-1], weights=str(tmp_path / "prior"),
                          mean=MEAN, std=STD)  # fmt: skip
    with pytest.raises(ValueError, match="read the bands nir, red, green, blue, but this encoder reads blue"):
        ImageEncoder(other, pool=True)


def test_statistics_fill_what_is_null() -> None:
    encoder = EncoderConfig("test_vit", bands=["red", "nir"])
    with pytest.raises(ValueError, match=r"need their mean and deviation: --data\.statistics"):
        ImageEncoder(encoder, pool=True)
    with pytest.raises(ValueError, match="no statistics of the band nir; it has: red"):
        encoder.take_statistics({"red": (1.0, 2.0)}, "stats.json")
    encoder.take_statistics({"nir": (5.0, 6.0), "red": (1.0, 2.0), "blue": (0.0, 1.0)}, "stats.json")
    assert (encoder.mean, encoder.std) == ([1.0, 5.0], [2.0, 6.0])
    encoder.take_statistics({"red": (7.0, 7.0), "nir": (7.0, 7.0)}, "stats.json")
    assert encoder.mean == [1.0, 5.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bands": []}, "bands must be different names"),
        ({"bands": ["a", "a"]}, "bands must be different names"),
        ({"bands": ["a"], "mean": [0.1, 0.2, 0.3]}, "mean must have 1 numbers, one a channel, or null"),
        ({"bands": ["a"], "std": [0.0]}, "std must be above 0"),
        ({"bands": ["a"], "kwargs": {"in_chans": 1}}, "kwargs.in_chans contradicts bands"),
        ({"band_start": "zero"}, "band_start must be meaning or repeat"),
    ],
)
def test_wrong_options_of_an_encoder_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig("test_vit", **wrong)


def test_vision_and_prior_must_agree() -> None:
    with pytest.raises(ValueError, match=r"model.vision.bands are given and model.prior.bands are null"):
        tiny(vision=banded())
    with pytest.raises(ValueError, match=r"model.prior.bands: swir1 is not in model.vision.bands"):
        tiny(vision=banded(), prior=EncoderConfig("test_vit", bands=["red", "swir1"]))
    assert tiny("clip", vision=banded()).prior.bands is None
    model = build_model(tiny("clip", vision=banded()))
    for images in (torch.zeros(1, 4, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 64, 64)):
        with pytest.raises(ValueError, match="reads measured values of nir, red, green, blue, not"):
            model(images)


def test_bands_of_an_untrusted_export_are_checked(tmp_path: Path) -> None:
    model = build_model(tiny("clip", vision=banded()))
    save_pretrained(model.state_dict(), model.config, tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for bands, message in (
        ([1, 2, 3, 4], "'vision.bands' is 1, not str"),
        ("nir", "'vision.bands' is 'nir'"),
        ([f"b{number}" for number in range(2000)], "2000 bands, limit 1024"),
    ):
        stored["vision"] |= {"bands": bands, "mean": None, "std": None}
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=message):
            read_export_config(tmp_path)


def test_costs_count_the_channels() -> None:
    colours = EncoderConfig(**{**vars(VISION["vit"]), "bands": ["red", "green", "blue"], "mean": MEAN[1:],
                               "std": STD[1:]})  # fmt: skip
    with without_memory():
        models = [build_model(tiny("clip", vision=each)) for each in (banded(), colours)]
    found = [forward_flops(model)[0][""] for model in models]
    proj = models[0].visual.encoder.model.patch_embed.proj
    places = (64 // proj.kernel_size[0]) ** 2
    assert found[0] - found[1] == 2 * places * proj.out_channels * proj.kernel_size[0] ** 2
    assert training_flops(lambda: SceneClassifier(SceneConfig(banded("test_resnet"), ["a", "b"])), 64, bands=BANDS) > 0


def test_pictures_show_red_green_and_blue() -> None:
    ramp = torch.linspace(0, 3000, 256).view(1, 1, 16, 16)
    images = torch.cat([ramp * 0 + 7, ramp, ramp.flip(-1), ramp * 2], 1)
    found = in_colours(images, BANDS)
    assert (found.dtype, found.shape) == (torch.uint8, (1, 3, 16, 16))
    expected = ((ramp - 60) / (2940 - 60) * 255).round().clamp(0, 255).to(torch.uint8)
    assert (found[:, :1].int() - expected.int()).abs().max() <= 1
    assert torch.equal(found[:, 0], found[:, 2])
    assert torch.equal(in_colours(images, ["a", "b", "c", "d"])[:, 1], found[:, 0])
    assert torch.equal(in_colours(found, None), found)
