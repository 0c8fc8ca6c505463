"""open_clip and we read each other's folders: with any tokenizer, heads and activation, features are the same."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import open_clip
import pytest
import torch
from foreign_models import images, normalised, texts, tiny_open_clip
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from priorclip.data_shards import train_tokenizer
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.tokenizer import load_tokenizer
from priorclip.model import build_model, from_pretrained, save_pretrained
from priorclip.model.__main__ import main
from priorclip.model.config import EncoderConfig, ModelConfig, TextConfig

SENTENCES = ["four white storage tanks beside a river", "a river", "many planes near a long terminal building " * 9]


def plain_clip(entries, end, length, positions=32, **text):
    """A CLIP with heads of 32 channels in both towers."""
    torch.manual_seed(0)
    vision = EncoderConfig(
        name="vit_base_patch32_clip_quickgelu_224.openai", image_size=64, weights=None,
        mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], kwargs={"embed_dim": 64, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    config = {
        "model_type": "clip_text_model", "vocab_size": entries, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": positions,
        "hidden_act": "quick_gelu", "bos_token_id": 2, "eos_token_id": end, **text,
    }  # fmt: skip
    text_config = TextConfig(config=config, context_length=length, pooling="eos")
    return build_model(ModelConfig(kind="clip", embed_dim=32, vision=vision, text=text_config)).eval()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An export with a tokenizer of its own: its end of text is id 3, and texts are cut at 20 of 32 positions."""
    folder = tmp_path_factory.mktemp("own")
    train_tokenizer(SENTENCES, folder / "tokenizer", 300, 20)
    model = plain_clip(len(load_tokenizer(str(folder / "tokenizer"), 20)), 3, 20)
    return save_pretrained(model.state_dict(), model.config, folder / "export", folder / "tokenizer"), folder / "out"


@pytest.fixture(scope="module")
def exported(own):
    assert main(["export", "--input", str(own[0]), "--output", str(own[1]), "--format", "open_clip"]) == 0
    return own


