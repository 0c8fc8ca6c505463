"""Users of each export format get the figures of `retrieval evaluate`, with the processor of the folder.

    export         AutoModel, after an import of ours
    onnx           onnxruntime
    transformers   AutoModel in a process that has never seen this project: a file of code, and a CLIPModel
    open_clip      CLIP Benchmark's own command, also in that process

The figures are far above chance, so that pixels that are normalised twice, or not at all, would show. They are those of
the stored export of version 0.1, which was trained, and of a CLIP whose projections are fitted to the same images.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageFilter
from test_retrieval_clip_benchmark import write
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

import priorclip.model.export.transformers_auto  # noqa: F401 (registers the model)
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.shards import ShardSet
from priorclip.data_shards.tokenizer import load_tokenizer
from priorclip.model import build_model, from_pretrained, save_pretrained
from priorclip.model.__main__ import main as model_command
from priorclip.model.config import EncoderConfig, ModelConfig, TextConfig
from priorclip.model.export.to_onnx import export_onnx
from priorclip.retrieval.__main__ import main as retrieval
from priorclip.retrieval.encoder import Encoder

STORED = Path(__file__).resolve().parents[1] / "stored" / "v0.1"
SHARDS = [str(STORED / "shards" / name) for name in ("held-out", "train")]
Encode = Callable[[list[Image.Image], list[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gallery:
    """The 36 images of the stored shards with their captions, decoded by Pillow; ``image_of`` (T,)."""

    images: list[Image.Image]
    captions: list[str]
    image_of: np.ndarray


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    shards = ShardSet(SHARDS)
    samples = [shards.read(number) for number in range(len(shards))]
    captions = [text for sample in samples for text in sample.captions]
    image_of = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
    return Gallery([Image.open(io.BytesIO(sample.image)) for sample in samples], captions, image_of)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored model, exported by today's code. Its tokenizer says another length than the model has."""
    folder = tmp_path_factory.mktemp("clients")
    tokenizer = shutil.copytree(STORED / "run" / "tokenizer", folder / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 5}))
    model = from_pretrained(STORED / "run" / "export")
    return save_pretrained(model.state_dict(), model.config, folder / "export", tokenizer)


@pytest.fixture(scope="module")
def onnx(export: Path) -> Path:
    return export_onnx(from_pretrained(export), export.with_name("onnx"), export)


