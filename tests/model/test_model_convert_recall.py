"""A converted open_clip model has, in `retrieval evaluate`, the recall of open_clip with its own pixels.

Preprocessing: open_clip resizes the shorter side (Pillow, bicubic), crops the centre and normalises; ours crops the
centred square, resizes it to uint8, and the model normalises. On square images these differ by rounding and by the JPEG
decoder, up to a few 1/255 a pixel, so that features differ by about 1e-3 and an image near a tie may change its rank.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_models import open_clip_model
from PIL import Image

from priorclip.data_shards.synthetic import draw_scene
from priorclip.model.__main__ import main as model_command
from priorclip.model.recall import retrieval_metrics
from priorclip.retrieval.__main__ import main as retrieval

library = pytest.importorskip("open_clip")
ROOT = Path(__file__).resolve().parents[2]
COUNT, SIDE, LENGTH, STEPS = 40, 64, 32, 60


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Synthetic scenes with captions, as JPEGs of 96 pixels and a Karpathy JSON."""
    folder, entries = tmp_path_factory.mktemp("gallery"), []
    for index in range(COUNT):
        scene = draw_scene(5, index, 96)
        Image.fromarray(scene.image).save(folder / f"{index}.jpg", quality=95)
        sentences = [{"raw": caption} for caption in scene.fine]
        entries.append({"split": "test", "filename": f"{index}.jpg", "sentences": sentences})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"dataset": "few", "images": entries}))
    return path, entries


@pytest.fixture(scope="module")
def theirs(gallery):
    """A small CLIP of open_clip, trained on the gallery for some steps: recall well above chance and below 100 %."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "layers": 2, "width": 128, "patch_size": 16}
    model = library.model.CLIP(
        64, vision, {"width": 64, "heads": 1, "layers": 2, "vocab_size": 49408, "context_length": LENGTH}
    )
    pixels = own_pixels(gallery)
    captions = [entry["sentences"][0]["raw"] for entry in gallery[1]]
    ids = library.tokenize(captions, context_length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = library.loss.ClipLoss()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model.encode_image(pixels, True), model.encode_text(ids, True), torch.tensor(20.0)).backward()
        optimizer.step()
    return model.eval()


def own_pixels(gallery):
    """Pixels as from open_clip's transform for evaluation."""
    transform = library.image_transform(SIDE, is_train=False)
    path, entries = gallery
    return torch.stack([transform(Image.open(path.parent / entry["filename"])) for entry in entries])


def own_recall(model, gallery):
    """Recall of open_clip's features and tokenizer by the usual protocol."""
    entries = gallery[1]
    texts = [(row, sentence["raw"]) for row, entry in enumerate(entries) for sentence in entry["sentences"]]
    with torch.no_grad():
        images = F.normalize(model.encode_image(own_pixels(gallery)), dim=-1)
        features = F.normalize(
            model.encode_text(library.tokenize([text for _, text in texts], context_length=LENGTH)), dim=-1
        )
    return retrieval_metrics(images, features, torch.tensor([row for row, _ in texts]))


def test_recall_equals_open_clips(theirs, gallery, tmp_path):
    path, _ = gallery
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "open_clip.pt")
    out = str(tmp_path / "converted")
    assert model_command(["convert", "--input", str(tmp_path / "open_clip.pt"), "--output", out]) == 0
    words = ["evaluate", "--model", out, "--data", str(path), "--images", str(path.parent), "--device", "cpu"]
    assert retrieval([*words, "--output", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    expected = own_recall(theirs, gallery)
    assert report["images"] == COUNT
    assert 3 * report["chance"]["mean_recall"] < expected["mean_recall"] < 99, "the comparison must be able to fail"
    for name, value in expected.items():
        # One image of 40 is 2.5 points, one caption of 200 is half a point.
        assert report[name] == pytest.approx(value, abs=2.6), name
    assert report["mean_recall"] == pytest.approx(expected["mean_recall"], abs=1.0)


def test_stage_two_starts_from_a_converted_clip(tmp_path):
    """One step of `finetune instruct` with a new prior, on a CLIP with two layers per tower."""
    from priorclip.data_shards.__main__ import main as data_shards

    drawn = ["pack", "--source", "synthetic", "--count", "8", "--size", "64", "--workers", "1"]
    assert data_shards([*drawn, "--output", str(tmp_path / "shards")]) == 0
    state = open_clip_model("ViT-B-32", 1, vocabulary=49408, image_size=SIDE, width=64, head_width=64).state_dict()
    torch.save(state, tmp_path / "clip.pt")
    out = tmp_path / "converted"
    assert model_command(["convert", "--input", str(tmp_path / "clip.pt"), "--output", str(out)]) == 0
    prior = {"channels": [24, 48, 96, 192], "stem_width": 16}
    words = ["--init_from", out, "--model.kind", "priorclip", "--model.prior.name", "resnet10t", "--run.epochs", 1,
             "--model.prior.kwargs", json.dumps(prior), "--model.prior.image_size", SIDE, "--data.image_size", SIDE,
             "--model.prior.trainable", "true", "--data.shards", tmp_path / "shards", "--data.workers", 0,
             "--run.engine.global_batch", 8, "--run.engine.zero", 0, "--run.dir", tmp_path / "run",
             "--run.progress", "false", "--run.optimizer.lr", 0]  # fmt: skip
    command = [sys.executable, "-m", "finetune", "instruct", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "is a plain CLIP: the instruction starts at random" in done.stdout + done.stderr
    from priorclip.model import from_pretrained

    begun, ended = from_pretrained(out).state_dict(), from_pretrained(tmp_path / "run" / "export").state_dict()
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["kind"] == "priorclip"
    assert any(name.startswith("visual.instruction.") for name in ended)
    for name, value in begun.items():
        assert torch.equal(ended[name], value), f"{name} must come from the converted model (the learning rate is 0)"
