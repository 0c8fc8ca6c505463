"""ONNX files of both towers give the model's features in onnxruntime, for any batch."""

import json

import numpy as np
import pytest
import torch
from tiny_models import CLIP_TEXT, tiny

from priorclip.model.build import build_model
from priorclip.model.config import TextConfig
from priorclip.model.export.folder import from_pretrained, save_pretrained
from priorclip.model.export.to_onnx import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
KINDS = {
    "priorclip": lambda: tiny(text=TextConfig(config=CLIP_TEXT, context_length=20, pooling="eos")),
    "prioritr": lambda: tiny("prioritr"),
}


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@pytest.fixture(scope="module", params=list(KINDS))
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(KINDS[request.param]()).eval()
    folder = tmp_path_factory.mktemp("onnx")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    save_pretrained(model.state_dict(), model.config, folder / "export", tokenizer)
    return model, export_onnx(from_pretrained(folder / "export"), folder / "out", folder / "export")


@pytest.mark.parametrize("count", [1, 5])
def test_features_equal_torchs(exported, count):
    model, folder = exported
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
    ids, mask = torch.randint(1, 62, (count, 20)), torch.ones(count, 20, dtype=torch.long)
    for row in range(count):
        mask[row, 4 + 3 * row :] = 0
    with torch.no_grad():
        expected = model(images, ids, mask)
    found = run(folder / "image.onnx", images=images)
    torch.testing.assert_close(found, expected["image_features"], rtol=0, atol=1e-5)
    found = run(folder / "text.onnx", input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, expected["text_features"], rtol=0, atol=1e-5)


def test_equal_beliefs_keep_their_order(exported):
    """A grey image: all tokens have the same belief, and torch's stable sort and ONNX give the same order."""
    model, folder = exported
    images = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(run(folder / "image.onnx", images=images), expected, rtol=0, atol=1e-4)


def test_folder_holds_what_a_program_needs(exported):
    model, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {"image.onnx", "text.onnx", "tokenizer.json", "preprocessor_config.json", "onnx.json"}
    facts = json.loads((folder / "onnx.json").read_text())
    assert facts["logit_scale"] == pytest.approx(np.exp(model.logit_scale.item()), rel=1e-6)
    assert (facts["image_size"], facts["context_length"], facts["embed_dim"]) == (64, 20, 16)


def test_missing_extra_is_named(exported, monkeypatch, tmp_path):
    monkeypatch.setattr("priorclip.model.export.to_onnx.REQUIRED", ("onnx_of_dreams",))
    with pytest.raises(ValueError, match=r"needs onnx_of_dreams: pip install \.\[onnx\]"):
        export_onnx(exported[0], tmp_path / "out", tmp_path)
    assert list(tmp_path.iterdir()) == []