def our_texts(folder, sentences):
    words, model = (
        load_tokenizer(str(folder), from_pretrained(folder).config.text.context_length),
        from_pretrained(folder),
    )
    tokens = words(sentences, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return normalize(model.encode_text(tokens["input_ids"], tokens["attention_mask"]), dim=-1)


def test_open_clip_gives_our_features_with_our_tokenizer(exported):
    """Also for a text that is cut, and for images that are not square, from open_clip's own transform."""
    folder, out = exported
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    words = open_clip.get_tokenizer(f"local-dir:{out}")
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((98, 70), Image.Resampling.BICUBIC)
    picture.save(out / "picture.png")
    pixels = torch.from_numpy(eval_transform((out / "picture.png").read_bytes(), 64))[None]
    with torch.no_grad():
        found = normalize(theirs.eval().encode_text(words(SENTENCES)), dim=-1)
        image = normalize(theirs.encode_image(transform(picture)[None]), dim=-1)
        ours = from_pretrained(folder).encode_image(pixels)
    torch.testing.assert_close(found, our_texts(folder, SENTENCES), rtol=0, atol=1e-5)
    assert float((image * ours).sum()) > 0.999


def test_what_we_wrote_for_open_clip_comes_back(exported, tmp_path, caplog):
    """With heads, activation, mean, end of text and tokenizer."""
    folder, out = exported
    with caplog.at_level(logging.INFO):
        assert main(["convert", "--input", str(out), "--output", str(tmp_path / "back")]) == 0
    back, ours = from_pretrained(tmp_path / "back"), from_pretrained(folder)
    assert back.config.vision.mean == [0.4, 0.5, 0.6]
    with torch.no_grad():
        torch.testing.assert_close(back.encode_image(images(64)), ours.encode_image(images(64)), rtol=0, atol=1e-6)
    torch.testing.assert_close(our_texts(tmp_path / "back", SENTENCES), our_texts(folder, SENTENCES), rtol=0, atol=1e-6)


def test_the_bias_of_the_sigmoid_loss_goes_to_open_clip_and_back(own, tmp_path):
    model = from_pretrained(own[0])
    config = dataclasses.replace(model.config, logit_bias_init=-10.0)
    weights = {**model.state_dict(), "logit_bias": torch.tensor([-7.5])}
    folder = save_pretrained(weights, config, tmp_path / "sigmoid", own[0])
    assert main(["export", "--input", str(folder), "--output", str(tmp_path / "out"), "--format", "open_clip"]) == 0
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert theirs.logit_bias.item() == -7.5
    assert main(["convert", "--input", str(tmp_path / "out"), "--output", str(tmp_path / "back")]) == 0
    back = from_pretrained(tmp_path / "back")
    outputs = back.eval()(images(64), torch.tensor([[5, 6, 3]]))
    assert outputs["logit_bias"].item() == -7.5


@pytest.fixture
def folder_of_open_clip(tmp_path):
    """A folder of open_clip whose text tower has 2 heads of 32 channels, its visual one 4 of 32, with QuickGELU."""
    vision = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16, "head_width": 32}
    text = {"context_length": 24, "vocab_size": 600, "width": 64, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(32, vision, text, quick_gelu=True).eval()
    save_file(
        {name: value.contiguous() for name, value in theirs.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    model = {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    train_tokenizer(SENTENCES, tmp_path / "words", 300, 24)
    return tmp_path, theirs


@pytest.mark.parametrize("named", ["folder", "file"])
def test_heads_and_activation_are_read_from_the_file_beside(folder_of_open_clip, named, capsys):
    folder, theirs = folder_of_open_clip
    source = folder if named == "folder" else folder / "open_clip_model.safetensors"
    words = ["convert", "--input", str(source), "--output", str(folder / "out"), "--tokenizer", str(folder / "words")]
    assert main([*words, "--format", "open_clip"]) == 0
    said = capsys.readouterr().out
    assert "quick_gelu, 4 heads in the visual tower and 2 in the text tower: from open_clip_config.json" in said
    model, pixels, (ids, mask) = from_pretrained(folder / "out"), images(64), texts(24)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(pixels), theirs.encode_image(normalised(pixels), True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model.encode_text(ids, mask), theirs.encode_text(ids, True), rtol=0, atol=1e-5)


def test_what_is_assumed_is_said(folder_of_open_clip, capsys):
    folder, _ = folder_of_open_clip
    (folder / "open_clip_config.json").unlink()
    words = ["convert", "--input", str(folder), "--output", str(folder / "out"), "--tokenizer", str(folder / "words")]
    assert main([*words, "--format", "open_clip"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if ": assumed" in line]
    assert len(said) == 1
    assert "activation gelu, 2 heads in the visual tower and 1 in the text tower: assumed" in said[0]


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("vision_cfg", "width", 64, "is of another model: vision_cfg.width is 64, and the weights have 128"),
        ("vision_cfg", "pool_type", "avg", "vision_cfg.pool_type is 'avg'; such a model is not converted"),
        ("vision_cfg", "head_width", 48, "vision_cfg.head_width is 48, which does not divide 128"),
        ("text_cfg", "heads", 0, "text_cfg.heads is 0, which does not divide 64"),
        ("text_cfg", "no_causal_mask", True, "text_cfg.no_causal_mask is True; such a model is not converted"),
        ("text_cfg", "pool_type", "last", "text_cfg.pool_type is 'last'; such a model is not converted"),
    ],
)
def test_a_file_beside_of_another_model_is_refused(folder_of_open_clip, part, key, value, said, capsys):
    folder, _ = folder_of_open_clip
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"][part][key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    words = ["convert", "--input", str(folder), "--output", str(folder / "out"), "--tokenizer", str(folder / "words")]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_another_vocabulary_needs_its_tokenizer(folder_of_open_clip, capsys):
    folder, _ = folder_of_open_clip
    assert main(["convert", "--input", str(folder), "--output", str(folder / "out")]) == 2
    assert "text tower of 600 entries, but CLIP's tokenizer has 49408: name its tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_a_file_names_is_not_loaded(folder_of_open_clip, capsys):
    """Only the user names hub ids and folders, see docs/security.md."""
    folder, _ = folder_of_open_clip
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(folder / "words")
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    assert main(["convert", "--input", str(folder), "--output", str(folder / "out")]) == 2
    assert "its own is not beside the weights: name it by --tokenizer" in capsys.readouterr().err


def test_a_damaged_tokenizer_beside_the_weights_is_named(exported, tmp_path, capsys):
    folder = shutil.copytree(exported[1], tmp_path / "out")
    (folder / "tokenizer.json").write_text("{")
    assert main(["convert", "--input", str(folder), "--output", str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert f"the tokenizer '{folder}' cannot be loaded" in error
    assert "name another by --tokenizer" in error
    assert "hub" not in error


def test_a_tokenizer_without_an_end_is_refused(own, tmp_path, capsys):
    """open_clip could not tell which state stands for the text."""
    folder = shutil.copytree(own[0], tmp_path / "export")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    words = ["export", "--input", str(folder), "--output", str(tmp_path / "out"), "--format", "open_clip"]
    assert main(words) == 2
    assert "puts no end token after a text" in capsys.readouterr().err


def test_clips_own_tokenizer_stays_open_clips(tmp_path):
    """With CLIP's vocabulary no tokenizer is written, and open_clip's own gives our features."""
    theirs = tiny_open_clip(vocab_size=49408)
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    assert main(["convert", "--input", str(tmp_path / "clip.pt"), "--output", str(tmp_path / "ours")]) == 0
    words = ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "out"), "--format", "open_clip"]
    assert main(["export", *words]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    back, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        found = normalize(
            back.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(SENTENCES)), dim=-1
        )
    torch.testing.assert_close(found, our_texts(tmp_path / "ours", SENTENCES), rtol=0, atol=1e-5)


def test_other_epsilon_is_refused(tmp_path, capsys):
    model = plain_clip(49408, 49407, 20, layer_norm_eps=1e-3)
    folder = save_pretrained(model.state_dict(), model.config, tmp_path / "export")
    words = ["export", "--input", str(folder), "--output", str(tmp_path / "out"), "--format", "open_clip"]
    assert main(words) == 2
    assert "layer_norm_eps 1e-05; this one has 0.001" in capsys.readouterr().err
