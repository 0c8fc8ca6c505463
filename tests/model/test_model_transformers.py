"""`model export --format transformers`, loaded in a process that has never seen this project.

One process loads all folders, because importing transformers takes most of the time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model_open_clip import plain_clip
from tiny_models import BERT, CLIP_TEXT, tiny

from priorclip.data_shards import train_tokenizer
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.tokenizer import load_tokenizer
from priorclip.model import build_model, from_pretrained, save_pretrained
from priorclip.model.__main__ import main
from priorclip.model.config import BeliefConfig, FusionConfig, TextConfig

# The pipeline does not cut its labels, the first two; the third is cut at 20 tokens.
TEXTS = ["a river", "planes", "many planes near a long terminal building " * 9]
MODELS = {
    "clip": None,
    "vit": tiny(vision="vit"),
    "vit with registers, hard": tiny(vision="registers", belief=BeliefConfig(mode="hard", k=5)),
    "released": tiny(vision="vit", belief=BeliefConfig(compat="released")),
    "swin": tiny(vision="swin", belief=BeliefConfig(mode="none")),
    "convnext": tiny(vision="convnext"),
    "no fusion": tiny(vision="resnet", fusion=FusionConfig(width=24, layers=0)),
    "no fusion, hard": tiny(vision="resnet", belief=BeliefConfig(mode="hard", k=2), fusion=FusionConfig(layers=0)),
    "prioritr": tiny("prioritr", vision="swin"),
    "prioritr, hard": tiny("prioritr", vision="vit", belief=BeliefConfig(mode="hard", k=5)),
    "prioritr, none": tiny("prioritr", vision="vit", belief=BeliefConfig(mode="none")),
    "sigmoid, clip without its towers": tiny("clip", vision="resnet", logit_bias_init=-3.0),
}
STRANGER = """
import json, sys, torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline

folders, texts, pictures = json.loads(sys.argv[1]), json.loads(sys.argv[2]), [Image.open(p) for p in sys.argv[3:]]
found = {}
for name, folder in folders.items():
    model = AutoModel.from_pretrained(folder, trust_remote_code=name != "clip")
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        out = model(**inputs)
    classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=name != "clip")
    labels = classify(pictures[0], candidate_labels=texts[:2], hypothesis_template="{}")
    shares = {each["label"]: each["score"] for each in labels}
    sentences = []
    if name in ("clip", "vit"):  # a CLIPModel, and a model by its own file
        sentences = SentenceTransformer(folder, trust_remote_code=name != "clip")
        sentences = [torch.tensor(sentences.encode(some)) for some in ([texts[0]], [pictures[1]])]
    found[name] = {"sentences": sentences, "image": out.image_embeds, "text": out.text_embeds,
                   "logits": out.logits_per_image,
                   "shares": torch.tensor([shares[text] for text in texts[:2]]), "kind": type(model).__name__}
assert not any("priorclip." in name or name == "priorclip" for name in sys.modules), "it has seen the project"
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export folders ``ours/NAME``, theirs ``theirs/NAME``, pictures, and what the stranger found."""
    place = tmp_path_factory.mktemp("transformers")
    train_tokenizer(TEXTS, place / "tokenizer", 300, 20)
    entries = len(load_tokenizer(str(place / "tokenizer"), 20))
    for name, config in MODELS.items():
        torch.manual_seed(1)
        if config is None:
            model = plain_clip(entries, 3, 20)
        else:
            text = CLIP_TEXT if name.startswith("vit") else BERT
            pooling = "eos" if name.startswith("vit") else "cls" if "hard" in name else "mean"
            config.text = TextConfig(config={**text, "vocab_size": entries}, context_length=20, pooling=pooling)
            model = build_model(config).eval()
            for parameter in model.parameters():  # biases and norms are not at their start
                parameter.data += 0.05 * torch.randn_like(parameter)
            model.logit_scale.data.fill_(2.0)
        save_pretrained(model.state_dict(), model.config, place / "ours" / name, place / "tokenizer")
        words = ["--input", str(place / "ours" / name), "--output", str(place / "theirs" / name)]
        assert main(["export", *words, "--format", "transformers"]) == 0
    for count, size in enumerate(((96, 70), (64, 64))):
        noise = np.random.default_rng(count).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(place / f"{count}.png")
    folders = json.dumps({name: str(place / "theirs" / name) for name in MODELS})
    (place / "alone").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", STRANGER, folders, json.dumps(TEXTS), str(place / "0.png"), str(place / "1.png")],
        cwd=place / "alone", env=environment, check=True,
    )  # fmt: skip
    return place


@pytest.mark.parametrize("name", MODELS)
def test_a_stranger_gets_our_features(folder: Path, name: str) -> None:
    found = torch.load(folder / "alone" / "found.pt", weights_only=True)[name]
    model = from_pretrained(folder / "ours" / name)
    words = load_tokenizer(str(folder / "ours" / name), 20)(
        TEXTS, padding="max_length", truncation=True, return_tensors="pt"
    )
    side = model.config.vision.image_size
    pixels = torch.stack([torch.from_numpy(eval_transform((folder / f"{n}.png").read_bytes(), side)) for n in (0, 1)])
    with torch.no_grad():
        ours = model(pixels, words["input_ids"], words["attention_mask"])
    # The second picture has the model's size, so that no resampling differs.
    exact = slice(1 if side == 64 else 2, None)
    torch.testing.assert_close(found["image"][exact], ours["image_features"][exact], rtol=0, atol=1e-5)
    assert (found["image"] * ours["image_features"]).sum(1).min() > 0.99
    torch.testing.assert_close(found["text"], ours["text_features"], rtol=0, atol=1e-5)
    bias = 0.0 if model.logit_bias is None else model.logit_bias.item()
    logits = model.logit_scale.exp() * found["image"] @ found["text"].T + bias
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["shares"], found["logits"][0, :2].softmax(0), rtol=0, atol=1e-4)
    for vector, wanted in zip(found["sentences"], (found["text"][:1], found["image"][1:]), strict=False):
        torch.testing.assert_close(torch.nn.functional.normalize(vector, dim=1), wanted, rtol=0, atol=1e-5)
    assert len(found["sentences"]) == (2 if name in ("clip", "vit") else 0)
    assert found["kind"] == ("CLIPModel" if name == "clip" else "PriorCLIPModel")


def test_a_clip_for_transformers_has_no_code(folder: Path) -> None:
    assert not list((folder / "theirs" / "clip").glob("*.py"))
    assert "auto_map" not in json.loads((folder / "theirs" / "clip" / "config.json").read_text())


def test_we_read_the_folder_with_code_as_data(folder: Path) -> None:
    theirs, ours = (from_pretrained(folder / kind / "vit") for kind in ("theirs", "ours"))
    assert theirs.config == ours.config
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert "modelling_priorclip" not in sys.modules


def test_a_rival_of_belief_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(vision="vit", belief=BeliefConfig(mode="gate"))
    model = build_model(config)
    save_pretrained(model.state_dict(), model.config, tmp_path / "gate", folder / "tokenizer")
    words = ["--input", str(tmp_path / "gate"), "--output", str(tmp_path / "out"), "--format", "transformers"]
    assert main(["export", *words]) == 2
    assert "'gate'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