def evaluated(folder: Path) -> dict:
    """The report of `retrieval evaluate` on the gallery."""
    out = folder.with_name(f"{folder.name}.json")
    data = f"{STORED / 'shards'}/{{held-out,train}}"
    words = ["evaluate", "--model", str(folder), "--data", data, "--output", str(out), "--workers", "0"]
    assert retrieval([*words, "--bootstrap", "0"]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def report(export: Path) -> dict:
    return evaluated(export)


@pytest.fixture(scope="module")
def clip(export: Path, gallery: Gallery) -> Path:
    """A CLIP with the towers that open_clip and transformers have. Its projections are fitted by ridge regression, so
    that an image and its captions have nearly the same code of 32 random numbers.
    """
    torch.manual_seed(0)
    words = load_tokenizer(str(export), 32)
    mean, std, sizes = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], {"embed_dim": 64, "depth": 2, "num_heads": 2}
    vision = EncoderConfig(
        name="vit_base_patch32_clip_quickgelu_224.openai", image_size=64, weights=None, mean=mean, std=std, kwargs=sizes
    )
    text = {
        "model_type": "clip_text_model", "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32, "hidden_act": "quick_gelu",
        "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    text_config = TextConfig(config=text, context_length=32, pooling="eos")
    model = build_model(ModelConfig(kind="clip", embed_dim=32, vision=vision, text=text_config)).eval()
    pixels = torch.stack([torch.from_numpy(eval_transform(png(image), 64)) for image in gallery.images])
    tokens = words(gallery.captions, padding="max_length", truncation=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    codes = torch.randn(len(pixels), 32)
    with torch.no_grad():
        model.image_projection.weight.copy_(fitted(model.visual(pixels), codes))
        states = model.text.pool(model.text(ids, mask), mask)
        model.text_projection.weight.copy_(fitted(states, codes[gallery.image_of]))
    return save_pretrained(model.state_dict(), model.config, export.with_name("clip"), export)


def fitted(states: Tensor, codes: Tensor) -> Tensor:
    """The matrix (32, C) of the ridge regression from states (N, C) to codes (N, 32)."""
    inner = states.T @ states + 0.1 * torch.eye(states.shape[1])
    return torch.linalg.solve(inner, states.T @ codes).T


STRANGER = """
import json, sys, torch
from clip_benchmark.cli import main
from PIL import Image
from transformers import AutoModel, AutoProcessor

captions, pictures = json.loads(sys.argv[1]), [Image.open(path) for path in sys.argv[3:]]
for name, trust in (("export", True), ("clip", False)):
    model = AutoModel.from_pretrained(f"{name}-transformers", trust_remote_code=trust)
    processor = AutoProcessor.from_pretrained(f"{name}-transformers")
    with torch.no_grad():
        images = model.get_image_features(**processor(images=pictures, return_tensors="pt"))
        texts = model.get_text_features(**processor(text=captions, return_tensors="pt", padding=True, truncation=True))
    found = [x if torch.is_tensor(x) else x.pooler_output for x in (images, texts)]  # a CLIPModel's have a wrapper
    torch.save([torch.nn.functional.normalize(x, dim=1) for x in found], f"{name}.pt")
sys.argv[1:] = ["eval", "--model", "local-dir:clip-open_clip", "--pretrained", "", "--dataset", "wds/made",
                "--dataset_root", sys.argv[2], "--task", "zeroshot_retrieval", "--recall_k", "1", "5", "10", "--no_amp",
                "--num_workers", "0", "--batch_size", "16", "--output", "benchmark.json"]
main()
assert not any("priorclip." in name or name == "priorclip" for name in sys.modules), "it has seen the project"
"""


@pytest.fixture(scope="module")
def stranger(export: Path, clip: Path, gallery: Gallery) -> Path:
    """The folder of somebody who got exports and has the clients only, with what they found."""
    folder = export.with_name("stranger")
    folder.mkdir()
    for source, format in ((export, "transformers"), (clip, "transformers"), (clip, "open_clip")):
        words = ["--input", str(source), "--output", str(folder / f"{source.name}-{format}"), "--format", format]
        assert model_command(["export", *words]) == 0
    pictures = [folder / f"{number}.png" for number in range(len(gallery.images))]
    for path, image in zip(pictures, gallery.images, strict=True):
        path.write_bytes(png(image))
    own = [[text for text, image in zip(gallery.captions, gallery.image_of, strict=True) if image == number]
           for number in range(len(pictures))]  # fmt: skip
    samples = zip(pictures, own, strict=True)
    shards = write(folder / "wds", [{"png": path.read_bytes(), "txt": "\n".join(texts)} for path, texts in samples])
    (shards / "dataset_type.txt").write_text("retrieval\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, json.dumps(gallery.captions), str(shards), *map(str, pictures)]
    subprocess.run(command, cwd=folder, env=variables, check=True, timeout=300)
    return folder


def by_transformers(folder: Path) -> Encode:
    def encode(images: list[Image.Image], captions: list[str]) -> tuple[Tensor, Tensor]:
        pixels = AutoImageProcessor.from_pretrained(str(folder))(images, return_tensors="pt")
        tokens = AutoTokenizer.from_pretrained(str(folder))(
            captions, padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            found = AutoModel.from_pretrained(str(folder))(**pixels, **tokens)
        return found.image_embeds, found.text_embeds

    return encode


def by_onnxruntime(folder: Path) -> Encode:
    def run(name: str, **inputs: np.ndarray) -> Tensor:
        session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        taken = {each.name for each in session.get_inputs()}
        return torch.from_numpy(session.run(None, {key: inputs[key] for key in inputs if key in taken})[0])

    def encode(images: list[Image.Image], captions: list[str]) -> tuple[Tensor, Tensor]:
        pixels = AutoImageProcessor.from_pretrained(str(folder))(images, return_tensors="np")["pixel_values"]
        tokens = AutoTokenizer.from_pretrained(str(folder))
        texts = tokens(captions, padding="max_length", truncation=True, return_tensors="np")
        return run("image.onnx", images=pixels), run("text.onnx", **texts)

    return encode


@pytest.fixture(params=["export", "onnx"])
def encode(request: pytest.FixtureRequest) -> Encode:
    """The two formats that need a package of ours, or none that brings a model."""
    folder = request.getfixturevalue(request.param)
    return by_transformers(folder) if request.param == "export" else by_onnxruntime(folder)


def mean_recall(images: Tensor, texts: Tensor, image_of: np.ndarray) -> float:
    """The mean of recall@1, 5, 10 in both directions in percent, by sorting, as CLIP Benchmark defines it."""
    scores = (images.double() @ texts.double().T).numpy()
    own = image_of[None, :] == np.arange(len(scores))[:, None]
    ranks_of_texts = [own[row][np.argsort(-scores[row])].argmax() for row in range(len(scores))]
    ranks_of_images = [
        int((scores[:, column] > scores[image_of[column], column]).sum()) for column in range(len(image_of))
    ]
    figures = [np.mean(np.array(ranks) < k) for ranks in (ranks_of_texts, ranks_of_images) for k in (1, 5, 10)]
    return 100 * float(np.mean(figures))


def test_mean_recall_is_that_of_evaluate(encode: Encode, gallery: Gallery, report: dict) -> None:
    """One caption of the 180 that moves over a limit is 0.1 points."""
    found = encode(gallery.images, gallery.captions)
    assert report["mean_recall"] > 40
    assert mean_recall(*found, gallery.image_of) == pytest.approx(report["mean_recall"], abs=0.75)


@pytest.mark.parametrize("name", ["export", "clip"])
def test_a_stranger_to_this_project_gets_the_figure_of_evaluate(
    stranger: Path, gallery: Gallery, name: str, request: pytest.FixtureRequest
) -> None:
    """By a file of code, and as transformers' CLIPModel. A CLIP whose pixels are normalised twice loses 14 points."""
    expected = evaluated(request.getfixturevalue(name))["mean_recall"]
    images, texts = torch.load(stranger / f"{name}.pt", weights_only=True)
    assert expected > 40
    assert mean_recall(images, texts, gallery.image_of) == pytest.approx(expected, abs=0.75)


def test_clip_benchmark_gets_our_figures_of_the_export_to_open_clip(stranger: Path, clip: Path) -> None:
    """By its own command on its own layout of the images, with open_clip's transform and the folder's tokenizer."""
    metrics, report = json.loads((stranger / "benchmark.json").read_text())["metrics"], evaluated(clip)
    for k in (1, 5, 10):
        assert 100 * metrics[f"text_retrieval_recall@{k}"] == pytest.approx(report[f"i2t_r{k}"], abs=0.1), k
        assert 100 * metrics[f"image_retrieval_recall@{k}"] == pytest.approx(report[f"t2i_r{k}"], abs=0.1), k


def test_features_are_those_of_evaluate(encode: Encode, export: Path, gallery: Gallery) -> None:
    """Also of photographs that are not square, whose centre transformers cuts out after resizing, and of long texts."""
    rng = np.random.default_rng(0)
    wide, high = (Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in ((64, 91), (130, 77)))
    images = [*gallery.images, *(image.filter(ImageFilter.GaussianBlur(6)) for image in (wide, high))]
    captions = [*gallery.captions[::9], "a river " * 40]
    ours = Encoder.load(export, device="cpu")
    want = torch.stack([ours.image(png(image)) for image in images])
    found, texts = encode(images, captions)
    assert torch.nn.functional.cosine_similarity(found, want).min() > 0.995
    torch.testing.assert_close(texts, torch.stack([ours.text(text) for text in captions]), rtol=0, atol=1e-5)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("wrong", [{"do_normalize": True}, {"do_rescale": False, "do_normalize": True}])
def test_pixels_that_are_normalised_already_are_refused(export: Path, gallery: Gallery, wrong: dict) -> None:
    """As the processor of version 0.1 made them: the mean recall was then near chance, without a word."""
    pixels = AutoImageProcessor.from_pretrained(str(export))(gallery.images, return_tensors="pt", **wrong)
    with pytest.raises(ValueError, match=r"set do_normalize to false .* in preprocessor_config\.json"):
        AutoModel.from_pretrained(str(export))(**pixels)


def test_saving_keeps_tokenizer_and_figures(export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also over its own folder. Figures are those of weights, so other weights get none."""
    own = shutil.copytree(export, tmp_path / "own")
    (own / "README.md").write_text("| mean_recall | 47.5 |")
    (own / "metrics.json").write_text('{"mean_recall": 47.5}')
    model = AutoModel.from_pretrained(str(own))
    for target in (tmp_path / "again", own):
        model.save_pretrained(str(target))
        files = {path.name: path.read_bytes() for path in target.iterdir()}
        assert files["README.md"] == b"| mean_recall | 47.5 |"
        assert files["metrics.json"] == b'{"mean_recall": 47.5}'
        assert files["tokenizer.json"] == (export / "tokenizer.json").read_bytes()
        assert files["model.safetensors"] == (export / "model.safetensors").read_bytes()
    assert Encoder.load(tmp_path / "again", device="cpu").text("a river").isfinite().all()
    gathered = {
        name: value * 0.5 if name == "inner.logit_scale" else value for name, value in model.state_dict().items()
    }
    with caplog.at_level(logging.INFO):
        model.save_pretrained(str(tmp_path / "tuned"), state_dict=gathered)
    assert "47.5" not in (tmp_path / "tuned" / "README.md").read_text()
    assert "the card gets no figures" in caplog.text
    assert from_pretrained(tmp_path / "tuned").logit_scale == model.inner.logit_scale * 0.5
    model.save_pretrained(str(tmp_path / "other-rank"), is_main_process=False)
    assert not (tmp_path / "other-rank").exists()
    with pytest.raises(ValueError, match="upload_folder"):
        model.save_pretrained(str(tmp_path / "hub"), push_to_hub=True)


def test_card_says_what_transformers_needs(export: Path) -> None:
    """The lines of the card run as they stand; a scene classifier has no AutoModel."""
    card = (export / "README.md").read_text()
    assert "`priorclip-pretraining`: `pip install .`" in card
    code = card.split("```python\n")[2].split("```")[0]
    names = {"FOLDER": str(export), "PICTURES": [Image.new("RGB", (40, 30))] * 2, "CAPTIONS": ["a river", "a pier"]}
    exec(code, names)
    assert names["similarity"].shape == (2, 2)
